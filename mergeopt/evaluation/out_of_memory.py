"""What is done where memory is short: work is tried again in smaller pieces."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mergeopt.evaluation.compared_task import ComparedTask
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.shortage import Shortage
from mergeopt.task import Objective

__all__ = ["halve_batch", "score_at_once", "scored_at_once"]

log = logging.getLogger(__name__)


def scored_at_once(objectives: Sequence[Objective]) -> dict[str, int]:
    """Return how many items are scored at a time, by objective; those that leave this to their own code are left out."""
    sizes = {objective.info.name: getattr(_batched(objective), "batch", None) for objective in objectives}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def score_at_once(objectives: Sequence[Objective], sizes: Mapping[str, int]) -> None:
    """Have tasks score so many items at a time from now on, by objective. Another batch may change the last bits of a score."""
    for objective in objectives:
        if objective.info.name in sizes:
            _batched(objective).batch = sizes[objective.info.name]


def _batched(objective: Objective) -> Any:
    """Return the task whose batches an objective is scored in, None for a function, which sees all items at once."""
    task: Any = objective.task if isinstance(objective, TaskObjective) else None
    return task.task if isinstance(task, ComparedTask) else task


def halve_batch(objective: Objective, shortage: Shortage) -> bool:
    """Have an objective's task score half as many items at a time from now on; False where it cannot score fewer."""
    for name, batch in scored_at_once([objective]).items():
        if batch > 1:
            score_at_once([objective], {name: batch // 2})
            log.info("objective %r: memory is short, %d items at a time from now on (%s)", name, batch // 2, shortage.said)
            return True
    return False
