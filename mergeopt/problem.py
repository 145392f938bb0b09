"""The contract that problems implement: a space, objectives, and what a genome means.

Everything here is in the natural direction of each objective; only the run loop turns signs, just before it tells a strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mergeopt.genomes.space import Space
from mergeopt.recipe import Recipe
from mergeopt.task import ObjectiveInfo, Part, Score

__all__ = ["Evaluation", "ObjectiveInfo", "Part", "Problem", "ProblemInfo", "Proposal", "Score"]


@dataclass(frozen=True, slots=True)
class ProblemInfo:
    """A problem, as data: all that a strategy ever sees.

    Args:
        name: for people.
        space: what may vary.
        objectives: in the order of every value vector.
        fingerprint: hash of all that determines what a genome scores (models, data, operator, space, objectives).
    """

    name: str
    space: Space
    objectives: tuple[ObjectiveInfo, ...]
    fingerprint: str


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What became of one proposal.

    Args:
        scores: per objective name, complete when there is no error.
        error: why the candidate failed, None when it did not.
        seconds: wall-clock time it took, by stage.
    """

    scores: Mapping[str, Score]
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A point to evaluate: a name for people, its genome where it has one, and its recipe where it makes a model."""

    name: str
    genome: npt.NDArray[np.float64] | None = None
    recipe: Recipe | None = None


@runtime_checkable
class Problem(Protocol):
    """Space, objectives and meaning of a genome."""

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
