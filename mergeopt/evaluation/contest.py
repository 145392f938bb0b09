"""One objective as a race sees it: losses of items, and what may go wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergeopt.errors import CandidateError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.score import guarded
from mergeopt.task import ItemMetric, Records, Score

__all__ = ["Contest"]

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """One objective in a race: by which pass over data it is measured, its number of items, and +1 where less is better, else -1."""

    name: str
    objective: TaskObjective
    metric: ItemMetric
    place: int
    items: int
    sign: float
    span: float

    def losses(self, records: Records) -> Vector:
        """Return per-item losses."""
        return self.sign * np.asarray(self.metric.values(records), dtype=np.float64)

    def loss(self, records: Records) -> float:
        """Return the aggregate over some items, as a loss."""
        return self.sign * float(self.metric.aggregate(records))

    def score(self, records: Records) -> Score:
        """Return the score of some or all items.

        Raises:
            CandidateError: the metric raised, or is not finite.
        """
        with guarded(self.name):
            return self.objective.score_records(records, "search")

    def check(self, records: Records) -> None:
        """Raise `CandidateError` when the metric raises on these records, or gives another number of values than there are items."""
        with guarded(self.name):
            found, items = self.losses(records), len(next(iter(records.values())))
        if found.shape != (items,):
            raise CandidateError(f"objective {self.name!r}: expected one value per item ({items}), got shape {list(found.shape)}")
