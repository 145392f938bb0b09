"""Exported models: they score what the store says, or they do not come to be."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mergeopt.config import RunFile, build_problem
from mergeopt.errors import ConfigError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.study.run import Run
from tests.faults.commands import Commands, listing, refused, write

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def exported(mergeopt: Commands, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The knee of the finished run, exported."""
    folder = tmp_path_factory.mktemp("exported")
    done = mergeopt(folder, "export", finished / "run", "--knee", "--to", "model")
    assert done.status == 0, done.err
    assert "equal bit for bit" in done.out
    return folder / "model"


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def own_run(mergeopt: Commands, models: Path, tmp_path: Path) -> Path:
    """A small run over the models of this test, whose objectives are functions."""
    (tmp_path / "own.py").write_text(
        "def first(model, items, device): return float(model.classifier.bias[0])\n"
        "def second(model, items, device): return float(model.classifier.bias[1])\n"
    )
    objectives = [{"name": name, "function": f"own.py:{name}", "direction": "minimize"} for name in ("first", "second")]
    sources: dict[str, Any] = {"base": "models/base", "experts": ["models/upright", "models/turned"]}
    write(tmp_path, problem=None, **sources, objectives=objectives, budget=4, strategy="random")
    done = mergeopt(tmp_path, "run", "run.yaml")
    assert done.status == 0, done.err
    return tmp_path / "run"


def alter(run: Path, statement: str, *values: Any) -> None:
    """Change the database of a run behind its back."""
    connection = sqlite3.connect(run / "run.db")
    with connection:
        assert connection.execute(statement, values).rowcount >= 1
    connection.close()


def test_the_exported_knee_scores_exactly_what_the_store_says(exported: Path, finished: Path) -> None:
    """Loaded by transformers alone, the model gives the stored values and every stored per-item record, bit for bit."""
    run = Run.open(finished / "run")
    knee = run.front.knee()
    problem = build_problem(RunFile.load(finished / "run.yaml"), finished)
    assert isinstance(problem, MergeProblem)
    model = AutoModelForImageClassification.from_pretrained(exported).eval()
    for objective in problem.objectives:
        assert isinstance(objective, TaskObjective)
        records = objective.task.records(model, "search", torch.device("cpu"))
        kept = run.records(knee.trial, "search", objective.info.name)
        assert objective.metric.aggregate(records) == knee.values[objective.info.name]
        assert list(kept) == list(records)
        for column in kept:
            np.testing.assert_array_equal(kept[column], records[column])


def test_an_export_is_a_whole_model_folder(exported: Path, finished: Path, trained: dict[str, Path]) -> None:
    """Weights, configuration, image processor, recipe and card are there, readable by all, and nothing else is."""
    assert listing(exported) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.json"]
    assert (exported / "preprocessor_config.json").read_bytes() == (trained["base"] / "preprocessor_config.json").read_bytes()
    AutoImageProcessor.from_pretrained(exported, backend="pil")  # type: ignore[no-untyped-call]
    knee = Run.open(finished / "run").front.knee()
    assert knee.recipe is not None
    assert json.loads((exported / "recipe.json").read_text()) == knee.recipe.to_json()
    card = (exported / "README.md").read_text()
    assert "task_arithmetic" in card
    for name, value in knee.values.items():
        assert f"| {name} | {value:.4f} |" in card
    for name in listing(exported):
        assert (exported / name).stat().st_mode & 0o444 == 0o444, name


def test_an_export_never_touches_what_is_there(mergeopt: Commands, finished: Path, tmp_path: Path) -> None:
    """A folder that is not empty and a file are refused and left alone; an empty folder is used."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for to in ("full", "full/mine.txt"):
        refused(mergeopt(tmp_path, "export", finished / "run", "--knee", "--to", to), f"{to} is already there and not empty")
    assert listing(tmp_path) == ["empty", "full", "full/mine.txt"]
    assert mergeopt(tmp_path, "export", finished / "run", "--knee", "--to", "empty").status == 0
    assert (tmp_path / "empty" / WEIGHTS).is_file()


@pytest.mark.parametrize("to", ["file/model", "/proc/mergeopt/model", "/sys/model"])
def test_an_export_to_where_nothing_can_be_written_is_refused(mergeopt: Commands, finished: Path, tmp_path: Path, to: str) -> None:
    """A place below a file or in a read-only system is refused by name."""
    (tmp_path / "file").write_text("")
    refused(mergeopt(tmp_path, "export", finished / "run", "--knee", "--to", to), f"cannot write the model to {to}")
    assert listing(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_model(mergeopt: Commands, exported: Path, finished: Path, tmp_path: Path) -> None:
    """Export and merge that cannot write all weights end with status 2, say why, and leave nothing behind."""
    for arguments in (["export", finished / "run", "--knee", "--to", "model"], ["merge", exported / "recipe.json", "--out", "model"]):
        done = mergeopt(tmp_path, *arguments, limit=100_000)
        refused(done, "cannot write the model to model", "free space")
        assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (["--trial", "999"], "has no trial 999; it has 0 to"),
        (["--where", "uprigt>=0.1", "--best", "turned"], "unknown objective 'uprigt' in 'uprigt>=0.1'; did you mean 'upright'?"),
        (["--where", "upright>=2", "--best", "turned"], "upright>=2"),
        (["--prefer", "uprigt=1"], "uprigt"),
        (["--prefer", "upright=x"], "--prefer: expected a number for 'upright', got 'x'"),
    ],
)
def test_a_choice_that_names_no_point_is_refused(mergeopt: Commands, finished: Path, tmp_path: Path, choice: list[str], said: str) -> None:
    """A trial, objective or bound that is not there is refused by name."""
    refused(mergeopt(tmp_path, "export", finished / "run", *choice, "--to", "model"), said)
    assert listing(tmp_path) == []


def test_a_stored_score_that_the_model_does_not_have_ends_the_export(mergeopt: Commands, run_copy: Path, tmp_path: Path) -> None:
    """When store and reloaded model disagree the export fails with status 1, both values, and no folder."""
    knee = Run.open(run_copy).front.knee()
    alter(run_copy, "UPDATE scores SET value = value + 0.01 WHERE trial = ? AND part = 'search' AND objective = 'turned'", knee.trial)
    done = mergeopt(tmp_path, "export", run_copy, "--trial", knee.trial, "--to", "model")
    assert done.status == 1
    assert f"turned: stored {knee.values['turned'] + 0.01!r}, reloaded {knee.values['turned']!r}" in done.err
    assert "Traceback" not in done.err
    assert listing(tmp_path) == ["run", *[f"run/{name}" for name in listing(run_copy)]]


def test_a_stored_recipe_that_gives_another_model_ends_the_export(mergeopt: Commands, run_copy: Path, tmp_path: Path) -> None:
    """A recipe altered in the store makes another model, which is found out; one that is damaged is refused."""
    point = Run.open(run_copy).front.points[0]
    assert point.recipe is not None
    data = point.recipe.to_json()
    data["arguments"]["weight"]["values"]["model"] = {"upright": 0.9, "turned": 0.9}
    alter(run_copy, "UPDATE trials SET recipe = ? WHERE number = ?", json.dumps(data), point.trial)
    done = mergeopt(tmp_path, "export", run_copy, "--trial", point.trial, "--to", "model")
    assert (done.status, (tmp_path / "model").exists()) == (1, False), done
    assert "does not score what the store says" in done.err
    alter(run_copy, "UPDATE trials SET recipe = ? WHERE number = ?", "{", point.trial)
    refused(mergeopt(tmp_path, "export", run_copy, "--trial", point.trial, "--to", "model"), f"trial {point.trial}", "recipe is damaged")


def test_a_source_that_changed_since_is_named(mergeopt: Commands, own_run: Path, models: Path, tmp_path: Path) -> None:
    """After a source model changed, export names it and writes nothing; with the model put back it works."""
    file = models / "turned" / WEIGHTS
    original = file.read_bytes()
    tensors = load_file(file)
    tensors["classifier.bias"] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    refused(mergeopt(tmp_path, "export", own_run, "--knee", "--to", "model"), "the model 'turned'", "changed since")
    shutil.move(file, tmp_path / "aside")
    refused(mergeopt(tmp_path, "export", own_run, "--knee", "--to", "model"), "turned holds no model.safetensors")
    file.write_bytes(original)
    assert not (tmp_path / "model").exists()
    assert mergeopt(tmp_path, "export", own_run, "--knee", "--to", "model").status == 0
    (tmp_path / "elsewhere").mkdir()
    done = mergeopt(tmp_path / "elsewhere", "merge", "../model/recipe.json", "--out", "again")
    assert done.status == 0, done.err
    assert (tmp_path / "elsewhere" / "again" / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()


def test_an_objective_that_changed_since_is_named(mergeopt: Commands, own_run: Path, tmp_path: Path) -> None:
    """After the code of an objective changed, export names the objective and writes nothing."""
    own = tmp_path / "own.py"
    own.write_text(own.read_text() + "# another file now\n")
    refused(mergeopt(tmp_path, "export", own_run, "--knee", "--to", "model"), "the objective 'first'", "changed since")
    assert not (tmp_path / "model").exists()


def test_a_run_made_in_a_script_needs_its_problem_to_export(finished: Path, tmp_path: Path) -> None:
    """Without a run file in the store the problem must be given; with it the export works."""
    problem = build_problem(RunFile.load(finished / "run.yaml"), finished)
    alone = Run.open(finished / "run")
    alone.header["config"].pop("run_file")
    with pytest.raises(ConfigError, match="was not made from a run file"):
        alone.front.knee().export(tmp_path / "model")
    assert Run.open(finished / "run", problem).front.knee().export(tmp_path / "model").exact


def test_a_recipe_makes_the_same_model_twice_and_from_other_places(
    mergeopt: Commands, exported: Path, models: Path, tmp_path: Path
) -> None:
    """Merging a recipe gives the exported weights bit for bit, also when --map names copies of its sources elsewhere."""
    weights = (exported / WEIGHTS).read_bytes()
    moved = [f"--map={name}={models / name}" for name in ("base", "upright", "turned")]
    for out, places in (("one", []), ("two", []), ("moved", moved)):
        done = mergeopt(tmp_path, "merge", exported / "recipe.json", "--out", out, *places)
        assert done.status == 0, done.err
        assert (tmp_path / out / WEIGHTS).read_bytes() == weights
        assert (tmp_path / out / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("turned=models/upright", "turned (models/upright) is not the model this recipe was made with"),
        ("turned=models/absent", "no such folder or file: models/absent"),
        ("mirrored=models/turned", "the recipe has no source 'mirrored'; it has base, upright, turned"),
        ("turned", "--map: expected NAME=VALUE, got 'turned'"),
    ],
)
def test_a_wrong_place_for_a_source_is_refused(
    mergeopt: Commands, exported: Path, models: Path, tmp_path: Path, place: str, said: str
) -> None:
    """--map with other contents, a missing folder or an unknown name is refused and writes nothing."""
    refused(mergeopt(tmp_path, "merge", exported / "recipe.json", "--out", "out", "--map", place), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "expected a recipe (a JSON object), got list"),
        ('{"format": 99}', "expected a recipe of format 1, got format 99"),
        ('{"format": 1}', "damaged recipe: the key 'base' is missing"),
    ],
)
def test_a_damaged_recipe_is_refused(mergeopt: Commands, tmp_path: Path, text: str, said: str) -> None:
    """What is no recipe is refused with the reason."""
    (tmp_path / "recipe.json").write_text(text)
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "out"), said)
    assert listing(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("operator", "version"), 99, "version 99 of operator 'task_arithmetic'"),
        (("operator", "name"), "task_arithmetics", "unknown operator 'task_arithmetics'; did you mean 'task_arithmetic'?"),
        (("operator", "variant"), "other", "has no variant 'other'"),
        (("dtype",), "int8", "dtype"),
        (("exclude",), ["nothing"], "the pattern 'nothing' matches no tensor"),
        (("arguments", "weight", "values"), {"model": {"upright": 1.0}}, "expected a value for each of ['upright', 'turned']"),
        (("arguments", "weight", "groups"), "layer", "expected values for"),
        (("arguments",), {}, "the recipe has []"),
    ],
)
def test_an_altered_recipe_is_refused(
    mergeopt: Commands, exported: Path, tmp_path: Path, path: tuple[str, ...], value: Any, said: str
) -> None:
    """A recipe of another version, or that does not fit operator and model, is refused by what is wrong, and writes nothing."""
    data = json.loads((exported / "recipe.json").read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "out"), said)
    assert listing(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        (
            {"operator": "task_arithmetic", "parameters": {"weight": {"low": 0, "high": 1}}},
            "one merge needs numbers, but weight/model/upright",
        ),
        ({"operator": "ties", "parameters": {"density": 3}}, "density: expected a value in [0.0, 1.0], got 3"),
        ({"operator": "ties", "parameters": {"densty": 1}}, "no parameter 'densty'; did you mean 'density'?"),
    ],
)
def test_a_merge_file_with_a_range_or_a_mistake_is_refused(
    mergeopt: Commands, models: Path, tmp_path: Path, merge: dict[str, Any], said: str
) -> None:
    """One merge takes numbers; ranges and mistakes are refused by name, and nothing is written."""
    sources: dict[str, Any] = {"problem": None, "base": "models/base", "experts": ["models/upright", "models/turned"]}
    write(tmp_path, **sources, merge=merge)
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "merge", "run.yaml", "--out", "out"), said)
    assert listing(tmp_path) == before


def test_a_merge_file_makes_the_model_it_says(mergeopt: Commands, models: Path, tmp_path: Path) -> None:
    """Weights of one and zero give the expert's weights exactly, wherever the command is run from."""
    sources: dict[str, Any] = {"problem": None, "base": "models/base", "experts": ["models/upright", "models/turned"]}
    write(tmp_path, **sources, merge={"operator": "task_arithmetic", "parameters": {"weight": [1.0, 0.0]}})
    (tmp_path / "elsewhere").mkdir()
    done = mergeopt(tmp_path / "elsewhere", "merge", "../run.yaml", "--out", "out")
    assert done.status == 0, done.err
    made, expert = load_file(tmp_path / "elsewhere" / "out" / WEIGHTS), load_file(models / "upright" / WEIGHTS)
    assert sorted(made) == sorted(expert)
    assert all(torch.equal(made[name], expert[name]) for name in made)


def test_a_merge_file_of_a_problem_is_refused(mergeopt: Commands, tmp_path: Path) -> None:
    """A problem is for searches; one merge names its models."""
    write(tmp_path)
    refused(mergeopt(tmp_path, "merge", "run.yaml", "--out", "out"), "a merge file names base and experts")
    assert not (tmp_path / "out").exists()
