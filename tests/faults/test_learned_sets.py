"""Learned sets: every preference is a model, and what is damaged, foreign or no preference is refused with nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from mergeopt.config import RunFile, build_problem
from mergeopt.errors import ConfigError
from mergeopt.learned import Factors, LearnedSet
from mergeopt.merge_problem import MergeProblem
from mergeopt.study.learned_front import LearnedFront
from mergeopt.study.run import Run
from tests.faults.commands import Commands, listing, refused, write

WEIGHTS = "model.safetensors"
TENSORS, DESCRIPTION = "learned.safetensors", "learned.json"
POINTS = 5
LAST = 4 + POINTS - 1  # trials: four baselines, then the answers
ASKED = {"upright": 0.7, "turned": 0.3}
PREFER = ["--prefer", "upright=.7,turned=.3"]
NAN = float("nan")


@pytest.fixture(scope="module")
def learned(mergeopt: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run `run` of Pareto-set learning in closed form; not to be changed."""
    folder = tmp_path_factory.mktemp("learned")
    write(folder, strategy={"name": "pareto-set", "loss": "distance"}, budget={"evaluations": POINTS, "gradient_steps": 0})
    done = mergeopt(folder, "run", "run.yaml")
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def run_copy(learned: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(learned / "run", tmp_path / "run")
    return tmp_path / "run"


def set_of(run: Path) -> Path:
    """Return the folder of a run's one learned set."""
    (found,) = (run / "learned").iterdir()
    return found


def test_a_preference_is_the_same_model_by_every_way(mergeopt: Commands, learned: Path, tmp_path: Path) -> None:
    """The command, `export`, `sample` and `apply` give the same weights bit for bit, and another preference gives others."""
    done = mergeopt(tmp_path, "export", set_of(learned / "run"), *PREFER, "--to", "model")
    assert done.status == 0, done.err
    written = load_file(tmp_path / "model" / WEIGHTS)
    front = LearnedFront(set_of(learned / "run"))
    front.export(ASKED, tmp_path / "exported")
    assert (tmp_path / "exported" / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()
    assert mergeopt(tmp_path, "merge", "model/recipe.json", "--out", "again").status == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()
    model = AutoModelForImageClassification.from_pretrained(front.pool.base.path)
    front.apply(model, [0.7, 0.3])
    sample, live = front.sample(ASKED), model.state_dict()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").state_dict()
    for given, expected in ((sample, written), (live, loaded)):
        assert sorted(given) == sorted(expected)
        assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    other = front.sample([0.3, 0.7])
    assert any(not torch.equal(other[name], tensor) for name, tensor in written.items())


def test_a_trials_model_is_its_preferences_model(mergeopt: Commands, learned: Path, tmp_path: Path) -> None:
    """The run's exported trial and the learned set's answer to that trial's preference are the same bytes."""
    run = Run.open(learned / "run")
    recipe = run.trials[LAST - 1].recipe
    assert recipe is not None
    assert recipe.learned is not None
    prefer = ",".join(f"{name}={share!r}" for name, share in recipe.learned.preference.items())
    for what, choice, to in ((learned / "run", ["--trial", LAST - 1], "trial"), (set_of(learned / "run"), ["--prefer", prefer], "asked")):
        done = mergeopt(tmp_path, "export", what, *choice, "--to", to)
        assert done.status == 0, done.err
    assert (tmp_path / "trial" / WEIGHTS).read_bytes() == (tmp_path / "asked" / WEIGHTS).read_bytes()


def test_the_front_of_a_learned_set_is_the_runs(learned: Path) -> None:
    """Scored again, evenly spread preferences give the values that the run stored for them."""
    run = Run.open(learned / "run")
    problem = build_problem(RunFile.load(learned / "run.yaml"), learned)
    assert isinstance(problem, MergeProblem)
    front = LearnedFront(set_of(learned / "run")).front(POINTS, problem)
    assert [dict(point.values) for point in front.points] == [dict(point.values) for point in run.front.points]
    assert len(front.points) > 2
    with pytest.raises(ConfigError, match="one or more points"):
        LearnedFront(set_of(learned / "run")).front(0, problem)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (["--prefer", "upright=nan"], "the preference for 'upright' must be a finite number >= 0, got nan"),
        (["--prefer", "upright=inf"], "must be a finite number >= 0, got inf"),
        (["--prefer", "upright=1,turned=-0.1"], "the preference for 'turned' must be a finite number >= 0, got -0.1"),
        (["--prefer", "uprigt=1"], "unknown objective 'uprigt'; did you mean 'upright'?"),
        (["--prefer", "upright=0,turned=0"], "expected a preference above 0 for one or more of upright, turned"),
        (["--prefer", "upright"], "--prefer: expected NAME=VALUE, got 'upright'"),
        (["--prefer", "upright=x"], "--prefer: expected a number for 'upright', got 'x'"),
        (["--prefer", "upright=1,upright=2"], "--prefer: 'upright' stands twice"),
        (["--prefer", ""], "--prefer: expected NAME=VALUE, got ''"),
        (["--knee"], "is a learned set, which has a model for every preference; say which with --prefer"),
        (["--trial", "4"], "is a learned set"),
        (["--where", "upright>=0.1", "--best", "turned"], "is a learned set"),
        ([], "expected one of --trial, --prefer, --where or --knee, got none"),
        ([*PREFER, "--knee"], "got --prefer and --knee"),
    ],
)
def test_what_is_no_preference_is_refused(mergeopt: Commands, learned: Path, tmp_path: Path, choice: list[str], said: str) -> None:
    """Shares that are none, unknown names, and ways of choosing that a learned set does not know are refused by name."""
    refused(mergeopt(tmp_path, "export", set_of(learned / "run"), *choice, "--to", "model"), said)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("preference", "said"),
    [
        ([1.0], "expected a preference of 2 shares"),
        ([0.2, 0.3, 0.5], "expected a preference of 2 shares"),
        ([], "expected a preference of 2 shares"),
        ([NAN, 1.0], "must be a finite number"),
        ([-1.0, 1.0], "must be a finite number >= 0, got -1.0"),
        ([0.0, 0.0], "above 0 for one or more"),
        ({}, "above 0 for one or more"),
        ({"upright": "1"}, "must be a finite number >= 0, got '1'"),
        ({"upright": True}, "must be a finite number >= 0, got True"),
        ({"uprigt": 1.0}, "unknown objective 'uprigt'"),
    ],
)
def test_what_is_no_preference_is_refused_from_python(learned: Path, tmp_path: Path, preference: Any, said: str) -> None:
    """`sample`, `apply` and `export` refuse the same, and leave a live model and the disk as they are."""
    front = LearnedFront(set_of(learned / "run"))
    model = torch.nn.Linear(2, 2)
    for ask in (lambda: front.sample(preference), lambda: front.apply(model, preference), lambda: front.export(preference, tmp_path / "m")):
        with pytest.raises(ConfigError, match=said):
            ask()
    assert listing(tmp_path) == []


def test_shares_of_any_size_count_by_their_ratio(learned: Path) -> None:
    """The smallest and the largest numbers there are make the weights of their ratio."""
    front = LearnedFront(set_of(learned / "run"))
    even = front.sample([1.0, 1.0])
    for shares in ([5e-324, 5e-324], [1.7e308, 1.7e308], [3, 3]):
        assert all(torch.equal(tensor, even[name]) for name, tensor in front.sample(shares).items())
    with pytest.raises(ConfigError, match=r"the model has no .* give one of the architecture that was merged"):
        front.apply(torch.nn.Linear(2, 2), [1.0, 1.0])


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return what rewrites the tensors of a learned set."""

    def damage(folder: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
        change(held)
        save_file(held, folder / TENSORS)

    return damage


def description(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what rewrites the description of a learned set."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / DESCRIPTION).read_text())
        change(data)
        (folder / DESCRIPTION).write_text(json.dumps(data))

    return damage


def put(data: Any, *path: Any) -> None:
    """Set `path[-1]` at the end of a path into nested data."""
    for key in path[:-2]:
        data = data[key]
    data[path[-2]] = path[-1]


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a learned set's tensors, and what comes after it."""
    raw = (folder / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def claim_huge_shapes(folder: Path) -> None:
    """Make the header of the tensors claim what the file cannot hold."""
    held, rest = header(folder)
    name = next(name for name in held if name.startswith("A/"))
    held[name]["shape"] = [2**40, 4]
    text = json.dumps(held).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + rest)


def truncate(folder: Path) -> None:
    """Keep half of the tensors' file."""
    os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size // 2)


def change_a_byte(folder: Path) -> None:
    """Flip one bit of the last number."""
    raw = bytearray((folder / TENSORS).read_bytes())
    raw[-4] ^= 1
    (folder / TENSORS).write_bytes(raw)


def lengthen(folder: Path) -> None:
    """Let the description end in 65 MiB of nothing."""
    os.truncate(folder / DESCRIPTION, 65 << 20)


def nest(folder: Path) -> None:
    """Write a description that is nothing but brackets."""
    (folder / DESCRIPTION).write_text("[" * 100_000)


def pickled(folder: Path) -> None:
    """Keep the tensors as a pickle only, under their name."""
    held = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}  # what is read is mapped, and is written over
    torch.save(held, folder / TENSORS)


def first(held: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    """Return the first tensor of a part, flat."""
    return next(tensor for name, tensor in sorted(held.items()) if name.startswith(part)).view(-1)


FOREIGN = "its contents are not those of its content hash"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is no whole safetensors file"),
    "huge shapes": (claim_huge_shapes, "is no whole safetensors file"),
    "pickled": (pickled, "is no whole safetensors file"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "is no whole safetensors file"),
    "a byte": (change_a_byte, FOREIGN),
    "nan": (tensors(lambda held: first(held, "G/").fill_(NAN)), "holds numbers that are not finite"),
    "infinity": (tensors(lambda held: first(held, "A/")[3:4].fill_(float("inf"))), "holds numbers that are not finite"),
    "one tensor more": (tensors(lambda held: held.update(more=torch.zeros(1))), "holds an unknown tensor 'more'"),
    "one tensor less": (tensors(lambda held: held.pop(min(held))), "lacks 'A/classifier.weight'"),
    "another type": (tensors(lambda held: held.update({min(held): held[min(held)].double()})), "to be float32"),
    "another rank": (tensors(lambda held: held.update({min(held): held[min(held)][:, :2].contiguous()})), "learned set: expected"),
    "no json": (lambda folder: (folder / DESCRIPTION).write_text("{"), "is no JSON"),
    "no text": (lambda folder: (folder / DESCRIPTION).write_bytes(b"\xff\xfe\xfa"), "is no JSON"),
    "brackets": (nest, "is no JSON"),
    "too long": (lengthen, "is longer than"),
    "format": (description(lambda data: put(data, "format", 99)), "expected a learned set of format 1, got 99"),
    "objectives": (description(lambda data: put(data, "objectives", ["turned", "upright"])), FOREIGN),
    "objectives twice": (description(lambda data: put(data, "objectives", ["turned", "turned"])), "objectives with different names"),
    "objectives less": (description(lambda data: put(data, "objectives", ["turned"])), "learned set: expected G/"),
    "features": (description(lambda data: put(data, "features", "cubic")), "unknown features 'cubic'"),
    "features that are not there": (description(lambda data: put(data, "features", "mlp")), "lacks 'phi/inner.bias'"),
    "huge target": (description(lambda data: put(data, "targets", 0, 1, 10**15)), FOREIGN),
    "target elsewhere": (description(lambda data: put(data, "targets", 0, 0, "../../etc/passwd")), "damaged learned set"),
    "no targets": (description(lambda data: put(data, "targets", [])), "damaged learned set"),
    "targets": (description(lambda data: put(data, "targets", 3)), "damaged learned set"),
    "merge": (description(lambda data: put(data, "merge", "dtype", "bfloat16")), FOREIGN),
    "no merge": (description(lambda data: data.pop("merge")), "damaged learned set"),
    "info": (description(lambda data: put(data, "info", 3)), "damaged learned set"),
    "hash": (description(lambda data: put(data, "hash", "0" * 64)), FOREIGN),
    "hash that is none": (description(lambda data: put(data, "hash", None)), "damaged learned set"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_learned_set_is_refused(mergeopt: Commands, run_copy: Path, tmp_path: Path, name: str) -> None:
    """Whatever is cut off, changed, missing or claimed is refused for what it is, and nothing is written."""
    damage, said = DAMAGES[name]
    folder = set_of(run_copy)
    damage(folder)
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "export", folder, *PREFER, "--to", "model"), said)
    assert listing(tmp_path) == before


def test_a_learned_set_of_endless_sizes_is_refused(mergeopt: Commands, run_copy: Path, tmp_path: Path) -> None:
    """JSON that Python reads as infinity is refused where a whole number is expected."""
    description(lambda data: put(data, "targets", 0, 1, float("inf")))(set_of(run_copy))
    refused(mergeopt(tmp_path, "export", set_of(run_copy), *PREFER, "--to", "model"), "damaged learned set")


@pytest.mark.parametrize("name", ["a byte", "no tensors", "merge", "nan"])
def test_a_run_with_a_damaged_learned_set_exports_nothing(mergeopt: Commands, run_copy: Path, tmp_path: Path, name: str) -> None:
    """Export of a run refuses its damaged set, and takes no other in its place."""
    damage, said = DAMAGES[name]
    damage(set_of(run_copy))
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "export", run_copy, "--trial", LAST, "--to", "model"), said)
    assert listing(tmp_path) == before


def test_what_people_read_of_a_learned_set_is_no_part_of_it(mergeopt: Commands, run_copy: Path, tmp_path: Path) -> None:
    """Another note on how it was learned changes no weight and is no damage."""
    description(lambda data: put(data, "info", {"note": "mine"}))(set_of(run_copy))
    done = mergeopt(tmp_path, "export", run_copy, "--trial", LAST, "--to", "model")
    assert done.status == 0, done.err


def another_set(folder: Path, to: Path) -> None:
    """Write a whole learned set with other numbers than that of a folder."""
    found = LearnedSet.load(folder)
    factors = {name: Factors(f.left, f.right, f.core * 0.5) for name, f in found.factors.items()}
    assert found.merge is not None
    LearnedSet(found.objectives, factors, found.features, found.merge, found.info).save(to)


def test_another_learned_set_in_its_place_is_named(mergeopt: Commands, run_copy: Path, tmp_path: Path) -> None:
    """A whole set with other contents is none of this run's or recipe's, wherever it lies."""
    folder = set_of(run_copy)
    recipe = Run.open(run_copy).trials[LAST].recipe
    assert recipe is not None
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    another_set(folder, tmp_path / "other")
    wrong = ("is not the learned set this recipe was made with", "--map learned=PATH")
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "model", "--map", "learned=other"), *wrong)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other", folder)
    refused(mergeopt(tmp_path, "export", run_copy, "--trial", LAST, "--to", "model"), *wrong)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("place", ["/", "..", "recipe.json", "absent", "", "x" * 5000])
def test_a_recipe_whose_learned_set_lies_elsewhere_is_refused(mergeopt: Commands, learned: Path, tmp_path: Path, place: str) -> None:
    """A place that holds no learned set is refused by name."""
    recipe = Run.open(learned / "run").trials[LAST].recipe
    assert recipe is not None
    data = recipe.to_json()
    data["learned"]["path"] = place
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "model"), "cannot read the learned set", place[:50])
    assert listing(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    ("preference", "said"),
    [
        ({"upright": 0.5}, "damaged recipe: expected a preference of non-negative shares with sum one"),
        ({"upright": -1.0, "turned": 2.0}, "damaged recipe: expected a preference of non-negative shares with sum one"),
        ({"upright": NAN, "turned": 1.0}, "damaged recipe: expected a preference of non-negative shares with sum one"),
        ({"uprigt": 0.5, "turned": 0.5}, "unknown objective 'uprigt'; did you mean 'upright'?"),
        ({}, "damaged recipe"),
        ([0.5, 0.5], "damaged recipe"),
    ],
)
def test_a_recipe_with_a_damaged_preference_is_refused(
    mergeopt: Commands, learned: Path, tmp_path: Path, preference: Any, said: str
) -> None:
    """Shares that do not add up to one, are none, or are of unknown objectives are refused, and nothing is written."""
    recipe = Run.open(learned / "run").trials[LAST].recipe
    assert recipe is not None
    data = recipe.to_json()
    data["learned"]["preference"] = preference
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    refused(mergeopt(tmp_path, "merge", "recipe.json", "--out", "model"), said)
    assert listing(tmp_path) == ["recipe.json"]


def test_a_set_that_corrects_larger_weights_than_there_are_is_refused(mergeopt: Commands, learned: Path, tmp_path: Path) -> None:
    """Factors of a few megabytes whose product would fill the memory are refused before it is made."""
    found = LearnedSet.load(set_of(learned / "run"))
    assert found.merge is not None
    column = torch.zeros((10**6, 1))
    factors = {"classifier.weight": Factors(column, column.clone(), torch.zeros((2, 1, 1)))}
    LearnedSet(found.objectives, factors, found.features, found.merge).save(tmp_path / "huge")
    refused(mergeopt(tmp_path, "export", "huge", *PREFER, "--to", "model"), "corrects classifier.weight of shape [1000000, 1000000]")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge"]


def test_a_learned_set_whose_models_changed_is_refused(mergeopt: Commands, learned: Path, models: Path, tmp_path: Path) -> None:
    """A set over models that lie elsewhere by now says which it misses or which are others."""
    shutil.copytree(set_of(learned / "run"), tmp_path / "set")
    description(lambda data: put(data, "merge", "experts", 1, "path", str(models / "upright")))(tmp_path / "set")
    refused(mergeopt(tmp_path, "export", "set", *PREFER, "--to", "model"), "is not the model this recipe was made with", "turned")
    description(lambda data: put(data, "merge", "experts", 1, "path", str(models / "absent")))(tmp_path / "set")
    refused(mergeopt(tmp_path, "export", "set", *PREFER, "--to", "model"), "no such folder or file")
    assert not (tmp_path / "model").exists()
    moved = LearnedFront(tmp_path / "set", {"turned": str(models / "turned")})
    assert np.isfinite(sum(float(tensor.sum()) for tensor in moved.sample(ASKED).values()))
