"""Learned sets: what they add, how they are asked, and that a folder gives back every bit or says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergeopt.errors import ConfigError, RecipeError, StoreError
from mergeopt.learned import FEATURES, Factors, Features, LearnedSet
from mergeopt.recipe import Argument, Recipe, Source

MERGE = Recipe(
    base=Source("base", "models/base", "b" * 64),
    experts=(Source("zoe", "models/zoe", "c" * 64), Source("ann", "models/ann", "d" * 64)),
    operator="task_arithmetic",
    operator_version=1,
    variant="paper",
    arguments={"weight": Argument("model", None, {"model": {"zoe": 0.5, "ann": 0.5}}, False)},
)
TENSORS, DESCRIPTION = "learned.safetensors", "learned.json"


def make(
    seed: int = 0,
    objectives: tuple[str, ...] = ("f", "g"),
    features: str = "linear",
    shapes: tuple[tuple[int, int], ...] = ((4, 3), (2, 5)),
) -> LearnedSet:
    """Return a finished set of rank 2 with random numbers."""
    rng, m = np.random.default_rng(seed), len(objectives)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    phi = Features(features, (draw(6, m), draw(6), draw(3, 6), draw(3)) if features == "mlp" else ())
    factors = {f"layer.{i}.weight": Factors(draw(c, 2), draw(d, 2), draw(phi.count(m), 2, 2)) for i, (c, d) in enumerate(shapes)}
    return LearnedSet(objectives, factors, phi).finished(MERGE.to_json(), {"seed": seed})


def by_hand(learned: LearnedSet, name: str, gamma: np.ndarray) -> np.ndarray:
    """Return eq. 1 in float64, written out with loops over slices."""
    factors = learned.factors[name]
    phi = list(gamma)
    if learned.features.kind == "quadratic":
        phi += [gamma[i] * gamma[j] for i in range(len(gamma)) for j in range(i, len(gamma))]
    if learned.features.kind == "mlp":
        w1, b1, w2, b2 = (tensor.detach().double().numpy() for tensor in learned.features.tensors)
        phi += list(w2 @ np.tanh(w1 @ gamma + b1) + b2)
    left, right, core = (tensor.detach().double().numpy() for tensor in (factors.left, factors.right, factors.core))
    return np.asarray(sum(weight * left @ core[f] @ right.T for f, weight in enumerate(phi)))


@pytest.mark.parametrize("features", FEATURES)
def test_the_correction_is_equation_one(features: str) -> None:
    """For every kind of features the correction is that of eq. 1 in float64, to float32's precision, with gradients in all parameters."""
    learned = make(features=features, objectives=("f", "g", "h"))
    for parameter in learned.parameters():
        parameter.requires_grad_(True)
    gamma = np.array([0.2, 0.5, 0.3])
    for name in learned.targets:
        correction = learned.delta(name, torch.from_numpy(gamma))
        assert correction.dtype == torch.float32
        np.testing.assert_allclose(correction.detach().numpy(), by_hand(learned, name, gamma), rtol=1e-5, atol=1e-5)
        correction.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in learned.parameters())


def test_nothing_learned_adds_nothing() -> None:
    """With a core of zeros the correction is exactly zero for every preference."""
    learned = make()
    for factors in learned.factors.values():
        factors.core.zero_()
    assert not learned.delta("layer.0.weight", learned.check_preference([0.3, 0.7])).any()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    features=st.sampled_from(FEATURES),
    shapes=st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=3),
    share=st.floats(0, 1),
)
def test_a_folder_leads_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, features: str, shapes: list[tuple[int, int]], share: float
) -> None:
    """Saved and loaded, a set has the same hash, description and, for every preference, the same bits."""
    learned = make(seed, features=features, shapes=tuple(shapes))
    folder = tmp_path_factory.mktemp("learned") / "set"
    learned.save(folder)
    back = LearnedSet.load(folder)
    assert (back.hash, back.targets, back.objectives, back.merge, back.info) == (
        learned.hash,
        learned.targets,
        learned.objectives,
        learned.merge,
        learned.info,
    )
    for preference in ([share, 1.0 - share], [1.0, 0.0], [0.5, 0.5]):
        gamma = learned.check_preference(preference)
        assert all(torch.equal(learned.delta(name, gamma), back.delta(name, gamma)) for name in learned.targets)
    shutil.rmtree(folder)


def test_the_hash_is_about_weights_alone() -> None:
    """Where the models lie and how the set was learned do not change the hash; everything that changes weights does."""
    learned = make()
    assert learned.merge is not None
    moved = MERGE.relocated({"ann": "/elsewhere"}).to_json()
    assert learned.finished(moved, {"seed": 99}).hash == learned.hash
    other = replace(MERGE, arguments={"weight": Argument("model", None, {"model": {"zoe": 0.5, "ann": 0.25}}, False)})
    factors = {f"other.{name}": value for name, value in learned.factors.items()}
    nudged = learned.finished(learned.merge, {})
    nudged.factors["layer.1.weight"].core[0, 0, 0] += 1e-3
    different = [
        learned.finished(other.to_json(), {}),
        LearnedSet(("g", "f"), learned.factors, learned.features, learned.merge),
        LearnedSet(learned.objectives, factors, learned.features, learned.merge),
        nudged,
    ]
    hashes = {learned.hash, *(changed.hash for changed in different)}
    assert len(hashes) == 1 + len(different)


def test_a_preference_is_normalised() -> None:
    """Only ratios count; one-hot and zero shares are fine, a mapping may leave objectives out, and huge shares do not overflow."""
    learned = make(objectives=("f", "g", "h"))
    assert learned.check_preference([0, 1, 0]).tolist() == [0.0, 1.0, 0.0]
    assert learned.check_preference({"h": 3, "f": 1}).tolist() == [0.25, 0.0, 0.75]
    assert learned.check_preference([1e308, 1e308, 0.0]).tolist() == [0.5, 0.5, 0.0]
    assert learned.check_preference(torch.tensor([2.0, 2.0, 4.0])).tolist() == [0.25, 0.25, 0.5]
    assert learned.check_preference(np.array([1, 1, 0], dtype=np.float32).tolist()).dtype == torch.float64


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([1e-300, 1.0, 1e300]))
def test_normalising_twice_changes_nothing(seed: int, scale: float) -> None:
    """A checked preference sums to one and is returned as it is, to the last bit."""
    learned = make(objectives=("f", "g", "h"))
    for shares in scale * np.random.default_rng(seed).random((20, 3)):
        gamma = learned.check_preference(shares.tolist())
        assert float(gamma.sum()) == pytest.approx(1.0, abs=1e-9)
        assert torch.equal(learned.check_preference(gamma.tolist()), gamma)


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ([0.5, float("nan")], "'g' must be a finite number >= 0, got nan"),
        ([float("inf"), 0.5], "'f' must be a finite number >= 0, got inf"),
        ([0.5, -0.1], "'g' must be a finite number >= 0, got -0.1"),
        ([True, 0.5], "'f' must be a finite number >= 0, got True"),
        (["0.5", 0.5], "'f' must be a finite number"),
        ([0.0, 0.0], "above 0 for one or more of f, g"),
        ({}, "above 0 for one or more of f, g"),
        ([1.0], "a preference of 2 shares"),
        (torch.tensor(1.0), "a preference of 2 shares"),
        ({"f": 1.0, "hh": 2.0}, "unknown objective 'hh'"),
    ],
)
def test_what_is_no_preference_is_refused(preference: Any, message: str) -> None:
    """NaN, infinities, negative shares, no share at all, wrong lengths and unknown names are named in the error."""
    with pytest.raises(ConfigError, match=message):
        make().check_preference(preference)


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder that holds something is refused and untouched; an empty one is filled; nothing else is left beside it."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        make().save(tmp_path / "taken")
    (tmp_path / "empty").mkdir()
    make().save(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "taken"]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_what_is_still_learned_cannot_be_kept(tmp_path: Path) -> None:
    """Without the merge it corrects a set has no identity: it can be neither hashed nor saved."""
    learned = make()
    growing = LearnedSet(learned.objectives, learned.factors)
    for attempt in (lambda: growing.hash, lambda: growing.save(tmp_path / "set")):
        with pytest.raises(RecipeError, match="still being learned"):
            attempt()
    assert not list(tmp_path.iterdir())


def described(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a damage done to the description."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / DESCRIPTION).read_text())
        change(data)
        (folder / DESCRIPTION).write_text(json.dumps(data))

    return damage


def stored(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return a damage done to the tensors."""

    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def flip_last_bit(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-4] ^= 1
    (folder / TENSORS).write_bytes(data)


def truncate(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-7])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_last_bit, "content hash"),
    "half a file": (truncate, "no whole safetensors file"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "safetensors"),
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "cannot read the learned set"),
    "no JSON": (lambda folder: (folder / DESCRIPTION).write_bytes(b"\xff{"), "no JSON"),
    "another format": (described(lambda data: data.update(format=2)), "format 1, got 2"),
    "a list": (lambda folder: (folder / DESCRIPTION).write_text("[1]"), "got 'list'"),
    "a missing key": (described(lambda data: data.pop("objectives")), "'objectives'"),
    "a damaged merge": (described(lambda data: data["merge"].pop("base")), "'base'"),
    "another merge": (described(lambda data: data["merge"]["base"].update(hash="e" * 64)), "content hash"),
    "another order": (described(lambda data: data["objectives"].reverse()), "content hash"),
    "another rank": (described(lambda data: data["targets"][0].__setitem__(3, 7)), "content hash"),
    "a name twice": (described(lambda data: data.update(objectives=["f", "f"])), "different names"),
    "unknown features": (described(lambda data: data.update(features="cubic")), "unknown features 'cubic'"),
    "a stranger": (stored(lambda tensors: tensors.update(extra=torch.zeros(1))), "unknown tensor 'extra'"),
    "a lost tensor": (stored(lambda tensors: tensors.pop("G/layer.0.weight")), "lacks 'G/layer.0.weight'"),
    "NaN": (stored(lambda tensors: tensors["B/layer.1.weight"].fill_(float("nan"))), "not finite"),
    "another type": (stored(lambda tensors: tensors.update({"A/layer.0.weight": torch.zeros(4, 2).half()})), "float32"),
    "another shape": (stored(lambda tensors: tensors.update({"G/layer.0.weight": torch.zeros(3, 2, 2)})), r"\[2, 2, 2\]"),
    "a number": (stored(lambda tensors: tensors.update({"A/layer.0.weight": torch.tensor(1.0)})), "float32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    """Whatever is changed in a folder, loading it is a RecipeError that says what is wrong."""
    make().save(tmp_path / "set")
    change, message = DAMAGES[damage]
    change(tmp_path / "set")
    with pytest.raises(RecipeError, match=message):
        LearnedSet.load(tmp_path / "set")
