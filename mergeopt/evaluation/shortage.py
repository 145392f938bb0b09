"""A shortage of memory, told from other errors, whichever allocator ran out."""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from mergeopt.errors import CandidateError, MemoryShortage
from mergeopt.memory import room

__all__ = ["Shortage", "attempt", "is_out_of_memory"]

T = TypeVar("T")
SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""What the allocators of torch and the libraries of a card say, which have no error class of their own for it."""
VAGUE = re.compile(r"could not create a (primitive|memory)|could not execute a primitive|can't start new thread")
"""What oneDNN and Python's threads say of a shortage, and of other things too."""
LITTLE = 64 << 20  # bytes of room below which that is taken for a shortage


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory was short; what the allocator said."""

    said: str


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory, on a CPU or on a card."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, CandidateError):  # its text may hold an allocator's words: what it was about, is told already
        return isinstance(error, MemoryShortage)
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
