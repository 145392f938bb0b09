"""Pareto-set learning: fronts that are known, through real merge problems; determinism, resuming, warnings and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergeopt_strategies.pareto_set as pareto_set
from mergeopt.errors import ConfigError, StoreError
from mergeopt.learned import LearnedSet
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Learner
from mergeopt.study.optimize import opened, optimize
from mergeopt_problems.digits import digits
from mergeopt_strategies.coverage import coverage_warning, largest_gap, misplaced_share
from mergeopt_strategies.pareto_set import ParetoSet
from mergeopt_strategies.ranges import Ranges
from tests.strategies.toy_fronts import (
    NAME,
    Toy,
    anisotropic,
    concave,
    hypervolume_ratio,
    inverted_distance,
    isotropic,
    learn,
    share_nondominated,
    simplex,
)

FAST: dict[str, Any] = {"loss": "own", "learning_rate": 3e-2}
POINTS = 101


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Two isotropic bowls whose anchors need rank 4 together."""
    return isotropic(tmp_path_factory.mktemp("flat"))


@pytest.fixture(scope="module")
def bulging(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The concave front of VLMOP2."""
    return concave(tmp_path_factory.mktemp("bulging"))


def measures(toy: Toy, steps: int, points: int = POINTS, **options: Any) -> tuple[float, float, float, tuple[str, ...]]:
    """Learn, and return IGD, hypervolume ratio, share of non-dominated answers, and warnings."""
    preferences, found, warnings = learn(toy, steps, points, **options)
    true = toy.front(preferences)
    return inverted_distance(found, true), hypervolume_ratio(found, true), share_nondominated(found), warnings


def ready(toy: Toy, steps: int, *, seed: int = 0, points: int = 5, **options: Any) -> ParetoSet:
    """Return a strategy that is set up."""
    strategy = ParetoSet(points=points, **options)
    strategy.setup(opened(toy.problem, strategy, None), seed=seed, budget=Budget(points, steps), batch=points)
    return strategy


def finish(strategy: ParetoSet) -> tuple[str, ...]:
    """Learn to the end; return the keys of the recipes that are proposed, which hold the learned set's content hash."""
    while (answer := strategy.ask()).state is AskState.LEARNING:
        pass
    return tuple(candidate.recipe.key for candidate in answer.candidates if candidate.recipe is not None)


def test_isotropic_bowls_are_learned(flat: Toy) -> None:
    """From nothing, gradient steps cover the hull of two anchors: IGD <= 0.006, hypervolume >= 0.995 of the true front, all kept."""
    igd, volume, share, warnings = measures(flat, 600, start="zero", **FAST)
    assert igd <= 0.006
    assert volume >= 0.995
    assert share == 1.0
    assert warnings == ()


def test_isotropic_bowls_need_no_training(flat: Toy, tmp_path: Path) -> None:
    """The closed form alone is the exact front, and its record says that there was no gradient step."""
    igd, volume, _, _ = measures(flat, 0, loss="distance")
    assert igd <= 1e-3
    assert volume >= 0.999
    run = optimize(flat.problem, ParetoSet(points=3, loss="distance"), budget=Budget(3, 0), out=tmp_path / "run")
    kept = run.trials[0].recipe
    assert kept is not None
    assert kept.learned is not None
    assert LearnedSet.load(kept.learned.path).info["how"] == "closed form (HOOI), no gradient steps"


@pytest.mark.parametrize(("objectives", "rank"), [(2, 2), (3, 2)])
def test_below_the_needed_rank_training_ends_at_the_closed_form(tmp_path: Path, objectives: int, rank: int) -> None:
    """Where the rank is too small, gradient steps reach the closed form's front: IGD to 1e-3, hypervolume to 1 %."""
    toy = isotropic(tmp_path, objectives=objectives)
    closed = measures(toy, 0, 55, loss="distance", rank=rank)
    trained = measures(toy, 900, 55, start="zero", rank=rank, normalise=False, **FAST)
    assert closed[1] < 0.99
    assert abs(trained[0] - closed[0]) <= 1e-3
    assert abs(trained[1] - closed[1]) <= 0.01 * closed[1]


def test_three_objectives(tmp_path: Path) -> None:
    """Learned from nothing, the answers to a lattice of 105 preferences are as near to a dense true front as exact ones, to 5 %."""
    toy = isotropic(tmp_path, objectives=3)
    dense = toy.front(simplex(3, 30))
    preferences, found, _ = learn(toy, 1000, 105, start="zero", rank=6, normalise=False, **FAST)
    exact = toy.front(preferences)
    assert inverted_distance(found, dense) <= 1.05 * inverted_distance(exact, dense)
    assert hypervolume_ratio(found, dense) >= 0.995 * hypervolume_ratio(exact, dense)


@pytest.mark.parametrize(("condition", "linear", "extended"), [(10.0, 0.98, 0.995), (100.0, 0.97, 0.99)])
def test_curved_pareto_sets(tmp_path: Path, condition: float, linear: float, extended: float) -> None:
    """On anisotropic bowls linear features beat a soup, and an mlp of the preference comes nearer still."""
    toy = anisotropic(tmp_path, condition=condition)
    preferences = simplex(2, POINTS - 1)
    soup = hypervolume_ratio(toy.soup(preferences), toy.front(preferences))
    steps = 1200 if condition > 50 else 600
    _, plain, _, quiet = measures(toy, steps, rank=5, **FAST)
    _, curved, _, silent = measures(toy, steps, rank=5, phi="mlp", **FAST)
    assert plain >= linear
    assert curved >= extended
    assert soup < plain < curved
    assert quiet == silent == ()


def test_smooth_chebyshev_reaches_into_a_bulging_front(bulging: Toy) -> None:
    """On a concave front stch covers everything: IGD <= 0.006, hypervolume >= 0.985, 98 % non-dominated, without a warning."""
    igd, volume, share, warnings = measures(bulging, 600, scalarizer="stch", start="zero", rank=4, **FAST)
    assert igd <= 0.006
    assert volume >= 0.985
    assert share >= 0.98
    assert warnings == ()


def test_linear_scalarization_of_a_bulging_front_fails_and_says_so(bulging: Toy) -> None:
    """With an mlp of the preference it falls to the ends: it misses every mark that stch meets, and a warning names the cure."""
    igd, volume, share, warnings = measures(bulging, 1200, phi="mlp", rank=4, **FAST)
    assert igd > 0.006
    assert volume < 0.985
    assert share < 0.98
    assert len(warnings) == 1
    assert "scalarizer: stch" in warnings[0]


def test_one_seed_gives_one_set(flat: Toy) -> None:
    """The same seed gives the same recipes to the last bit, however learning is cut into asks; another seed gives others."""
    options = {**FAST, "phi": "mlp", "scalarizer": "stch", "preferences_per_step": 2}
    whole = finish(ready(flat, 41, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pareto_set, "SLICE", 0.0)
        strategy = ready(flat, 41, **options)
        asks = [strategy.ask() for _ in range(21)]
    assert [ask.gradient_steps for ask in asks] == [2] * 20 + [1]
    assert finish(strategy) == whole
    assert finish(ready(flat, 41, seed=1, **options)) != whole


def test_a_state_leads_on(flat: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back to any step, a new strategy ends at the very bits of one that was not stopped."""
    options = {**FAST, "scalarizer": "stch", "phi": "mlp"}
    whole = finish(ready(flat, 30, **options))
    monkeypatch.setattr(pareto_set, "SLICE", 0.0)
    strategy: Learner = ready(flat, 30, **options)
    for step in range(1, 31):
        assert strategy.ask().state is AskState.LEARNING
        if step in (1, 17, 30):
            state = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in strategy.state().items()}
            strategy = ready(flat, 30, **options)
            strategy.load_state(state)
    assert isinstance(strategy, ParetoSet)
    assert finish(strategy) == whole


def test_a_strange_state_is_refused(flat: Toy) -> None:
    """A state of another strategy, of another rank, or with a part missing is a StoreError."""
    strategy = ready(flat, 5, **FAST)
    strategy.ask()
    state = dict(strategy.state())
    lacking = {key: value for key, value in state.items() if key != "batches"}
    for strange, options in ((state | {"strategy": "adamerging"}, {}), (lacking, {}), (state, {"rank": 2})):
        with pytest.raises(StoreError, match="not one of this search"):
            ready(flat, 5, **FAST, **options).load_state(strange)


def test_a_run_keeps_what_its_recipes_need(flat: Toy, tmp_path: Path) -> None:
    """Through a run every proposal is scored, and each recipe's folder holds the set whose delta makes the scored model."""
    run = optimize(flat.problem, ParetoSet(points=5, **FAST), budget=Budget(5, 20), out=tmp_path / "run", seed=3)
    assert run.status == "finished"
    assert len(run.trials) == 5
    for trial in run.trials:
        recipe = trial.recipe
        assert recipe is not None
        assert recipe.learned is not None
        learned = LearnedSet.load(recipe.learned.path)
        assert (learned.hash, learned.info["gradient_steps"], learned.info["seed"]) == (recipe.learned.hash, 20, 3)
        plain = flat.problem.evaluator.model(replace(recipe, learned=None)).state_dict()[NAME].clone()
        made = plain + learned.delta(NAME, learned.check_preference(recipe.learned.preference))
        scores = [trial.scores["search"][f"f{k}"].value for k in range(2)]
        np.testing.assert_array_equal(flat.values([made])[0], scores)


def test_paper_preset(flat: Toy) -> None:
    """The paper's preset starts at weights 0.3 without a correction, and its data-free targets make task arithmetic the equal answer."""
    strategy = ready(flat, 1, preset="paper", loss="distance", points=3, learning_rate=1e-9)
    strategy.ask()
    answers = [candidate.recipe for candidate in strategy.ask().candidates if candidate.recipe is not None]
    weights = [flat.problem.evaluator.model(recipe).state_dict()[NAME].clone() for recipe in answers]
    experts = flat.problem.pool.stack(NAME)
    for weight in weights:
        torch.testing.assert_close(weight, 0.3 * experts.sum(dim=0), rtol=0, atol=1e-6)
    closed = ready(flat, 0, preset="paper", loss="distance", scalarizer="linear", start="hooi", points=3)
    middle = closed.ask().candidates[1].recipe
    assert middle is not None
    torch.testing.assert_close(flat.problem.evaluator.model(middle).state_dict()[NAME], 0.3 * experts.sum(dim=0), rtol=0, atol=1e-5)


def test_coefficients_learn_at_their_rate(flat: Toy) -> None:
    """With coefficient_rate 0 the merge keeps its weights; with a rate they move toward the optimum, and stop at zero."""
    for rate, expected in ((0.0, 3.0), (0.1, 2.9), (5.0, 0.0)):
        strategy = ready(flat, 1, coefficient_rate=rate, weight=3.0, points=1, start="zero", **FAST)
        strategy.ask()
        recipe = strategy.ask().candidates[0].recipe
        assert recipe is not None
        assert list(recipe.arguments["weight"].values["model"].values()) == pytest.approx([expected, expected], abs=1e-6)


def test_proposals_come_as_asked(flat: Toy) -> None:
    """At most n at a time and at most as many as the budget evaluates, with their preferences, then DONE."""
    strategy = ParetoSet(points=20, **FAST)
    strategy.setup(opened(flat.problem, strategy, None), seed=0, budget=Budget(5, 1), batch=8)
    answers: list[Ask] = [strategy.ask(2) for _ in range(5)]
    assert [len(answer.candidates) for answer in answers] == [0, 2, 2, 1, 0]
    assert [answer.state for answer in answers] == [AskState.LEARNING, *[AskState.READY] * 3, AskState.DONE]
    shares = [candidate.meta["preference"][0] for answer in answers for candidate in answer.candidates]
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.fixture(scope="module")
def two_digits(cache_dir: Path) -> MergeProblem:
    """Two contradictory views of the digits."""
    materials = digits(tasks=("upright", "turned"))
    return MergeProblem(Pool(materials.base, materials.experts), "task_arithmetic", materials.objectives, device="cpu", groups="layer")


def digits_scores(problem: MergeProblem, **options: Any) -> tuple[list[list[float]], tuple[str, ...]]:
    """Learn on the digits for 60 steps; return the accuracies of the answers to one-hot and equal preferences, and warnings."""
    strategy = ParetoSet(points=3, **options)
    strategy.setup(opened(problem, strategy, None), seed=0, budget=Budget(3, 60), batch=3)
    warnings: tuple[str, ...] = ()
    while (answer := strategy.ask()).state is AskState.LEARNING:
        warnings += answer.warnings
    outcomes = problem.evaluator.evaluate([c.recipe for c in answer.candidates if c.recipe is not None], "search")
    return [[score.value for score in outcome.scores.values()] for outcome in outcomes], warnings + answer.warnings


def test_entropy_collapses_and_says_so(two_digits: MergeProblem) -> None:
    """At a high rate entropy makes one class of everything, with a warning for it; cross-entropy learns and is silent."""
    collapsed, warnings = digits_scores(two_digits, preset="paper", learning_rate=3e-2)
    assert np.max(collapsed) < 0.3
    assert warnings
    assert all("collapsed" in warning and "loss: kl or cross_entropy" in warning for warning in warnings)
    learned, quiet = digits_scores(two_digits, loss="cross_entropy", learning_rate=1e-2, rank=4)
    assert np.mean(learned[1]) > 0.88
    assert quiet == ()


def refused(
    toy: Toy, message: str, budget: Budget | None = None, change: Callable[[ProblemInfo], ProblemInfo] = lambda p: p, **options: Any
) -> None:
    """Expect a ConfigError at set-up."""
    strategy = ParetoSet(**options)
    problem = change(opened(toy.problem, strategy, None))
    with pytest.raises(ConfigError, match=message):
        strategy.setup(problem, seed=0, budget=budget or Budget(5, 5), batch=5)


def test_what_cannot_be_learned_is_refused(flat: Toy) -> None:
    """A budget without gradient steps, no gradients, one objective, no matrix, a loss nobody gives: a ConfigError that says what to do."""
    refused(flat, r"gradient_steps: 300", Budget(5))
    refused(flat, "without gradient steps it can only start from the experts", Budget(5, 0))
    refused(flat, "has no gradients", change=lambda problem: replace(problem, gradients=None))
    refused(flat, "2 or more objectives, got 1", change=lambda problem: replace(problem, objectives=problem.objectives[:1]))
    refused(flat, r"targets: 'nowhere' .* layer.weight", targets="nowhere")
    refused(flat, "'f0' cannot give the loss 'kl'; it can give own, distance", loss="kl")
    refused(flat, "did you mean 'distance'", loss="distanc")
    refused(flat, "loss: unknown objective 'f7'", loss={"f7": "own"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "papr"}, "did you mean 'paper'"),
        ({"scalarizer": "tche"}, "unknown scalarizer 'tche'"),
        ({"phi": "cubic"}, "unknown phi 'cubic'"),
        ({"start": "random"}, "unknown start 'random'"),
        ({"rank": 0}, "'rank' to be a whole number >= 1, got 0"),
        ({"rank": True}, "'rank' to be a whole number"),
        ({"learning_rate": 0}, "'learning_rate' to be a finite number > 0, got 0"),
        ({"smoothing": float("nan")}, "'smoothing' to be a finite number > 0"),
        ({"coefficient_rate": -1}, "'coefficient_rate' to be a finite number >= 0"),
        ({"normalise": "yes"}, "'normalise' to be true or false"),
        ({"targets": "("}, "no regular expression"),
        ({"loss": 3}, "'loss' to be a name"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    """An option that cannot be is named, with what was expected and what came."""
    with pytest.raises(ConfigError, match=message):
        ParetoSet(**options)


def test_ranges_follow_but_do_not_close() -> None:
    """New tables count for half, and a span never shrinks below a tenth of the first one."""
    ranges = Ranges(2)
    np.testing.assert_array_equal(ranges.normalise(np.array([0.3, 2.0])), [0.3, 2.0])
    ranges.update(np.array([[0.0, 4.0], [1.0, 0.0]]))
    np.testing.assert_allclose(ranges.normalise(np.array([0.5, 4.0])), [0.5, 1.0])
    ranges.update(np.array([[0.5, 2.0], [0.5, 0.0]]))
    np.testing.assert_allclose([ranges.ideal, ranges.nadir], [[0.25, 0.0], [0.75, 3.0]])
    for _ in range(20):
        ranges.update(np.full((2, 2), 0.5))
    np.testing.assert_allclose(ranges.spans, [0.1, 0.4])
    again = Ranges(2)
    again.load(ranges.state())
    assert again.state() == ranges.state()


def test_coverage_is_told_from_holes() -> None:
    """An even walk is fine, one with a jump has a hole, one that does not follow the preference is misplaced, a constant one is flat."""
    share = np.linspace(0, 1, 21)
    preferences = np.stack([1 - share, share], axis=1)
    even = np.stack([share, 1 - share], axis=1)
    jump = np.where(share < 0.5, share / 10, 1 - (1 - share) / 10)
    holed = np.stack([jump, 1 - jump], axis=1)
    assert largest_gap(even) == pytest.approx(1.0)
    assert largest_gap(holed) > 15
    bulge = np.sqrt(1 - np.stack([1 - share, share], axis=1) ** 2)
    assert misplaced_share(bulge, preferences, "linear", 0.01) > 0.5
    assert misplaced_share(even**2, preferences, "linear", 0.01) == 0.0
    assert coverage_warning(("a", "b"), even, 0.0, "linear") is None
    assert "skip a part" in str(coverage_warning(("a", "b"), holed, 0.0, "stch"))
    assert "scalarizer: stch" in str(coverage_warning(("a", "b"), bulge, 0.6, "linear"))
    assert "hardly conflict" in str(coverage_warning(("a", "b"), 1.0 + 1e-5 * even, 0.0, "linear"))
