from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.errors import RecipeError
from mergeopt.evaluation import population as module
from mergeopt.evaluation.compiled import How
from mergeopt.evaluation.offspring import replay
from mergeopt.evaluation.population import Population
from mergeopt.lineage import Lineage, Step
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from tests.lineages import MEMBERS, random_lineage, random_step
from tests.tiny_models import tiny_vit, write_folders

CPU = torch.device("cpu")
PADDING = 7.0


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Three experts of a tiny ViT whose heads are excluded."""
    return Layout(Pool(*write_folders(tiny_vit, tmp_path_factory.mktemp("members"), experts=3), exclude=("classifier",)))


@pytest.fixture
def reads(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors read from the experts' files, as they are read."""
    names: list[str] = []
    stack = layout.pool.stack

    def note(name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        names.append(name)
        return stack(name, device)

    monkeypatch.setattr(layout.pool, "stack", note)
    return names


def members(layout: Layout, how: How = "auto") -> Population:
    """Make a population in the last rows of a larger buffer."""
    buffer = torch.full((1 + len(MEMBERS), layout.size), PADDING)
    return Population(layout, buffer[1:], CPU, how=how)


def expected(layout: Layout, lineage: Lineage) -> torch.Tensor:
    """Replay a lineage from the experts, tensor by tensor, between tensors nothing."""
    rows = torch.full((len(MEMBERS), layout.size), PADDING)
    for s in layout.segments:
        stack = Pool.stack(layout.pool, s.name)
        rows[:, s.start : s.end] = replay(lineage, stack.view(len(stack), -1), name=s.name, layer=s.layer, how="eager")
    return rows


def follow(population: Population, lineage: Lineage) -> tuple[int, ...]:
    """Hold a lineage; check the rows to the bit, and that the slots returned are those that changed."""
    before = population.rows.clone()
    changed = population.hold(lineage)
    assert torch.equal(population.rows.view(torch.int32), expected(population.layout, lineage).view(torch.int32))
    moved = [slot for slot in range(len(MEMBERS)) if not torch.equal(before[slot], population.rows[slot])]
    assert set(moved) <= set(changed)
    return changed


def child(lineage: Lineage, slot: int, seed: int, **rest: Any) -> Lineage:
    """Return the lineage with a child that surely differs from its parent."""
    return lineage.child(
        random_step(lineage, np.random.default_rng(seed), newest=True, slot=slot, scale=0.6, rate=0.5, unit="parameter", **rest)
    )


def test_it_begins_as_the_experts(layout: Layout) -> None:
    """Rows are the experts' stored tensors, excluded ones are not among them, and the rows are written in their place."""
    population = members(layout)
    assert not any("classifier" in s.name for s in layout.segments)
    assert torch.equal(population.rows, expected(layout, Lineage(MEMBERS)))
    for k, name in enumerate(MEMBERS):
        for s in layout.segments:
            assert torch.equal(population.rows[k, s.start : s.end].view(s.shape), layout.pool.experts[name].read(s.name))
    base = population.rows._base
    assert base is not None
    assert bool((base[0] == PADDING).all())
    assert follow(population, Lineage(MEMBERS)) == ()
    assert population.bytes == 4 * 4 * layout.size


@pytest.mark.parametrize("seed", range(4))
def test_accepting_and_rejecting_needs_no_file(layout: Layout, reads: list[str], seed: int) -> None:
    """Through 25 children, kept or dropped at random, rows are what a replay gives to the bit, and the experts are read once."""
    population = members(layout)
    assert len(reads) == len(layout.segments)
    rng = np.random.default_rng(seed)
    state = held = Lineage(MEMBERS)
    for _ in range(25):
        candidate = state.child(random_step(state, rng, newest=True))
        changed = follow(population, candidate)
        slots = {lineage.steps[-1].slot for lineage in (held, candidate) if lineage.steps}
        assert {candidate.steps[-1].slot} <= set(changed) <= slots
        held = candidate
        if rng.random() < 0.4:
            state = candidate
    follow(population, state)
    assert len(reads) == len(layout.segments)


def test_siblings_and_return(layout: Layout, reads: list[str]) -> None:
    """Another child of the same parent, the parent, and the first child again are all made in place."""
    population = members(layout)
    reads.clear()
    state = child(Lineage(MEMBERS), 1, 0)
    first, second = child(state, 1, 1), child(state, 1, 2)
    for lineage in (state, first, second, state, second, first, state):
        assert follow(population, lineage) == (1,)
    assert not reads


def test_a_replaced_version_as_reference(layout: Layout) -> None:
    """A reference to the version just replaced, of another member or of the same, is found though only the spare or the files have it."""
    population = members(layout)
    grown = child(Lineage(MEMBERS), 0, 0)
    follow(population, grown)
    assert follow(population, grown.child(Step(0, ((0, 0), (1, 0)), 0.6, 0.5, 3, mutation="rand-diff"))) == (0,)
    assert follow(population, grown.child(Step(1, ((0, 0),), 0.6, 0.5, 3))) == (0, 1)


@pytest.mark.parametrize("how", ["auto", "eager"])
def test_any_sequence_of_lineages(layout: Layout, how: How) -> None:
    """Unrelated lineages, with references to versions long replaced, and steps of several members at once are all held to the bit."""
    population = members(layout, how)
    rng = np.random.default_rng(0)
    lineage = Lineage(MEMBERS)
    for turn in range(25):
        if turn % 3 == 0:
            lineage = random_lineage(rng, int(rng.integers(0, 8)))
        for _ in range(int(rng.integers(0, 4))):
            lineage = lineage.child(random_step(lineage, rng))
        if turn % 5 == 0:
            lineage = lineage.ancestors((int(rng.integers(3)),))
        follow(population, lineage)


def test_a_generation_at_once(layout: Layout) -> None:
    """All members replaced by children of the old generation, by way of each child alone, are what a replay gives."""
    population = members(layout)
    old = Lineage(MEMBERS)
    steps = [Step(slot, (((slot + 1) % 3, 0),), 0.6, 0.5, slot) for slot in range(3)]
    for step in steps:
        follow(population, old.child(step))
    new = Lineage(MEMBERS, tuple(steps))
    follow(population, new)
    assert follow(population, new) == ()


def test_steps_are_followed_in_their_order(layout: Layout, reads: list[str]) -> None:
    """Two new steps, the second of which refers to what the first makes, are both made in place."""
    population = members(layout)
    reads.clear()
    first = Step(2, ((1, 0),), 0.6, 0.5, 1)
    assert follow(population, Lineage(MEMBERS, (first, Step(0, ((2, 1),), 0.6, 0.5, 2)))) == (0, 2)
    assert not reads


def test_one_member_alone(layout: Layout, reads: list[str]) -> None:
    """With lineages that tell of one member only what it needs, its row is right; while children are kept, no file is read."""
    population = members(layout)
    reads.clear()
    state = Lineage(MEMBERS)
    for seed in range(15):
        slot = seed % 3
        candidate = child(state, slot, seed, mutation="evolver")
        alone = candidate.ancestors((slot,))
        assert slot in population.hold(alone, (slot,))
        assert torch.equal(population.rows[slot], expected(layout, alone)[slot])
        if seed < 6:
            assert not reads
            state = candidate
    follow(population, state.ancestors((0,)))


def test_load_starts_again(layout: Layout) -> None:
    """Rows that somebody else wrote into are the experts again after `load`."""
    population = members(layout)
    lineage = child(Lineage(MEMBERS), 2, 0)
    follow(population, lineage)
    for s in layout.segments:
        population.rows[:, s.start : s.end] = 0.0
    population.load()
    assert torch.equal(population.rows, expected(layout, Lineage(MEMBERS)))
    assert follow(population, lineage) == (2,)


@pytest.mark.parametrize(
    ("work", "far", "after"),
    [("mutate", False, 0), ("mutate", False, 5), ("replay", True, 0), ("replay", True, 5), ("copy_", False, 0), ("copy_", False, 1)],
)
def test_interrupted_anywhere(layout: Layout, monkeypatch: pytest.MonkeyPatch, work: str, far: bool, after: int) -> None:
    """Interrupted amid a child, a rebuild or a copy, the next hold makes the rows right and names every slot that had changed."""
    held = child(child(Lineage(MEMBERS), 0, 0), 2, 1)
    target = child(child(held, 0, 2), 0, 3) if far else child(held.ancestors((0,)), 1, 4)
    differing = tuple(slot for slot in range(3) if target.version(slot) != held.version(slot))
    for then in (target, held):
        population = members(layout)
        population.hold(held)
        owner: Any = torch.Tensor if work == "copy_" else module
        with monkeypatch.context() as patch:
            patch.setattr(owner, work, stopping(getattr(owner, work), after))
            with pytest.raises(KeyboardInterrupt):
                population.hold(target)
        assert population.hold(then) == (differing if then is target else ())
        assert torch.equal(population.rows, expected(layout, then))
        assert population.hold(held) == (differing if then is target else ())
        assert torch.equal(population.rows, expected(layout, held))
        assert follow(population, target) == differing


def stopping(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Work so many times, and once more before an interruption is noticed."""
    times = iter(range(after))

    def run(*args: Any, **options: Any) -> Any:
        done = function(*args, **options)
        if next(times, None) is None:
            raise KeyboardInterrupt
        return done

    return run


def test_other_members_are_refused(layout: Layout) -> None:
    """A lineage of other experts, or of the same in another order, is no lineage of this population."""
    population = members(layout)
    for names in (MEMBERS[::-1], MEMBERS[:2]):
        with pytest.raises(RecipeError, match="expected a lineage of e0, e1, e2, got one of e"):
            population.hold(Lineage(names))
    with pytest.raises(ValueError, match="expected rows of shape"):
        Population(layout, torch.zeros(2, layout.size), CPU)
    with pytest.raises(ValueError, match="float32"):
        Population(layout, torch.zeros(3, layout.size, dtype=torch.float64), CPU)
