"""Tells a shortage of memory from other errors."""

from __future__ import annotations

import errno
import re

import torch

__all__ = ["is_out_of_memory"]

SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""What the allocators of torch and the libraries of a card say, which have no error class of their own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory, on a CPU or on a card."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and SHORTAGE.search(str(error)) is not None
