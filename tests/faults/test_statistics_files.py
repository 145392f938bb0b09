"""Operators that measure the experts: runs, exports, recipes and single merges, and statistics that are damaged, moved or foreign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from mergeopt.recipe import Recipe
from mergeopt.study.run import Run
from tests.faults.commands import Commands, listing, refused, wait_for_trials, write
from tests.faults.repeats import everything

WEIGHTS = "model.safetensors"
FISHER: dict[str, Any] = {"merge": {"operator": "fisher", "statistics": {"items": 24}}, "strategy": "random", "budget": 6}


@pytest.fixture(scope="module")
def measured(mergeopt: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run `run` of Fisher merging, and the model `model` of its last trial; not to be changed."""
    folder = tmp_path_factory.mktemp("measured")
    write(folder, **FISHER)
    for arguments in (("run", "run.yaml"), ("export", "run", "--trial", "9", "--to", "model")):
        done = mergeopt(folder, *arguments)
        assert done.status == 0, done.err
    return folder


def statistics_of(folder: Path) -> Path:
    """Return the folder of a run's one set of statistics."""
    (found,) = (folder / "statistics").iterdir()
    return found


def test_a_run_keeps_what_it_measured(mergeopt: Commands, measured: Path, tmp_path: Path) -> None:
    """Statistics lie in the run's folder, every trial's recipe names them by place and hash, and any trial becomes a model again."""
    folder = statistics_of(measured / "run")
    assert listing(folder) == ["fisher-0.safetensors", "fisher-1.safetensors", "statistics.json"]
    asked = [trial for trial in Run.open(measured / "run").trials if trial.kind == "asked"]
    assert len(asked) == 6
    for trial in asked:
        assert trial.recipe is not None
        assert trial.recipe.statistics is not None
        assert Path(trial.recipe.statistics.path) == folder
        assert trial.recipe.statistics.hash[:32] == folder.name
    done = mergeopt(tmp_path, "merge", measured / "model/recipe.json", "--out", "again")
    assert done.status == 0, done.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (measured / "model" / WEIGHTS).read_bytes()
    assert "measured of the experts" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_killed_while_it_works_is_the_run_that_was_left_alone(mergeopt: Commands, measured: Path, tmp_path: Path) -> None:
    """Killed before, at and after the first candidates and resumed each time, a run measures once and ends as the undisturbed one."""
    child = mergeopt.start(tmp_path, "run", measured / "run.yaml", "--out", "run")
    for trials in (1, 5, 7):
        wait_for_trials(tmp_path / "run", trials, child)
        child.stop()
        child = mergeopt.start(tmp_path, "run", measured / "run.yaml", "--out", "run", "--resume")
    done = child.wait()
    assert done.status == 0, done.err
    assert everything(tmp_path / "run") == everything(measured / "run")
    assert [f.name for f in (tmp_path / "run" / "statistics").iterdir() if not f.name.startswith(".")] == [
        statistics_of(measured / "run").name
    ]


def test_statistics_may_move(mergeopt: Commands, measured: Path, tmp_path: Path) -> None:
    """A run that moved exports all the same; a recipe says that its statistics are gone, and --map says where they are."""
    shutil.copytree(measured / "run", tmp_path / "moved")
    recipe = json.loads((measured / "model/recipe.json").read_text())
    recipe["statistics"]["path"] = str(tmp_path / "gone")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "out"), "cannot read the statistics", "--map statistics=PATH")
    place = f"statistics={statistics_of(tmp_path / 'moved')}"
    assert mergeopt(tmp_path, "merge", "recipe.json", "--out", "out", "--map", place).status == 0
    assert mergeopt(tmp_path, "export", "moved", "--trial", "9", "--to", "exported").status == 0
    for made in ("out", "exported"):
        assert (tmp_path / made / WEIGHTS).read_bytes() == (measured / "model" / WEIGHTS).read_bytes()
    assert str(tmp_path / "moved") in (tmp_path / "exported" / "recipe.json").read_text()


def changed(folder: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "fisher-1.safetensors").items()}
    save_file(tensors, folder / "fisher-1.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed, "its contents are not those of its content hash"),
        (lambda folder: (folder / "fisher-0.safetensors").write_bytes(b"cut"), "no whole safetensors file"),
        (lambda folder: (folder / "statistics.json").write_text("no JSON"), "is no JSON"),
    ],
    ids=["changed", "cut", "description"],
)
def test_damaged_statistics_are_refused(
    mergeopt: Commands, measured: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    """Export, merge and resuming refuse statistics that are damaged, and write nothing."""
    shutil.copytree(measured / "run", tmp_path / "run")
    shutil.copy(measured / "model/recipe.json", tmp_path / "recipe.json")
    folder = statistics_of(tmp_path / "run")
    damage(folder)
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "export", "run", "--trial", "9", "--to", "out"), said)
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "out", "--map", f"statistics={folder}"), said)
    refused(mergeopt(tmp_path, "run", measured / "run.yaml", "--out", "run", "--resume", "--budget", "7"), said, "delete the folder")
    assert listing(tmp_path) == before
    shutil.rmtree(folder)
    done = mergeopt(tmp_path, "run", measured / "run.yaml", "--out", "run", "--resume", "--budget", "7")
    assert done.status == 0, done.err
    assert statistics_of(tmp_path / "run").name == folder.name


def data_of_digits(folder: Path) -> dict[str, Any]:
    """Write real digits as a table with three splits, and return what a task's `data` and `preprocess` say of it."""
    images, labels = load_digits(return_X_y=True)
    rows = [
        {
            "image": (16 * image).astype(int).clip(0, 255).reshape(8, 8).tolist(),
            "label": int(label),
            "split": ("val", "test", "extra")[i % 3],
        }
        for i, (image, label) in enumerate(zip(images[:60], labels[:60], strict=True))
    ]
    (folder / "digits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"data": {"path": "digits.jsonl", "search": "val", "split_column": "split"}, "preprocess": {"mean": 0.3, "std": 0.38}}


@pytest.mark.parametrize("operator", ["fisher", "regmean"])
def test_a_merge_file_measures_too(mergeopt: Commands, models: Path, tmp_path: Path, operator: str) -> None:
    """One merge without a search measures on its objectives' data, or another split of it; its recipe makes the same bits again."""
    sources: dict[str, Any] = {"problem": None, "base": "models/base", "experts": {"a": "models/upright", "b": "models/turned"}}
    task = {"task": "image_classification", **data_of_digits(tmp_path)}
    write(tmp_path, **sources, merge={"operator": operator})
    refused(mergeopt(tmp_path, "merge", "run.yaml", "--out", "out"), f"operator '{operator}' measures every expert on data of its own")
    write(tmp_path, **sources, merge={"operator": operator}, objectives=[{"name": "a", "expert": "a", **task}])
    refused(mergeopt(tmp_path, "merge", "run.yaml", "--out", "out"), "no objective with a task says `expert: b`")
    objectives = [{"name": name, "expert": name, **task} for name in "ab"]
    made = {}
    for out, statistics in (("out", {"items": 8}), ("other", {"items": 8, "split": "extra"})):
        write(tmp_path, **sources, merge={"operator": operator, "statistics": statistics}, objectives=objectives)
        done = mergeopt(tmp_path, "merge", "run.yaml", "--out", out)
        assert done.status == 0, done.err
        made[out] = load_file(tmp_path / out / WEIGHTS)
    done = mergeopt(tmp_path, "merge", "out/recipe.json", "--out", "again")
    assert done.status == 0, done.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    kept = Recipe.load(tmp_path / "out" / "recipe.json").statistics
    assert kept is not None
    assert Path(kept.path).parent.name == "statistics"
    assert any(not torch.equal(made["out"][name], made["other"][name]) for name in made["out"])
    for file in Path(kept.path).parent.rglob("*.safetensors"):
        file.write_bytes(b"cut")
    done = mergeopt(tmp_path, "merge", "run.yaml", "--out", "anew")
    assert done.status == 0, done.err
    assert (tmp_path / "anew" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_what_cannot_be_measured_is_refused_before_anything_is_written(mergeopt: Commands, models: Path, tmp_path: Path) -> None:
    """A search whose experts have no data, or whose split is not there, ends at the door; an unknown key is named with the nearest."""
    sources: dict[str, Any] = {"problem": None, "base": "models/base", "experts": {"a": "models/upright", "b": "models/turned"}}
    task = {"task": "image_classification", **data_of_digits(tmp_path)}
    objectives = [{"name": name, "expert": name, **task} for name in "ab"]
    reported = {"name": "c", **task, "data": {**task["data"], "report": "test"}}
    for merge, given, said in (
        ({"operator": "regmean"}, objectives[:1], "no objective with a task says `expert: b`"),
        ({"operator": "regmean", "statistics": {"split": "nowhere"}}, objectives, "merge: statistics: split nowhere: a"),
        ({"operator": "regmean", "statistics": {"split": "test"}}, [*objectives, reported], "'test' is the report part of objective 'c'"),
        ({"operator": "regmean", "statistics": {"item": 3}}, objectives, "unknown key 'merge.statistics.item'; did you mean 'items'"),
        ({"operator": "regmean", "statistics": {"items": 0}}, objectives, "merge.statistics.items"),
    ):
        write(tmp_path, **sources, merge=merge, objectives=given, strategy="random")
        before = listing(tmp_path)
        refused(mergeopt(tmp_path, "run", "run.yaml"), said)
        assert listing(tmp_path) == before
