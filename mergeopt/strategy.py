"""The contract that search strategies implement: they propose genomes and learn from results; they never see a model.

A strategy is set up once, then asked and told in turns. Values reach it minimised and finite, in the order of the problem's
objectives; a failed candidate reaches it as a status without values.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergeopt.problem import ProblemInfo

__all__ = ["Ask", "AskState", "Budget", "Candidate", "Result", "Status", "Strategy", "StrategyInfo"]

Genome = npt.NDArray[np.float64]


class AskState(enum.Enum):
    """What an `Ask` means for the next turn."""

    READY = "ready"  # there are candidates
    WAITING = "waiting"  # none until outstanding results are told
    EXHAUSTED = "exhausted"  # the space holds nothing new
    DONE = "done"  # the strategy has finished of itself


class Status(enum.Enum):
    """How the evaluation of a candidate ended."""

    OK = "ok"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may spend.

    Args:
        evaluations: candidates scored; starting points and failures count, exact duplicates answered from the cache do not.
    """

    evaluations: int


@dataclass(frozen=True, slots=True)
class StrategyInfo:
    """What a strategy can do; data only.

    Args:
        name: as registered.
        version: of the algorithm (and of the library behind it).
        min_objectives: fewest objectives it accepts.
        max_objectives: most objectives it accepts, None for any number.
        constraints: whether it uses `Result.violations`.
        needs_budget: whether `Budget` changes what it proposes (a longer budget is then another search).
    """

    name: str
    version: str
    min_objectives: int = 1
    max_objectives: int | None = None
    constraints: bool = False
    needs_budget: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A proposal.

    Args:
        genome: point of the unit cube, float64 [d].
        meta: what the strategy wants to find again with the result; JSON-able.
    """

    genome: Genome
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What became of a candidate.

    Args:
        candidate: the very object that was asked, or a starting point that the strategy did not ask for.
        status: OK or FAILED.
        losses: minimised objective values, float64 [m], all finite; None when FAILED.
        violations: constraint values, float64 [c], feasible where <= 0; None when FAILED.
    """

    candidate: Candidate
    status: Status
    losses: npt.NDArray[np.float64] | None
    violations: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """The answer to `Strategy.ask`: candidates, and what the strategy can do next."""

    candidates: tuple[Candidate, ...]
    state: AskState = AskState.READY


@runtime_checkable
class Strategy(Protocol):
    """A search algorithm behind ask and tell.

    The sequence of candidates may depend on the problem's information, the seed and the results told, and on nothing else: not on how
    many are asked for at a time, and not on the order in which the results of one batch arrive. Resuming a run relies on it.
    """

    info: StrategyInfo

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem; called once, before everything else."""
        ...

    def ask(self, n: int | None = None) -> Ask:
        """Propose at most n candidates (None: as many as suit the strategy)."""
        ...

    def tell(self, results: Sequence[Result]) -> None:
        """Learn from any subset of the outstanding candidates, in any order, and from points it did not ask for."""
        ...
