"""Evolver, members competing: every expert is a member of a population, and a fitter offspring takes its parent's place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, nearest
from mergeopt.lineage import Lineage, Mutation, Step, Unit
from mergeopt.problem import Members, ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, StrategyInfo
from mergeopt_strategies.fitness import Fitness, check_fitness
from mergeopt_strategies.variation import Variation

__all__ = ["Evolver"]

UPDATES = ("steady", "generational")
REFERENCES = ("schedule", "uniform")


class Evolver:
    """Differential evolution of whole models, each judged alone; N (T + 1) evaluations for N members and T generations.

    Members take turns in order. In the published code an offspring that is strictly better replaces its parent at once (`steady`), and
    refers with probability 0.5 / (T - t) + 0.5 to a random other member, else to the best other one: explore first, exploit later (spec
    of the code's `evolve`; T comes from the budget). Selection is by search scores alone; the code's choice by test score is not offered.

    Source: Du et al. 2024 (arXiv 2406.12208), algorithm as in its published code.

    Args:
        scale: f, differential weight.
        rate: Cr, crossover rate.
        mutation: `evolver`, `rand-diff`, `rand/1` or `current-to-best`; see `Variation`.
        unit: of the crossover: `parameter`, `tensor` or `layer`.
        fitness: of several objectives: `mean`, `pooled`, `worst` or `nondominated`; see `Fitness`.
        update: `steady`, or `generational`: all offspring of a generation are made of the members it began with.
        reference: `schedule`, or `uniform`.

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
        update: str = "steady",
        reference: str = "schedule",
    ) -> None:
        self.info = StrategyInfo(name="evolver", version="1", needs_budget=True, needs=("members",))
        self._variation = Variation(mutation, scale, rate, unit)
        for name, value, known in (("update", update, UPDATES), ("reference", reference, REFERENCES)):
            if value not in known:
                raise ConfigError(f"{name}: unknown {value!r}; {nearest(str(value), known)}")
        check_fitness(fitness)
        self._fitness_kind, self._update, self._reference = fitness, update, reference

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem.

        Raises:
            ConfigError: too few members, or a budget that does not pay for one generation.
        """
        self._members = members_of(problem, self.info.name)
        names = self._members.names
        self._variation.check(names)
        self._fitness = Fitness(self._fitness_kind, problem.objectives)
        self._generations = budget.evaluations // len(names) - 1
        if self._generations < 1:
            raise ConfigError(
                f"evolver: {len(names)} members and their first offspring need {2 * len(names)} evaluations, the budget has "
                f"{budget.evaluations}; raise it"
            )
        self._rng = np.random.default_rng(seed)
        self._lineage = Lineage(tuple(names))
        self._losses: list[npt.NDArray[np.float64] | None] = [None] * len(names)
        self._turn = -len(names)  # turns before 0 judge the members as they are
        self._waiting: dict[int, tuple[int, Step | None]] = {}  # id of a candidate -> member, and the step that made it
        self._kept: list[Candidate] = []  # so that no identity is given twice while results are outstanding
        self._accepted: list[tuple[Step, npt.NDArray[np.float64] | None]] = []

    def ask(self, n: int | None = None) -> Ask:
        """Propose the next offspring: one at a time where each sees the last one's fate, else up to n of a generation."""
        asked: list[Candidate] = []
        while len(asked) < (n or len(self._losses)):
            if self._turn >= self._generations * len(self._losses):
                return Ask(tuple(asked), AskState.READY if asked else AskState.WAITING if self._waiting else AskState.DONE)
            if not self._may_go_on():
                return Ask(tuple(asked), AskState.READY if asked else AskState.WAITING)
            asked.append(self._next())
        return Ask(tuple(asked))

    def tell(self, results: Sequence[Result]) -> None:
        """Let offspring that are strictly fitter take their parents' places; points it did not ask for are not its members."""
        for result in results:
            known = self._waiting.pop(id(result.candidate), None)
            if known is None:
                continue
            slot, step = known
            if step is None:
                self._losses[slot] = result.losses
            elif self._fitness.better(result.losses, self._losses[slot], self._others(slot)):
                self._accepted.append((step, result.losses))
        if not self._waiting:
            self._kept.clear()
            if self._update == "steady" or self._turn % len(self._losses) == 0:
                self._replace()

    def _may_go_on(self) -> bool:
        """Whether the next candidate depends on no result that is still outstanding."""
        if not self._waiting:
            return True
        first_of_generation = self._turn % len(self._losses) == 0
        return self._turn < 0 or (self._update == "generational" and not first_of_generation)

    def _next(self) -> Candidate:
        count = len(self._losses)
        slot = self._turn % count
        if self._turn < 0:
            step, recipe = None, self._members.alone(slot, self._lineage)
        else:
            step = self._step(slot, self._turn // count)
            recipe = self._members.alone(slot, self._lineage.child(step))
        self._turn += 1
        candidate = Candidate(recipe=recipe, meta={"slot": slot})
        self._waiting[id(candidate)] = (slot, step)
        self._kept.append(candidate)
        return candidate

    def _step(self, slot: int, generation: int) -> Step:
        explore = 0.5 / (self._generations - generation) + 0.5

        def fittest() -> int:
            others = [index for index in range(len(self._losses)) if index != slot]
            return others[self._fitness.best([self._losses[index] for index in others])]

        def guide() -> int | None:
            return None if self._reference == "uniform" or self._rng.random() < explore else fittest()

        return self._variation.step(self._lineage, slot, self._rng, guide=guide, fittest=fittest)

    def _replace(self) -> None:
        for step, losses in self._accepted:
            self._lineage = self._lineage.child(step)
            self._losses[step.slot] = losses
        self._accepted.clear()

    def _others(self, slot: int) -> list[npt.NDArray[np.float64] | None]:
        return [losses for index, losses in enumerate(self._losses) if index != slot]


def members_of(problem: ProblemInfo, strategy: str) -> Members:
    """Return the members of a problem.

    Raises:
        ConfigError: the problem gave none.
    """
    if problem.members is None:
        raise ConfigError(f"{strategy}: the problem {problem.name!r} has no members to evolve; give it to mergeopt.optimize")
    return problem.members
