"""What every task refuses in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from mergeopt.errors import CandidateError, DataError, nearest
from mergeopt.task import Part

__all__ = ["check_finite", "part_of"]

T = TypeVar("T")


def part_of(parts: Mapping[Part, T], part: Part, task: str) -> T:
    """Return the items of a part.

    Raises:
        DataError: the part was not given.
    """
    if part not in parts:
        raise DataError(f"task {task!r} has no {part} part; {nearest(part, parts)}. Name its split in the task's data")
    return parts[part]


def check_finite(logits: torch.Tensor, task: str, part: Part) -> None:
    """Raise `CandidateError` when a logit is not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise CandidateError(f"task {task!r}: the model's logits on the {part} part are not finite")
