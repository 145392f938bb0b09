"""Evolver before a merge: members evolve, and what is judged is the merge of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError
from mergeopt.lineage import Lineage, Mutation, Step, Unit
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, StrategyInfo
from mergeopt_strategies.evolver import members_of
from mergeopt_strategies.fitness import Fitness, check_fitness
from mergeopt_strategies.variation import Variation

__all__ = ["EvolverJoint"]


class EvolverJoint:
    """A hill climb on the joint state of all members; 1 + N T evaluations for N members and T generations.

    In every generation the members take turns in a random order; an offspring stays when the merge with it in its parent's place is
    strictly fitter than the merge so far. References are uniform over the other members. The weights before the merge evolve, never the
    merge's coefficients, which are the problem's: fixed as the run file has them, with equal shares where weights are searched.

    Source: Du et al. 2024 (arXiv 2406.12208), algorithm as in its published code (`evolve_with_merger`); selection is by search scores
    alone, where the code delivers the state that scored best on test data.

    Args:
        scale: f, differential weight.
        rate: Cr, crossover rate.
        mutation: `evolver`, `rand-diff` or `rand/1`; see `Variation`. A single member has no fitness here, so there is no best one.
        unit: of the crossover: `parameter`, `tensor` or `layer`.
        fitness: of several objectives: `mean`, `pooled`, `worst` or `nondominated` (sorted among all states accepted so far).
        generations: T, None to go on as long as the budget lasts.

    Raises:
        ConfigError: an option is unknown or out of its range.
    """

    def __init__(
        self,
        *,
        scale: float = 0.5,
        rate: float = 0.5,
        mutation: Mutation = "evolver",
        unit: Unit = "parameter",
        fitness: str = "mean",
        generations: int | None = None,
    ) -> None:
        self.info = StrategyInfo(name="evolver-joint", version="1", needs=("members",))
        self._variation = Variation(mutation, scale, rate, unit)
        if mutation == "current-to-best":
            raise ConfigError("evolver-joint: members are judged together, so none is the best; use another mutation than current-to-best")
        if generations is not None and (isinstance(generations, bool) or not isinstance(generations, int) or generations < 1):
            raise ConfigError(f"evolver-joint: generations: expected a whole number >= 1, got {generations!r}")
        check_fitness(fitness)
        self._fitness_kind, self._generations = fitness, generations

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem.

        Raises:
            ConfigError: too few members, or a merge that equal shares are not part of.
        """
        self._members = members_of(problem, self.info.name)
        self._variation.check(self._members.names)
        try:
            self._members.merged(Lineage(tuple(self._members.names)))
        except ConfigError as error:
            raise ConfigError(
                f"evolver-joint: members are judged by their merge with equal shares, which the problem does not hold: {error}; widen its "
                "range, or fix it with a number"
            ) from error
        self._fitness = Fitness(self._fitness_kind, problem.objectives)
        self._rng = np.random.default_rng(seed)
        self._lineage = Lineage(tuple(self._members.names))
        self._losses: npt.NDArray[np.float64] | None = None
        self._archive: list[npt.NDArray[np.float64] | None] = []
        self._order: list[int] = []
        self._generation = 0
        self._begun = False
        self._asked: tuple[Candidate, Step | None] | None = None

    def ask(self, n: int | None = None) -> Ask:
        """Propose one merge; the next one depends on what becomes of it."""
        if self._asked is not None:
            return Ask((), AskState.WAITING)
        if not self._begun:
            self._begun = True
            return self._propose(None)
        if not self._order:
            if self._generations is not None and self._generation >= self._generations:
                return Ask((), AskState.DONE)
            self._order = [int(slot) for slot in self._rng.permutation(len(self._members.names))]
            self._generation += 1
        slot = self._order.pop(0)
        return self._propose(self._variation.step(self._lineage, slot, self._rng, guide=lambda: None, fittest=lambda: 0))

    def tell(self, results: Sequence[Result]) -> None:
        """Keep the offspring when the merge with it is strictly fitter."""
        for result in results:
            if self._asked is None or result.candidate is not self._asked[0]:
                continue
            step = self._asked[1]
            self._asked = None
            if step is None or self._fitness.better(result.losses, self._losses, self._archive[:-1]):
                self._lineage = self._lineage if step is None else self._lineage.child(step)
                self._losses = result.losses
                self._archive.append(result.losses)

    def _propose(self, step: Step | None) -> Ask:
        lineage = self._lineage if step is None else self._lineage.child(step)
        candidate = Candidate(recipe=self._members.merged(lineage), meta={"slot": None if step is None else step.slot})
        self._asked = (candidate, step)
        return Ask((candidate,))
