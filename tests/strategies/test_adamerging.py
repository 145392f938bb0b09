"""AdaMerging, and the parts that learners share: Adam, batches, the watch for collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergeopt_strategies.adamerging as adamerging
from mergeopt.differentiable import LossValue
from mergeopt.errors import ConfigError, StoreError
from mergeopt.recipe import Recipe
from mergeopt.strategy import AskState, Budget
from mergeopt.study.optimize import opened, optimize
from mergeopt_strategies.adam import Adam, cosine
from mergeopt_strategies.adamerging import AdaMerging
from mergeopt_strategies.batches import Batches
from mergeopt_strategies.collapse import WINDOW, CollapseWatch
from tests.strategies.toy_fronts import Toy, isotropic


@pytest.fixture(scope="module")
def bowls(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Two isotropic bowls around the experts: the sum is least at their mean, weights one half."""
    return isotropic(tmp_path_factory.mktemp("bowls"))


def ready(toy: Toy, steps: int, evaluations: int = 3, **options: Any) -> AdaMerging:
    """Return a strategy that is set up."""
    strategy = AdaMerging(**{"learning_rate": 0.02, **options})
    strategy.setup(opened(toy.problem, strategy, None), seed=0, budget=Budget(evaluations, steps), batch=8)
    return strategy


def finish(strategy: AdaMerging) -> list[tuple[int, Recipe]]:
    """Learn to the end; return what was proposed, with the step it was proposed after."""
    found = []
    while (answer := strategy.ask()).state is not AskState.DONE:
        found += [(int(c.meta["steps"]), c.recipe) for c in answer.candidates if c.recipe is not None]
    return found


def weights(recipe: Recipe) -> np.ndarray:
    """Return a recipe's weights, [knots, K]."""
    return np.array([list(row.values()) for row in recipe.arguments["weight"].values.values()])


@pytest.mark.parametrize(("variant", "groups"), [(None, "model"), ("task-wise", "model"), ("layer-wise", "tensor")])
def test_the_sum_of_losses_is_minimised(bowls: Toy, variant: str | None, groups: str) -> None:
    """On two bowls around the experts the weights go from 0.3 to one half each, over the variant's groups."""
    steps, last = finish(ready(bowls, 150, variant=variant))[-1]
    assert steps == 150
    assert (last.operator, last.arguments["weight"].groups) == ("task_arithmetic", groups)
    np.testing.assert_allclose(weights(last), 0.5, atol=0.01)


def test_plus_plus_works_on_ties(bowls: Toy) -> None:
    """The variants with ++ learn the weights of TIES, whose density stays at its default."""
    last = finish(ready(bowls, 3, variant="layer-wise++"))[-1][1]
    assert (last.operator, last.arguments["weight"].groups) == ("ties", "tensor")
    assert not np.allclose(weights(last), 0.3)


def test_coefficients_keep_their_bounds(bowls: Toy) -> None:
    """With large steps weights stop at the bounds, and go beyond them where there are none."""
    bounded = [weights(recipe) for _, recipe in finish(ready(bowls, 9, 9, learning_rate=0.3, clamp=[0.2, 0.4]))]
    assert np.min(bounded) >= 0.2
    assert np.max(bounded) == 0.4
    assert max(weights(recipe).max() for _, recipe in finish(ready(bowls, 9, 9, learning_rate=0.3, clamp=None))) > 0.5


@pytest.mark.parametrize(
    ("steps", "every", "evaluations", "expected"),
    [
        (100, None, 4, [25, 50, 75, 100]),
        (7, None, 20, [1, 2, 3, 4, 5, 6, 7]),
        (50, 20, 20, [20, 40, 50]),
        (100, 10, 2, [50, 100]),
        (100, 30, 1, [100]),
        (3, 10, 5, [3]),
    ],
)
def test_proposals_follow_the_schedule(bowls: Toy, steps: int, every: int | None, evaluations: int, expected: list[int]) -> None:
    """What is learned so far is proposed at even distances within the budget, and always at the end."""
    assert [step for step, _ in finish(ready(bowls, steps, evaluations, every=every))] == expected


def test_asks_and_stops_change_nothing(bowls: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at a time, and put back from a state at every stop, the proposals are those of an undisturbed search."""
    whole = [(step, recipe.key) for step, recipe in finish(ready(bowls, 12))]
    monkeypatch.setattr(adamerging, "SLICE", 0.0)
    strategy, found = ready(bowls, 12), []
    while (answer := strategy.ask()).state is not AskState.DONE:
        found += [(c.meta["steps"], c.recipe.key) for c in answer.candidates if c.recipe is not None]
        if answer.state is AskState.LEARNING:
            assert answer.gradient_steps == 1
            state = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in strategy.state().items()}
            strategy = ready(bowls, 12)
            strategy.load_state(state)
    assert found == whole


def test_a_strange_state_is_refused(bowls: Toy) -> None:
    """A state of another strategy or of other groups is a StoreError."""
    state = dict(ready(bowls, 5).state())
    for strange in (state | {"strategy": "pareto-set"}, state | {"adam/value/0": np.zeros((7, 2))}, {"strategy": "adamerging"}):
        with pytest.raises(StoreError, match="not one of this search"):
            ready(bowls, 5).load_state(strange)


def test_a_run_scores_what_was_learned(bowls: Toy, tmp_path: Path) -> None:
    """Through a run the last trial is the best for the sum of losses."""
    run = optimize(bowls.problem, AdaMerging(learning_rate=0.02), budget=Budget(3, 60), out=tmp_path / "run")
    sums = [sum(score.value for score in trial.scores["search"].values()) for trial in run.trials]
    assert len(sums) == 3
    assert sums[-1] == min(sums)


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ({"variant": "layerwise"}, Budget(5, 5), "did you mean 'layer-wise'"),
        ({"clamp": [1.0, 0.0]}, Budget(5, 5), "lower bound first"),
        ({"clamp": 1.0}, Budget(5, 5), "'clamp' to be"),
        ({"every": 0}, Budget(5, 5), "'every' to be a whole number >= 1"),
        ({"loss": ["own"]}, Budget(5, 5), "'loss' to be a name"),
        ({"loss": "entropy"}, Budget(5, 5), "'f0' cannot give the loss 'entropy'; it can give own, distance"),
        ({}, Budget(5), "gradient_steps: 300"),
        ({}, Budget(5, 0), "1 or more gradient steps"),
    ],
)
def test_mistakes_are_named(bowls: Toy, options: dict[str, Any], budget: Budget, message: str) -> None:
    """Options and budgets that cannot be are ConfigErrors that say what was expected."""

    def begin() -> None:
        strategy = AdaMerging(**options)
        strategy.setup(opened(bowls.problem, strategy, None), seed=0, budget=budget, batch=8)

    with pytest.raises(ConfigError, match=message):
        begin()


def test_adam_is_torchs() -> None:
    """Over thirty steps of a quartic, with a schedule, parameters equal those of torch.optim.Adam to 1e-12."""
    start = torch.linspace(-1, 2, 7, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(True), start.clone().requires_grad_(True)
    adam, reference = Adam([ours], 0.1), torch.optim.Adam([theirs], 0.1)
    for step in range(30):
        for parameter in (ours, theirs):
            ((parameter - 0.3) ** 4).sum().backward()  # type: ignore[no-untyped-call]
        reference.param_groups[0]["lr"] = 0.1 * cosine(step, 30)
        adam.step(cosine(step, 30))
        reference.step()
        reference.zero_grad()
        assert ours.grad is None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert cosine(0, 10) == 1.0
    assert cosine(10, 10) == pytest.approx(0.0)


def test_batches_are_epochs_of_all_items() -> None:
    """Full batches of different items; an epoch holds each item once where the size divides them; a state leads on; no items, no batch."""
    batches = Batches(12, 4, [1])
    for _ in range(3):
        assert sorted(item for _ in range(3) for item in batches.draw()) == list(range(12))
    batches.draw()
    again = Batches(12, 4, [2])
    again.load(batches.state())
    assert [again.draw() for _ in range(7)] == [batches.draw() for _ in range(7)]
    assert sorted(Batches(3, 16, [0]).draw()) == [0, 1, 2]
    assert Batches(0, 16, [0]).draw() == []


def watched(shares: list[float], label: float | None) -> str | None:
    """Return the warning after batches with these shares of the commonest class."""
    watch = CollapseWatch("digits")
    for share in shares:
        watch.note(LossValue(0.1, share, label))
    return watch.warning()


def test_collapse_is_told_from_noise() -> None:
    """One class for everything is a collapse, a class that is common among the labels or from the start is none, and it is said once."""
    healthy, gone = [0.2] * WINDOW, [1.0] * WINDOW
    assert watched(healthy + [0.3, 0.1] * WINDOW, 0.2) is None
    assert "collapsed" in str(watched(healthy + gone, 0.2))
    assert "collapsed" in str(watched(healthy + gone, None))
    assert watched([0.9] * WINDOW, 0.9) is None
    assert watched([0.9] * 3 * WINDOW, None) is None
    assert watched(gone[:-1], 0.2) is None
    watch = CollapseWatch("digits")
    for share in healthy + gone:
        watch.note(LossValue(0.1, share, 0.2))
    again = CollapseWatch("digits")
    again.load(watch.state())
    assert again.warning() == watch.warning() is not None
    assert again.warning() is None
    watch.note(LossValue(0.1))
