"""What is known of a candidate that was not scored in full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergeopt.task import Score

__all__ = ["Censored"]


@dataclass(frozen=True, slots=True, eq=False)
class Censored:
    """What is known of a candidate that was dropped before it was scored in full; nothing here is a score of the whole.

    Args:
        by: number of the trial that beat it.
        estimates: objective name -> what it would have scored, natural direction: the partial value, moved by how far that trial's own
            partial value is from its full one. Worse in everything than what beat it.
        scores: objective name -> value, standard error, items and records of the items that were scored.
    """

    by: int
    estimates: Mapping[str, float]
    scores: Mapping[str, Score]
