"""What is done where memory is short: the shortage is told from other errors, and work is tried again in smaller pieces."""

from __future__ import annotations

import errno
import gc
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mergeopt.evaluation.compared_task import ComparedTask
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.memory import room
from mergeopt.task import Objective

__all__ = ["Shortage", "attempt", "halve_batch", "is_out_of_memory", "score_at_once", "scored_at_once"]

T = TypeVar("T")
SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""What the allocators of torch and the libraries of a card say, which have no error class of their own for it."""
VAGUE = re.compile(r"could not create a (primitive|memory)|could not execute a primitive|can't start new thread")
"""What oneDNN and Python's threads say of a shortage, and of other things too."""
LITTLE = 64 << 20  # bytes of room below which that is taken for a shortage
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory was short; what the allocator said."""

    said: str


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory, on a CPU or on a card."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    return SHORTAGE.search(said) is not None or (VAGUE.search(said) is not None and room(torch.device("cpu")).bytes < LITTLE)


def attempt(work: Callable[[], T]) -> T | Shortage:
    """Do work and return what it gives, or the shortage that ended it; whatever it had allocated is free again then.

    Args:
        work: what else it raises is not caught.
    """
    try:
        return work()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        shortage = Shortage(" ".join(str(error).split())[:300] or type(error).__name__)
    # Only now, outside of the handler, has the error gone, and with it the frames that hold what was allocated.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return shortage


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
