"""Evolver on models whose scores are known in closed form: decisions, budgets, references and what it hands on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mergeopt as mo
from mergeopt.errors import ConfigError
from mergeopt.lineage import Lineage, Step
from mergeopt.task import ObjectiveInfo
from mergeopt_strategies.fitness import Fitness
from tests.tiny_models import Grid

SHAPES: Mapping[str, Sequence[int]] = {"w": (9,), "v": (3, 5)}
Weights = dict[str, npt.NDArray[np.float64]]
Make = Callable[..., mo.MergeProblem]
WORD = 2**32


def build() -> Grid:
    return Grid(SHAPES)


def optimum(name: str, which: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng([which, len(name), ord(name)]).normal(size=SHAPES[name])


def quality(model: torch.nn.Module, items: object, device: torch.device, which: int = 0) -> float:
    """F(w) = -sum_j a_j (w_j - w*_j)^2 with a_j = 1 + (j mod 3), in float64."""
    return score({name: p.detach().double().numpy() for name, p in model.named_parameters()}, which)


def score(weights: Mapping[str, npt.NDArray[np.float64]], which: int = 0) -> float:
    total = 0.0
    for name, w in weights.items():
        a = 1.0 + (np.arange(w.size) % 3).reshape(w.shape)
        total -= float((a * (w - optimum(name, which)) ** 2).sum())
    return total


def second(model: torch.nn.Module, items: object, device: torch.device) -> float:
    return quality(model, items, device, which=1)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a problem over K modules with weights on a grid of sixteenths."""

    def problem(experts: int = 3, functions: Sequence[Any] = (quality,), operator: str = "linear", **options: Any) -> mo.MergeProblem:
        files = []
        for k in range(experts + 1):
            rng = np.random.default_rng(k)
            state = {name: torch.from_numpy(rng.integers(-32, 33, size=shape) / 16.0).float() for name, shape in SHAPES.items()}
            save_file(state, tmp_path / f"m{k}.safetensors")
            files.append(tmp_path / f"m{k}.safetensors")
        objectives = [mo.FunctionObjective(f.__name__, f, items=None, direction="maximize") for f in functions]
        pool = mo.Pool(files[0], {f"m{k}": files[k] for k in range(1, experts + 1)}, module=build)
        return mo.MergeProblem(pool, operator, objectives, device="cpu", **options)

    return problem


def hashed(seed: int, name: str, count: int) -> npt.NDArray[np.float64]:
    """The crossover's hash, written down in Python's integers: uniform numbers in [0, 1) by flat index."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + bytes(8) + name.encode(), digest_size=8, person=b"parameter").digest()
    key0, key1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % WORD
        x = (x ^ (x >> 15)) * 0x846CA68B % WORD
        return x ^ (x >> 16)

    return np.array([mix((mix(index ^ key0) + key1) % WORD) / WORD for index in range(count)])


def offspring(members: Mapping[tuple[int, int], Weights], step: Step, parent: Weights) -> Weights:
    """The published code's operator, per parameter, in float64."""
    reference = members[step.references[0]]
    child = {}
    for name, p in parent.items():
        taken = (hashed(step.seed, name, p.size) < step.rate).reshape(p.shape)
        child[name] = np.where(taken, p + step.scale * (reference[name] - p), p)
    return child


def replayed(problem: mo.MergeProblem, lineage: Lineage | None) -> list[Weights]:
    """Return the newest version of every member, remade independently from the experts' files."""
    files = [load_file(expert.path) for expert in problem.pool.experts.values()]
    known = {(k, 0): {name: t.double().numpy() for name, t in file.items()} for k, file in enumerate(files)}
    newest = [0] * len(files)
    for step in lineage.steps if lineage else ():
        child = offspring(known, step, known[step.slot, newest[step.slot]])
        newest[step.slot] += 1
        known[step.slot, newest[step.slot]] = child
    return [known[slot, version] for slot, version in enumerate(newest)]


def asked(run: mo.Run) -> list[Any]:
    return [trial for trial in run.trials if trial.kind == "asked"]


def test_every_merge_scores_what_the_formula_says_and_stays_when_it_is_better(make: Make, tmp_path: Path) -> None:
    """Of the mean of evolved members: each trial's score is the closed form, each decision follows from the scores, 1 + N T are made."""
    problem, generations = make(3), 4
    run = mo.optimize(problem, {"name": "evolver-joint", "generations": generations}, budget=100, seed=3, out=tmp_path / "run")
    trials = asked(run)
    assert len(trials) == 1 + 3 * generations
    kept, best = 0, -np.inf
    for trial in trials:
        lineage = trial.recipe.lineage
        members = replayed(problem, lineage)
        mean = {name: np.mean([member[name] for member in members], axis=0) for name in SHAPES}
        assert trial.values()["quality"] == pytest.approx(score(mean), rel=1e-6)
        assert (len(lineage.steps) if lineage else 0) in (kept, kept + 1)
        if trial.values()["quality"] > best:
            best, kept = trial.values()["quality"], len(lineage.steps) if lineage else 0
    turns = [trial.recipe.lineage.steps[-1].slot for trial in trials[1:]]
    assert all(sorted(turns[start : start + 3]) == [0, 1, 2] for start in range(0, len(turns), 3))
    assert kept > 0


def test_competing_members_score_what_the_formula_says(make: Make, tmp_path: Path) -> None:
    """Members alone: N (T + 1) evaluations in fixed order, each score the closed form, and a kept score never falls."""
    problem = make(3)
    run = mo.optimize(problem, "evolver", budget=3 * 6, seed=4, out=tmp_path / "run")
    trials = asked(run)
    assert len(trials) == 18
    best = [-np.inf] * 3
    for turn, trial in enumerate(trials):
        slot, recipe = turn % 3, trial.recipe
        assert recipe.arguments["weight"].values["model"] == {f"m{k + 1}": float(k == slot) for k in range(3)}
        value = trial.values()["quality"]
        assert value == pytest.approx(score(replayed(problem, recipe.lineage)[slot]), rel=1e-6)
        if recipe.lineage:
            assert recipe.lineage.steps[-1].slot == slot
        best[slot] = max(best[slot], value)
    final = mo.Run.open(tmp_path / "run").trials[-1].recipe
    assert final is not None
    assert final.lineage is not None


def test_with_full_crossover_children_lie_on_segments(make: Make, tmp_path: Path) -> None:
    """Cr = 1 and f = 0.5: every first child is the midpoint of two experts, so a run of one generation can be listed by hand."""
    problem = make(2)
    run = mo.optimize(problem, {"name": "evolver", "rate": 1.0}, budget=4, seed=0, out=tmp_path / "run")
    first, other = replayed(problem, None)
    middle = {name: (first[name] + other[name]) / 2 for name in SHAPES}
    values = [trial.values()["quality"] for trial in asked(run)]
    ends = [score(first), score(other)]
    assert values[:3] == pytest.approx([*ends, score(middle)])
    kept = middle if score(middle) > ends[0] else first
    assert values[3] == pytest.approx(score({name: (kept[name] + other[name]) / 2 for name in SHAPES}))


def test_any_member_is_exported_bit_for_bit(make: Make, tmp_path: Path) -> None:
    """The last accepted member leaves as a file that holds the float32 replay of its lineage, and its recipe says so."""
    problem = make(3)
    run = mo.optimize(problem, "evolver", budget=24, seed=2, out=tmp_path / "run")
    point = run.point(max(t.number for t in run.trials))
    report = point.export(tmp_path / "model")
    assert report.exact
    assert mo.Recipe.load(tmp_path / "model" / "recipe.json").lineage == point.recipe.lineage  # type: ignore[union-attr]


@pytest.mark.parametrize("mutation", ["rand-diff", "rand/1", "current-to-best"])
@pytest.mark.parametrize("unit", ["tensor", "layer"])
@pytest.mark.parametrize("update", ["steady", "generational"])
def test_other_mutations_and_units_run_and_resume(make: Make, tmp_path: Path, mutation: str, unit: str, update: str) -> None:
    """Each variant refers to distinct members other than the parent, and a run that is extended step by step is the run at once."""
    problem = make(4)
    strategy = {"name": "evolver", "mutation": mutation, "unit": unit, "update": update, "scale": 0.7, "rate": 0.6}
    run = mo.optimize(problem, strategy, budget=12, seed=1, out=tmp_path / "run", batch=3)
    steps = [trial.recipe.lineage.steps[-1] for trial in asked(run) if trial.recipe.lineage]
    assert len(steps) == 8
    for step in steps:
        slots = [slot for slot, _ in step.references]
        if mutation == "current-to-best":
            assert slots[0] != step.slot
            slots = slots[1:]
        assert len({*slots, step.slot}) == len(slots) + 1
    again = mo.optimize(make(4), strategy, budget=12, seed=1, out=tmp_path / "again", batch=8)
    assert [t.key for t in asked(again)] == [t.key for t in asked(run)]


def test_generational_children_are_made_of_the_generation_before(make: Make, tmp_path: Path) -> None:
    """With `update: generational` no child refers to a version that was accepted in its own generation."""
    run = mo.optimize(make(3), {"name": "evolver", "update": "generational"}, budget=18, seed=5, out=tmp_path / "run")
    trials = asked(run)
    best, version = [-np.inf] * 3, [0] * 3
    for start in range(0, 18, 3):
        before = list(version)
        for slot, trial in enumerate(trials[start : start + 3]):
            if trial.recipe.lineage:
                step = trial.recipe.lineage.steps[-1]
                assert step.references[0][1] == before[step.references[0][0]]
            if trial.values()["quality"] > best[slot]:
                best[slot] = trial.values()["quality"]
                version[slot] += start > 0
    assert sum(version) > 0


def test_several_objectives_are_compared_as_asked(make: Make, tmp_path: Path) -> None:
    """`worst` and `nondominated` accept by their own rule; the front of the latter is at least as good in hypervolume as its start."""
    problem = make(3, (quality, second))
    for fitness in ("worst", "nondominated", "mean"):
        for name in ("evolver", "evolver-joint"):
            run = mo.optimize(problem, {"name": name, "fitness": fitness}, budget=15, seed=0, out=tmp_path / f"{name}-{fitness}")
            assert run.evaluations == 15
            assert run.front.hypervolume() is not None


def test_a_member_that_fails_is_never_kept(make: Make, tmp_path: Path) -> None:
    """A child that cannot be scored leaves its parent in place, and the search goes on."""
    calls: list[int] = []

    def moody(model: torch.nn.Module, items: object, device: torch.device) -> float:
        calls.append(1)
        return float("nan") if len(calls) % 3 == 0 else float(len(calls))

    run = mo.optimize(make(2, (moody,)), "evolver-joint", budget=12, seed=0, out=tmp_path / "run")
    trials = asked(run)
    assert sum(not trial.ok for trial in trials) >= 3
    for before, after in pairwise(trials):
        held = len(before.recipe.lineage.steps) if before.recipe.lineage else 0
        now = len(after.recipe.lineage.steps)
        assert now == held + 1 if before.ok else now <= held


@pytest.mark.parametrize(
    ("strategy", "experts", "budget", "message"),
    [
        ("evolver", 1, 10, "two or more experts"),
        ("evolver-joint", 1, 10, "two or more experts"),
        ({"name": "evolver", "mutation": "rand-diff"}, 2, 10, "mixes 3 different members"),
        ({"name": "evolver", "mutation": "rand/1"}, 3, 10, "mixes 4 different members"),
        ("evolver", 3, 5, "need 6 evaluations"),
        ({"name": "evolver", "mutation": "evolve"}, 3, 10, "did you mean 'evolver'"),
        ({"name": "evolver", "unit": "params"}, 3, 10, "unit: unknown"),
        ({"name": "evolver", "rate": 1.5}, 3, 10, "rate: expected a number in"),
        ({"name": "evolver", "scale": True}, 3, 10, "scale: expected a number"),
        ({"name": "evolver", "fitness": "pooled"}, 3, 10, "pooled needs means over items"),
        ({"name": "evolver", "update": "lazy"}, 3, 10, "update: unknown"),
        ({"name": "evolver-joint", "mutation": "current-to-best"}, 3, 10, "judged together"),
        ({"name": "evolver-joint", "generations": 0}, 3, 10, "generations: expected"),
    ],
)
def test_what_cannot_evolve_is_refused(make: Make, tmp_path: Path, strategy: Any, experts: int, budget: int, message: str) -> None:
    """Too few members, a budget too small, and unknown options are refused before anything is written."""
    with pytest.raises(ConfigError, match=message):
        mo.optimize(make(experts), strategy, budget=budget, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_problem_without_models_is_refused(tmp_path: Path) -> None:
    """A strategy that works on weights says so to a problem that makes no models."""
    from tests.study.analytic import Quadratic

    with pytest.raises(ConfigError, match="works on the models themselves"):
        mo.optimize(Quadratic(), "evolver", budget=10, out=tmp_path / "run")


LOSSES = st.lists(st.integers(-3, 3), min_size=2, max_size=2).map(lambda row: np.array(row, dtype=np.float64))


@given(LOSSES, LOSSES, st.lists(LOSSES, max_size=4), st.sampled_from(["mean", "worst", "nondominated"]))
def test_being_better_is_strict(child: Any, parent: Any, others: Any, kind: str) -> None:
    """Nothing is better than its equal, what dominates is better, and no two are better than each other."""
    fitness = Fitness(kind, [ObjectiveInfo("a", "minimize"), ObjectiveInfo("b", "minimize")])
    assert not fitness.better(parent, parent, others)
    assert not (fitness.better(child, parent, others) and fitness.better(parent, child, others))
    if kind == "nondominated" and np.all(child <= parent) and np.any(child < parent):
        assert fitness.better(child, parent, others)
    assert fitness.better(child, None, others)
    assert not fitness.better(None, parent, others)
    assert 0 <= fitness.best([child, parent, None]) < 2


def test_pooled_weighs_by_items() -> None:
    """The pooled fitness of two sets is the mean over all their items."""
    infos = [ObjectiveInfo("a", "minimize", items=900), ObjectiveInfo("b", "minimize", items=100)]
    fitness = Fitness("pooled", infos)
    assert fitness.better(np.array([0.4, 1.0]), np.array([0.5, 0.2]))
    assert not Fitness("mean", infos).better(np.array([0.4, 1.0]), np.array([0.5, 0.2]))
