"""The contract that problems implement: a space, objectives, and what a genome means.

Everything here is in the natural direction of each objective; only the run loop turns signs, just before it tells a strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergeopt.differentiable import DifferentiableProblem
from mergeopt.evaluation.censored import Censored
from mergeopt.evaluation.race import Heat, Race
from mergeopt.evaluation.racing import Racing
from mergeopt.genomes.space import Space
from mergeopt.lineage import Lineage
from mergeopt.recipe import Recipe
from mergeopt.task import ObjectiveInfo, Part, Score

__all__ = [
    "Evaluation",
    "FrugalProblem",
    "Members",
    "ModelProblem",
    "ObjectiveInfo",
    "Part",
    "Problem",
    "ProblemInfo",
    "Proposal",
    "RacedProblem",
    "Score",
]


class Members(Protocol):
    """Makes recipes for strategies that evolve whole models: the members of a population begin as the experts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, in order of their slots."""
        ...

    def merged(self, lineage: Lineage) -> Recipe:
        """Return the problem's merge of the newest versions of all members, with equal shares where its weights are searched."""
        ...

    def alone(self, slot: int, lineage: Lineage) -> Recipe:
        """Return the newest version of one member as it is; the recipe holds the whole lineage."""
        ...


@dataclass(frozen=True, slots=True)
class ProblemInfo:
    """What a strategy sees of a problem: data, and the door to the models that it declared to need.

    Args:
        name: for people.
        space: what may vary.
        objectives: in the order of every value vector.
        fingerprint: hash of all that determines what a genome scores (models, data, operator, space, objectives).
        members: for strategies that need `members`, else None.
        gradients: for strategies that need `gradients`, else None.
    """

    name: str
    space: Space
    objectives: tuple[ObjectiveInfo, ...]
    fingerprint: str
    members: Members | None = field(default=None, compare=False)
    gradients: DifferentiableProblem | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What became of one proposal.

    Args:
        scores: per objective name, complete when there is no error and it was not dropped.
        error: why the candidate failed, None when it did not.
        seconds: wall-clock time it took, by stage.
        censored: what is known of a candidate that a race dropped, None for any other.
    """

    scores: Mapping[str, Score]
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    censored: Censored | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A point to evaluate: a name for people, its genome where it has one, and its recipe where it makes a model."""

    name: str
    genome: npt.NDArray[np.float64] | None = None
    recipe: Recipe | None = None


@runtime_checkable
class Problem(Protocol):
    """Space, objectives and meaning of a genome.

    A problem may also have `warnings`, sentences: what its data has to say of its own worth. They are stored and shown with every run.
    """

    @property
    def info(self) -> ProblemInfo:
        """The problem as data."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the data it can score: always `search`; `report` when something is held out."""
        ...

    def decode(self, genome: npt.NDArray[np.float64]) -> Recipe | None:
        """Return the recipe of a genome [d]; None for problems that make no model."""
        ...

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        """Score proposals on one part of the data and yield what became of each, in order, as soon as it is known.

        A proposal that cannot be made or scored is a value with an error, not an exception.
        """
        ...

    def baselines(self) -> list[Proposal]:
        """Return the points every result is held against (base, experts, uniform soup); may be empty."""
        ...

    def provenance(self) -> Mapping[str, Any]:
        """Return what a result must name: content hashes of models and data, versions, evaluator settings; JSON-able."""
        ...


@runtime_checkable
class FrugalProblem(Problem, Protocol):
    """A problem that knows what memory there is, and does with less where it is short, from then on."""

    def expect(self, needs: Sequence[str], together: int | None = None) -> None:
        """Know, before anything is loaded, what a strategy will ask for (`StrategyInfo.needs` and `.together`): it takes memory."""
        ...

    @property
    def reduced(self) -> Mapping[str, Any]:
        """What has been made smaller, and to what; JSON-able, empty where nothing has."""
        ...

    def reduce(self, to: Mapping[str, Any]) -> None:
        """Make the same smaller before anything is scored: a run that is resumed scores as it would have gone on."""
        ...


@runtime_checkable
class RacedProblem(Problem, Protocol):
    """A problem whose candidates can be measured on a few items first, and dropped."""

    def race(self, racing: Racing, *, seed: int) -> Race:
        """Return a race with an empty archive.

        Raises:
            ConfigError: an objective cannot be raced, or the rule does not fit them.
        """
        ...

    def run_heat(self, proposals: Sequence[Proposal], heat: Heat) -> Iterator[Evaluation]:
        """Measure proposals on the search part as a heat asks, and yield what became of each, in order, as soon as it is known.

        What was yielded may enter the race's archive before the next is asked for.
        """
        ...


@runtime_checkable
class ModelProblem(Problem, Protocol):
    """A problem whose candidates are models, for strategies that work on weights or by gradient."""

    def members(self) -> Members:
        """Return what makes recipes of evolved members."""
        ...

    def gradients(self, folder: Path | None) -> DifferentiableProblem:
        """Return the door to losses and their gradients.

        Args:
            folder: where learned sets are kept, by content hash; None to keep them in memory.
        """
        ...
