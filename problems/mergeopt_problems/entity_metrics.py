"""Metrics of entities: `true_positives`, `predicted_entities` and `gold_entities` (integers), each counted per sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergeopt.task import Direction, Records
from mergeopt_problems.estimates import ratio_of_sums, standard_error_of_ratio

__all__ = ["EntityF1"]


class EntityF1:
    """F1 of entities over all sentences together (micro average), in [0, 1]: 2 TP / (predicted + gold).

    0 where there are none, as seqeval has it.
    """

    name = "entity_f1"
    direction: Direction = "maximize"
    decomposable = False
    worst: float | None = 0.0
    requires: Sequence[str] = ("true_positives", "predicted_entities", "gold_entities")

    def aggregate(self, records: Records) -> float:
        """Return F1; NaN over no sentences."""
        if not len(records["gold_entities"]):
            return math.nan
        value = ratio_of_sums(2 * records["true_positives"], records["predicted_entities"] + records["gold_entities"])
        return 0.0 if math.isnan(value) else value

    def standard_error(self, records: Records) -> float | None:
        """Return the delta method's standard error over sentences, None for fewer than two of them or no entities."""
        return standard_error_of_ratio(2 * records["true_positives"], records["predicted_entities"] + records["gold_entities"])
