"""Statistics of experts as files: what is written comes back, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeopt.errors import RecipeError, StoreError
from mergeopt.recipe import Measured, Source
from mergeopt.statistics import ExpertStatistics, Gram, Measurement, find_statistics, open_statistics, write_statistics

EXPERTS = (Source("a", "models/a", "aa"), Source("b", "models/b", "bb"))
SHAPES = {"q": (3, 5), "k": (3, 5), "c": (5, 3), "norm": (3,)}
INFO = {"items": 4, "seed": 0}


def measurements(seed: int = 0) -> Iterator[Measurement]:
    """Two experts of four tensors; two weights have the same inputs, one is stored inputs first, one is no weight."""
    generator = torch.Generator().manual_seed(seed)
    places = {"q": Gram("q", 1), "k": Gram("q", 1), "c": Gram("c", 0)}
    for expert in range(2):
        yield Measurement("fisher", expert, {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()})
        yield Measurement("gram", expert, {name: torch.rand((5, 5), generator=generator) for name in ("q", "c")}, places)


def written(parent: Path, seed: int = 0, **info: Any) -> ExpertStatistics:
    return write_statistics(parent, EXPERTS, ("fisher", "gram"), measurements(seed), {**INFO, **info})


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    """Tensors come back bit for bit, stacked over experts, with norms over the whole model and the axes of inputs; no file is left over."""
    found = written(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [found.hash[:32]]
    made = list(measurements())
    for name in SHAPES:
        own = found.of(name)
        assert own.fisher is not None
        assert torch.equal(own.fisher, torch.stack([made[0].tensors[name], made[2].tensors[name]]))
        assert own.norms is not None
        for place in (0, 1):
            whole = torch.cat([tensor.reshape(-1) for tensor in made[2 * place].tensors.values()])
            assert float(own.norms[place]) == pytest.approx(float(whole.norm()), rel=1e-6)
    query, key, stored = found.of("q"), found.of("k"), found.of("c")
    assert query.gram is key.gram
    assert query.gram is not None
    assert stored.gram is not None
    assert torch.equal(query.gram, torch.stack([made[1].tensors["q"], made[3].tensors["q"]]))
    assert (query.inputs, stored.inputs) == (1, 0)
    assert found.of("norm").gram is None
    assert found.of("another").fisher is None


def test_the_hash_is_of_the_contents(tmp_path: Path) -> None:
    """The same numbers have the same hash wherever they lie and however they were measured; others have another."""
    first = written(tmp_path / "one")
    assert written(tmp_path / "two", items=9).hash == first.hash
    assert written(tmp_path / "one").folder == first.folder
    assert written(tmp_path / "one", seed=1).hash != first.hash


def test_they_are_found_by_how_they_were_measured(tmp_path: Path) -> None:
    """A folder gives the statistics that were measured as asked, and none where there are none; what is half written does not count."""
    first, second = written(tmp_path, 0, items=1), written(tmp_path, 1, items=2)
    for found, items in ((first, 1), (second, 2)):
        again = find_statistics(tmp_path, {**INFO, "items": items})
        assert again is not None
        assert again.hash == found.hash
    assert find_statistics(tmp_path, {**INFO, "items": 3}) is None
    assert find_statistics(tmp_path / "nowhere", INFO) is None
    first.folder.rename(tmp_path / ".partial-0")
    assert find_statistics(tmp_path, {**INFO, "items": 1}) is None


def test_what_is_damaged_is_passed_over_where_it_can_be_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged statistics are refused, or passed over with a warning; written again, they are whole in the same place."""
    first, other = written(tmp_path, 0, items=1), written(tmp_path, 1, items=2)
    (first.folder / "fisher-0.safetensors").write_bytes(b"cut")
    with pytest.raises(RecipeError, match="no whole safetensors file"):
        find_statistics(tmp_path, {**INFO, "items": 1})
    assert find_statistics(tmp_path, {**INFO, "items": 1}, pass_over=True) is None
    assert "no whole safetensors file" in caplog.text
    (other.folder / "statistics.json").write_text("{")
    assert written(tmp_path, 0, items=1).folder == first.folder
    again = find_statistics(tmp_path, {**INFO, "items": 1}, pass_over=True)
    assert again is not None
    assert again.hash == first.hash


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """Where measuring fails in the middle, and where the folder cannot be written, nothing is left behind."""

    def broken() -> Iterator[Measurement]:
        yield next(iter(measurements()))
        raise RuntimeError("the card is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_statistics(tmp_path, EXPERTS, ("fisher",), broken(), INFO)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write statistics to"):
        written(tmp_path / "file")


def test_a_recipe_gets_its_own(tmp_path: Path) -> None:
    """Statistics of another hash, of other experts or of tensors of another shape are refused; the right ones open."""
    found = written(tmp_path)
    measured = Measured(str(found.folder), found.hash)
    assert open_statistics(measured, EXPERTS, SHAPES).hash == found.hash
    with pytest.raises(RecipeError, match=r"does not hold the statistics this recipe was made with: .* --map statistics=PATH"):
        open_statistics(Measured(measured.path, "0" * 64), EXPERTS, SHAPES)
    written(tmp_path, 1)
    assert open_statistics(Measured(str(tmp_path), found.hash), EXPERTS, SHAPES).folder == found.folder
    with pytest.raises(
        RecipeError, match=r"--map statistics=PATH, where PATH is their folder, called after their content hash, or the one"
    ):
        open_statistics(Measured(str(tmp_path), "0" * 64), EXPERTS, SHAPES)
    with pytest.raises(RecipeError, match="statistics of other experts than b, a"):
        open_statistics(measured, EXPERTS[::-1], SHAPES)
    for name, shape in (("q", (5, 3)), ("norm", (4,)), ("c", (5, 3, 1))):
        with pytest.raises(RecipeError, match=rf"-0.safetensors: {name}: expected a tensor of shape"):
            open_statistics(measured, EXPERTS, {**SHAPES, name: shape})


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "statistics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def turn(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    save_file({key: change(tensor) for key, tensor in tensors.items()}, folder / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "statistics.json").unlink(), "cannot read the statistics"),
        (lambda folder: (folder / "statistics.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "statistics.json").write_text("[]"), "expected statistics of format 1, got 'list'"),
        (lambda folder: rewrite(folder, format=2), "expected statistics of format 1, got 2"),
        (lambda folder: rewrite(folder, kinds=["hessian"]), "unknown kind 'hessian'"),
        (lambda folder: rewrite(folder, norms=[1.0]), "a finite norm and the places of Gram matrices for every expert"),
        (lambda folder: rewrite(folder, norms=[1.0, 2.0]), "its contents are not those of its content hash"),
        (lambda folder: rewrite(folder, grams=[{"q": ["p", 1]}, {}]), "gram-0.safetensors lacks p"),
        (lambda folder: rewrite(folder, experts=5), "damaged statistics"),
        (lambda folder: (folder / "gram-1.safetensors").unlink(), "damaged statistics"),
        (lambda folder: (folder / "fisher-0.safetensors").write_bytes(b"no tensors"), "no whole safetensors file"),
        (lambda folder: turn(folder, "fisher-1.safetensors", lambda t: t + 1), "its contents are not those of its content hash"),
        (lambda folder: turn(folder, "gram-0.safetensors", lambda t: t.double()), "gram-0.safetensors is not float32"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """A file that is missing, cut, changed or of another kind is refused, and the message says what is wrong."""
    folder = written(tmp_path).folder
    damage(folder)
    with pytest.raises(RecipeError, match=message):
        ExpertStatistics(folder)


@pytest.mark.parametrize(("value", "message"), [(-1.0, "of norm is negative in places"), (float("nan"), "numbers that are not finite")])
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, value: float, message: str) -> None:
    """Statistics with a true hash but impossible numbers are refused when they are read."""
    bad = [Measurement("fisher", place, {"norm": torch.tensor([value, 1.0, 1.0])}) for place in (0, 1)]
    if value != value:
        bad = [Measurement("gram", place, {"q": torch.full((5, 5), value)}, {"q": Gram("q", 1)}) for place in (0, 1)]
    found = write_statistics(tmp_path, EXPERTS, (bad[0].kind,), bad, INFO)
    with pytest.raises(RecipeError, match=message):
        found.of("norm" if bad[0].kind == "fisher" else "q")
