"""The contract that search strategies implement: they propose genomes and learn from results; they never see a model.

A strategy is set up once, then asked and told in turns. Values reach it minimised and finite, in the order of the problem's
objectives; a failed candidate reaches it as a status without values, one that a race dropped with estimates, worse than what beat it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergeopt.problem import ProblemInfo
from mergeopt.recipe import Recipe

__all__ = ["Ask", "AskState", "Budget", "Candidate", "Learner", "Need", "Result", "State", "Status", "Strategy", "StrategyInfo"]

Genome = npt.NDArray[np.float64]
Need = Literal["members", "gradients"]
State = Mapping[str, Any]
"""What a learner has learned: numpy arrays by name, and JSON-able values."""


class AskState(enum.Enum):
    """What an `Ask` means for the next turn."""

    READY = "ready"  # there are candidates
    LEARNING = "learning"  # none yet: gradient steps were taken, and there is more to learn
    WAITING = "waiting"  # none until outstanding results are told
    EXHAUSTED = "exhausted"  # the space holds nothing new
    DONE = "done"  # the strategy has finished of itself


class Status(enum.Enum):
    """How the evaluation of a candidate ended."""

    OK = "ok"
    FAILED = "failed"
    CENSORED = "censored"  # dropped from a race before it was scored in full


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may spend.

    Args:
        evaluations: candidates scored; starting points and failures count, exact duplicates answered from the cache do not.
        gradient_steps: steps of a strategy that learns by gradient; None where nothing was said. One step takes the gradient of every
            objective once.
    """

    evaluations: int
    gradient_steps: int | None = None


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
        needs: doors to the models it goes through, of `members` (it proposes recipes of evolved members) and `gradients` (it learns).
        together: most candidates it ever proposes at a time, whatever it is asked for; None for no such bound. Memory is planned by it.
    """

    name: str
    version: str
    min_objectives: int = 1
    max_objectives: int | None = None
    constraints: bool = False
    needs_budget: bool = False
    needs: tuple[Need, ...] = ()
    together: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A proposal: a point of the space, or a recipe.

    Args:
        genome: point of the unit cube, float64 [d]; of length 0, and not looked at, where there is a recipe.
        recipe: what to make, for strategies that propose models; None where the problem decodes the genome.
        meta: what the strategy wants to find again with the result; JSON-able.
    """

    genome: Genome = field(default_factory=lambda: np.empty(0))
    recipe: Recipe | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What became of a candidate.

    Args:
        candidate: the very object that was asked, or a starting point that the strategy did not ask for.
        status: OK, FAILED or CENSORED.
        losses: minimised objective values, float64 [m], all finite; None when FAILED. When CENSORED they are estimates, larger in every
            objective than those of a candidate that was told or will be told with this batch.
        violations: constraint values, float64 [c], feasible where <= 0; None when FAILED.
    """

    candidate: Candidate
    status: Status
    losses: npt.NDArray[np.float64] | None
    violations: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """The answer to `Strategy.ask`: candidates, and what the strategy can do next.

    Args:
        candidates: to be evaluated; none when LEARNING.
        state: what this means for the next turn.
        gradient_steps: taken since the last ask; only when LEARNING.
        warnings: what a user should know about the search, a sentence each; kept with the run and shown.
    """

    candidates: tuple[Candidate, ...]
    state: AskState = AskState.READY
    gradient_steps: int = 0
    warnings: tuple[str, ...] = ()


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


@runtime_checkable
class Learner(Strategy, Protocol):
    """A strategy that learns between its proposals, and can be put back to where it was without learning again.

    `ask` learns for about a second at most, then answers LEARNING with the steps it took, so that a run can be stored, shown and stopped
    meanwhile. How the steps are cut into asks must not change what is learned.
    """

    def state(self) -> State:
        """Return all that the next ask depends on; taken right after an ask that answered LEARNING."""
        ...

    def load_state(self, state: State) -> None:
        """Go on from a state, on a strategy that was set up the same way; what it was told since its set-up is in the state.

        Raises:
            StoreError: the state is not one of this strategy.
        """
        ...
