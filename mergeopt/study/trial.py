"""One trial: what was tried, what became of it, and how its values look to a strategy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from mergeopt.errors import StoreError
from mergeopt.evaluation.censored import Censored
from mergeopt.problem import Proposal
from mergeopt.recipe import Recipe
from mergeopt.strategy import Status
from mergeopt.task import ObjectiveInfo, Part, Score

__all__ = ["Kind", "Trial", "items_scored", "losses", "proposal_key", "recalled", "to_natural", "violations"]

Kind = Literal["asked", "init", "baseline"]
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One candidate of a run, as stored.

    Args:
        number: its place in the run, from 0.
        kind: `asked` by the strategy, `init` (a starting point) or `baseline` (never charged).
        name: for people.
        genome: point of the unit cube, float64 [d]; None where it has none.
        recipe_json: its recipe as JSON text; None for problems that make no model.
        key: equal for exact duplicates.
        status: OK, FAILED or CENSORED.
        error: why it failed.
        duplicate_of: number of the trial whose answer it was given.
        charged: whether it cost a unit of the budget.
        seconds: wall-clock time by stage.
        created: seconds since the epoch.
        scores: part -> objective name -> score, without records; none of a trial that was not scored in full.
        censored: what is known of a candidate that a race dropped, None for any other.
        report_error: why it could not be scored on the report part, None where it was or nobody tried.
    """

    number: int
    kind: Kind
    name: str
    genome: Vector | None
    recipe_json: str | None
    key: str
    status: Status
    error: str | None = None
    duplicate_of: int | None = None
    charged: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    created: float = 0.0
    scores: Mapping[Part, Mapping[str, Score]] = field(default_factory=dict)
    censored: Censored | None = None
    report_error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it was scored in full."""
        return self.status is Status.OK

    @property
    def origin(self) -> int:
        """Number of the trial that was really evaluated: its own, or that of the one it repeats."""
        return self.number if self.duplicate_of is None else self.duplicate_of

    @property
    def recipe(self) -> Recipe | None:
        """The recipe, None for problems that make no model.

        Raises:
            StoreError: the stored text is no recipe.
        """
        if self.recipe_json is None:
            return None
        try:
            return Recipe.from_json(json.loads(self.recipe_json))
        except ValueError as error:
            raise StoreError(f"trial {self.number}: the stored recipe is damaged ({error}); restore the run folder from a copy") from error

    def values(self, part: Part = "search") -> dict[str, float] | None:
        """Return value by objective name in the natural direction, None where the trial was not scored on that part."""
        scores = self.scores.get(part)
        return {name: score.value for name, score in scores.items()} if scores else None

    def vector(self, objectives: Sequence[ObjectiveInfo], part: Part = "search") -> Vector | None:
        """Return the values [m] in the order of the objectives, in the natural direction; None where it was not scored."""
        scores = self.scores.get(part)
        if not scores:
            return None
        return np.array([scores[objective.name].value for objective in objectives], dtype=np.float64)


def recalled(trials: Sequence[Trial]) -> int:
    """Return how many candidates an evaluator answered from memory, because they make the same model as earlier ones."""
    return sum("recall" in trial.seconds and trial.duplicate_of is None and trial.status is not Status.FAILED for trial in trials)


def items_scored(trials: Sequence[Trial], objectives: Sequence[ObjectiveInfo]) -> tuple[int, int]:
    """Return on how many items candidates were scored, added up over the objectives, and how many full scorings would have taken.

    Baselines, repetitions and failures are left out.
    """
    found = [trial for trial in trials if trial.kind != "baseline" and trial.duplicate_of is None]
    parts = [trial.censored.scores if trial.censored else trial.scores["search"] for trial in found if trial.ok or trial.censored]
    return sum(score.items for scores in parts for score in scores.values()), len(parts) * sum(o.items or 0 for o in objectives)


def losses(values: npt.ArrayLike, objectives: Sequence[ObjectiveInfo]) -> Vector:
    """Turn natural values [..., m] into minimised ones: the only place of the package where signs turn."""
    signs = np.array([-1.0 if objective.direction == "maximize" else 1.0 for objective in objectives])
    minimised: Vector = np.asarray(values, dtype=np.float64) * signs
    return minimised


def to_natural(minimised: npt.ArrayLike, objectives: Sequence[ObjectiveInfo]) -> Vector:
    """Turn minimised values [..., m] into natural ones; turning a sign twice gives the value back."""
    return losses(minimised, objectives)


def violations(values: npt.ArrayLike, objectives: Sequence[ObjectiveInfo]) -> Vector:
    """Return by how much each declared bound is broken, [c], in the order of the objectives and low before high; kept where <= 0.

    Args:
        values: natural values [m].
        objectives: those the values belong to.
    """
    broken: list[float] = []
    for value, objective in zip(np.asarray(values, dtype=np.float64).tolist(), objectives, strict=True):
        low, high = objective.constraint or (None, None)
        if low is not None:
            broken.append(low - value)
        if high is not None:
            broken.append(value - high)
    return np.array(broken, dtype=np.float64)


def proposal_key(proposal: Proposal) -> str:
    """Return what exact duplicates share: the recipe's content, or the genome's bits (zero has one sign).

    Raises:
        StoreError: the proposal has neither genome nor recipe, so that nothing could tell it from another.
    """
    if proposal.recipe is not None:
        return f"recipe:{proposal.recipe.key}"
    if proposal.genome is None:
        raise StoreError(f"the proposal {proposal.name!r} has neither a genome nor a recipe; give it one")
    canonical = np.ascontiguousarray(proposal.genome, dtype=np.float64) + 0.0
    return f"genome:{hashlib.sha256(canonical.tobytes()).hexdigest()}"
