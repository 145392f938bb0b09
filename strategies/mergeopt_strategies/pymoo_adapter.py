"""pymoo's algorithms as strategies.

pymoo works in whole generations. The adapter hands a generation out piece by piece and tells it, in the order asked, once it is
complete: neither the sizes of asks nor the order of results can change a search. Version of pymoo and seed fix all choices.

Starting points told before the first ask take seats in the initial sample, the best first, and are not asked again; the random
members whose seats they take are dropped. Points told later that were not asked for are left aside.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from pymoo.core.individual import Individual

from mergeopt.errors import ConfigError, StrategyError
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, StrategyInfo
from mergeopt_strategies.pymoo_catalogue import check_options, find, start
from mergeopt_strategies.pymoo_values import Scale, ranked

__all__ = ["PymooStrategy", "nsga2"]

log = logging.getLogger(__name__)

FIRST_ONLY = (
    "%s: the first generation, a random sample of %d, uses up the budget of %d: nothing is selected; lower pop_size or raise the budget"
)

IDLE = 100  # generations without anything to evaluate before the space counts as used up


@dataclass(slots=True)
class _Generation:
    answer: Any  # what pymoo proposed, to be told as it came
    members: list[Any]  # its individuals that need a result
    candidates: list[Candidate]
    results: list[Result | None]
    asked: int  # how many are handed out; starting points, which come first, count as that


class PymooStrategy:
    """An algorithm of pymoo (Blank and Deb, pymoo: multi-objective optimization in Python, IEEE Access 8, 2020).

    Args:
        algorithm: name of its class, as in `pymoo:NSGA3`.
        options: arguments of that class. Reference directions are made (Das-Dennis, at most `pop_size` or 40) where none are given.

    Raises:
        PluginError: no usable algorithm has that name, or a package it needs is missing.
        ConfigError: the algorithm has no such option.
    """

    def __init__(self, algorithm: str, **options: Any) -> None:
        self._entry = find(algorithm)
        check_options(self._entry, options)
        self._options = options
        self.info = StrategyInfo(f"pymoo:{algorithm}", f"pymoo {version('pymoo')}", *self._entry.objectives, constraints=True)

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem; budget and batch are not used, the population decides.

        Raises:
            ConfigError: the problem has too few or too many objectives or no dimension, or pymoo refuses the options.
        """
        low, high = self._entry.objectives
        count = len(problem.objectives)
        if count < low or (high is not None and count > high):
            fits, other = ("one objective", "pymoo:NSGA2") if high == 1 else (f"{low} or more objectives", "pymoo:DE")
            raise ConfigError(f"{self.info.name} fits problems of {fits}, got {count} in problem {problem.name!r}; use {other} there")
        if problem.space.dim < 1:
            raise ConfigError(f"{self.info.name}: expected one or more dimensions to search, got none in problem {problem.name!r}")
        self._algorithm = start(self._entry, self._options, dim=problem.space.dim, objectives=count, seed=seed)
        self._generation: _Generation | None = None
        self._given: dict[bytes, Result] | None = {}  # starting points by genome; None after the first ask
        self._ended: AskState | None = None
        self._first, self._budget = True, budget.evaluations
        self._scale = Scale(count, constraints=self._entry.constraints)

    def ask(self, n: int | None = None) -> Ask:
        """Propose at most n of the current generation (None: all that are left of it)."""
        if self._generation is None and self._ended is None:
            self._breed()
        if (generation := self._generation) is None:
            return Ask((), self._ended or AskState.EXHAUSTED)
        taken = generation.candidates[generation.asked : None if n is None else generation.asked + n]
        generation.asked += len(taken)
        return Ask(tuple(taken), AskState.READY if taken else AskState.WAITING)

    def tell(self, results: Sequence[Result]) -> None:
        """Learn once the generation is complete; take starting points before the first ask."""
        for result in results:
            self._scale.check(result, self.info.name)
            generation = self._generation
            places = [] if generation is None else [i for i, c in enumerate(generation.candidates) if c is result.candidate]
            if generation is not None and places:
                generation.results[places[0]] = result
                if all(told is not None for told in generation.results):
                    self._learn(generation)
            elif self._given is not None and result.losses is not None:
                self._given.setdefault(result.candidate.genome.tobytes(), result)

    def _breed(self) -> None:
        """Make the next generation that has something to evaluate, or find that there is none."""
        for _ in range(IDLE):
            if not self._algorithm.has_next():
                self._ended = AskState.DONE
                return
            answer = self._call("ask")
            if answer is None or (not isinstance(answer, Individual) and len(answer) == 0):
                break
            members = [each for each in ([answer] if isinstance(answer, Individual) else answer) if not each.evaluated]
            given, self._given = ranked((self._given or {}).values()), None
            seated = given[: len(members)]
            results: list[Result | None] = [*seated, *[None] * (len(members) - len(seated))]
            for member, result in zip(members, seated, strict=False):
                member.X = result.candidate.genome.copy()
            candidates = [Candidate(np.clip(np.array(member.X, dtype=np.float64), 0.0, 1.0)) for member in members]
            self._generation = _Generation(answer, members, candidates, results, asked=len(seated))
            if self._first and len(members) >= self._budget:
                log.warning(FIRST_ONLY, self.info.name, len(members), self._budget)
            self._first = False
            if None in results:
                return
            self._learn(self._generation)
        self._ended = AskState.EXHAUSTED

    def _learn(self, generation: _Generation) -> None:
        results = [result for result in generation.results if result is not None]
        self._scale.widen(results)
        for member, result in zip(generation.members, results, strict=True):
            member.F, member.G = self._scale.values(result)
            member.evaluated.update({"F", "G", "H"})
        self._generation = None
        self._call("tell", infills=generation.answer)

    def _call(self, method: str, **arguments: Any) -> Any:
        try:
            return getattr(self._algorithm, method)(**arguments)
        except Exception as error:  # the one guard around pymoo's code
            raise StrategyError(f"{self.info.name}: pymoo's {method} failed: {type(error).__name__}: {error}") from error


def nsga2(*, pop_size: int = 40, **options: Any) -> PymooStrategy:
    """NSGA-II (Deb, Pratap, Agarwal and Meyarivan, IEEE Trans. Evol. Comput. 6, 2002).

    Args:
        pop_size: members of a generation.
        options: more arguments of pymoo's NSGA2.

    Raises:
        ConfigError: NSGA2 has no such option.
    """
    strategy = PymooStrategy("NSGA2", pop_size=pop_size, **options)
    strategy.info = replace(strategy.info, name="nsga2")
    return strategy
