"""AdaMerging: the coefficients of a merge, learned by gradient on a loss that needs no labels."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from mergeopt.differentiable import Coefficients, DifferentiableProblem, Weights
from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.threads import computing_threads, pick_threads
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, State, StrategyInfo
from mergeopt_strategies.adam import Adam
from mergeopt_strategies.batches import Batches
from mergeopt_strategies.collapse import CollapseWatch
from mergeopt_strategies.learner_options import choice, chosen_losses, gradient_steps, gradients, number, whole

__all__ = ["VARIANTS", "AdaMerging"]

NAME = "adamerging"
SLICE = 1.0  # seconds of learning per ask
POINTS = 10  # models proposed while learning, where the user does not say every how many steps
VARIANTS: Mapping[str, tuple[str, str]] = {
    "task-wise": ("task_arithmetic", "model"),
    "layer-wise": ("task_arithmetic", "tensor"),
    "task-wise++": ("ties", "model"),
    "layer-wise++": ("ties", "tensor"),
}
"""Variant -> operator and groups; the operator's other parameters take their defaults (for TIES, a density of 0.2)."""


class AdaMerging:
    """Minimises the sum over objectives of a loss, the entropy of the model's predictions by default, over merging coefficients.

    No preference enters: all objectives count alike. What has been learned so far is proposed at even distances and at the end.

    Source: Yang et al., arXiv 2310.02575, ICLR 2024, and its code, whose layer-wise variant has one coefficient per tensor
    and expert. As there: Adam with rate 1e-3, start at 0.3, coefficients in [0, 1]. Here they are put back into [0, 1] after each step,
    there they are clipped where they are used; a coefficient that was outside comes back sooner here.

    Args:
        variant: `task-wise`: one coefficient per expert; `layer-wise`: one per expert and tensor; with `++`: of task vectors that TIES has
            trimmed and elected. None: what the problem's merge searches, with its operator.
        loss: a name for all objectives or names by objective, of `mergeopt.differentiable.LOSSES`; those left out take `entropy`, or the
            objective's default where it has none.
        learning_rate: of Adam.
        weight: where every weight starts.
        clamp: lowest and highest value of per-expert coefficients; None for no bounds.
        batch: items per objective and step.
        every: steps between two proposals; None: ten proposals, evenly spaced. Where there are more than the budget has evaluations, an
            even selection is proposed. The last is always what was learned in the end.

    Raises:
        ConfigError: an option is not what it must be.
    """

    def __init__(
        self,
        *,
        variant: str | None = None,
        loss: str | Mapping[str, str] | None = None,
        learning_rate: float = 1e-3,
        weight: float = 0.3,
        clamp: Sequence[float] | None = (0.0, 1.0),
        batch: int = 16,
        every: int | None = None,
    ) -> None:
        self._variant = None if variant is None else choice(NAME, "variant", variant, VARIANTS)
        self._rate, self._start = number(NAME, "learning_rate", learning_rate, above=0.0), number(NAME, "weight", weight)
        self._clamp = None if clamp is None else _bounds(clamp)
        self._size, self._every = whole(NAME, "batch", batch, 1), None if every is None else whole(NAME, "every", every, 1)
        if loss is not None and not isinstance(loss, str | Mapping):
            raise ConfigError(f"{NAME}: expected option 'loss' to be a name, or names by objective, got {loss!r}")
        self._loss = loss
        self.info = StrategyInfo(name=NAME, version=f"1 (torch {version('torch')})", needs_budget=True, needs=("gradients",), together=1)

    @property
    def items(self) -> int:
        """Items per objective and step."""
        return self._size

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem.

        Args:
            problem: what to learn, with its gradients.
            seed: of the batches, >= 0.
            budget: both of its numbers count.
            batch: not used.

        Raises:
            ConfigError: there are no gradients, no gradient steps, nothing to learn, or a loss that an objective cannot give.
        """
        self._problem = gradients(NAME, problem, self.info.min_objectives)
        self._names = self._problem.objectives
        self._losses = chosen_losses(NAME, self._problem, self._loss, "entropy")
        self._total = gradient_steps(NAME, budget)
        if self._total < 1:
            raise ConfigError(f"{NAME}: expected 1 or more gradient steps in the budget, got {self._total}")
        self._threads = pick_threads(None, sum(math.prod(shape) for shape in self._problem.shapes.values()))
        self._coefficients = self._begin(self._problem)
        if not self._coefficients.parameters():
            raise ConfigError(f"{NAME}: the merge searches no parameter, so there is nothing to learn; give one a range (low, high)")
        self._adam = Adam(self._coefficients.parameters(), self._rate)
        items = [0 if self._losses[name] == "distance" else self._problem.items(name) for name in self._names]
        self._batches = [Batches(count, self._size, [seed, i]) for i, count in enumerate(items)]
        self._watches = [CollapseWatch(name) for name in self._names]
        self._due = _schedule(self._total, self._every, budget.evaluations)
        self._taken, self._proposed = 0, 0
        self._untold: list[str] = []

    def ask(self, n: int | None = None) -> Ask:
        """Learn for about a second, or until a proposal is due; then propose what has been learned."""
        if self._proposed == len(self._due):
            return Ask((), AskState.DONE, 0, self._news())
        due = self._due[self._proposed]
        if self._taken == due:
            self._proposed += 1
            recipe = self._problem.recipe(Weights(self._coefficients))
            return Ask((Candidate(recipe=recipe, meta={"steps": self._taken}),), AskState.READY, 0, self._news())
        before, until = self._taken, time.monotonic() + SLICE
        with computing_threads(self._threads):
            while self._taken < due:
                self._step()
                if time.monotonic() >= until:
                    break
        return Ask((), AskState.LEARNING, self._taken - before, self._news())

    def tell(self, results: Sequence[Result]) -> None:
        """Take note of nothing."""

    def state(self) -> State:
        """Return coefficients, Adam's moments, the batches' streams, and what was said and proposed."""
        return {
            **self._adam.arrays("adam"),
            "strategy": NAME,
            "taken": self._taken,
            "proposed": self._proposed,
            "untold": list(self._untold),
            "batches": [batches.state() for batches in self._batches],
            "watches": [watch.state() for watch in self._watches],
        }

    def load_state(self, state: State) -> None:
        """Go on from a state.

        Raises:
            StoreError: it is none of this strategy with these options.
        """
        try:
            if state["strategy"] != NAME:
                raise ValueError(f"it is one of {state['strategy']!r}")
            self._adam.load("adam", state)
            for batches, saved in zip(self._batches, state["batches"], strict=True):
                batches.load(saved)
            for watch, saved in zip(self._watches, state["watches"], strict=True):
                watch.load(saved)
            self._taken, self._proposed, self._untold = int(state["taken"]), int(state["proposed"]), list(state["untold"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{NAME}: the stored state is not one of this search: {type(error).__name__}: {error}") from error

    def _begin(self, problem: DifferentiableProblem) -> Coefficients:
        if self._variant is None:
            return problem.coefficients(weight=self._start)
        operator, groups = VARIANTS[self._variant]
        return problem.coefficients(operator=operator, groups=groups, weight=self._start)

    def _step(self) -> None:
        """Take one step of Adam on the sum of the objectives' losses, one backward pass after the other."""
        weights = Weights(self._coefficients)
        self._problem.put(weights)
        for name, batches, watch in zip(self._names, self._batches, self._watches, strict=True):
            watch.note(self._problem.loss(name, self._losses[name], batches.draw(), weight=1.0))
        self._problem.pull(weights)
        self._adam.step()
        if self._clamp is not None:
            with torch.no_grad():
                for parameter in self._coefficients.parameters():
                    if parameter.ndim == 2:  # one value per expert
                        parameter.clamp_(*self._clamp)
        self._coefficients.project()
        self._taken += 1
        self._untold += [warning for warning in (watch.warning() for watch in self._watches) if warning is not None]

    def _news(self) -> tuple[str, ...]:
        news, self._untold = tuple(self._untold), []
        return news


def _bounds(clamp: Any) -> tuple[float, float]:
    if isinstance(clamp, str) or not isinstance(clamp, Sequence) or len(clamp) != 2:
        raise ConfigError(f"{NAME}: expected option 'clamp' to be [lowest, highest] or null, got {clamp!r}")
    low, high = (number(NAME, "clamp", bound) for bound in clamp)
    if low >= high:
        raise ConfigError(f"{NAME}: expected option 'clamp' to have its lower bound first, got {clamp!r}")
    return low, high


def _schedule(total: int, every: int | None, evaluations: int) -> list[int]:
    """Return after which steps to propose: at most `evaluations` of them, the last one included."""
    if every is None:
        count = min(POINTS, evaluations, total)
        return [total * (i + 1) // count for i in range(count)]
    due = [*range(every, total, every), total]
    chosen = np.linspace(len(due), 0, min(evaluations, len(due)), endpoint=False)[::-1].round().astype(int) - 1
    return [due[i] for i in chosen.tolist()]
