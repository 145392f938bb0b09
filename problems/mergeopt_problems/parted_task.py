"""What tasks over parts of data share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from mergeopt.batched_task import Batch, Indices, batched_records
from mergeopt.task import Items, Part, Records
from mergeopt_problems.options import check_whole
from mergeopt_problems.refusals import part_of

__all__ = ["BatchedPartedTask", "PartedTask"]

T = TypeVar("T", bound=Items)


class PartedTask(Generic[T]):
    """A name, items by part, and how many of them are scored at a time.

    Args:
        name: for people.
        parts: the items by part.
        batch: items scored at a time; fixed, since it may change the last bits of a score.
        warnings: what a run over the data has to say of its own worth, a sentence each.

    Raises:
        ConfigError: batch is below 1.
    """

    def __init__(self, *, name: str, parts: Mapping[Part, T], batch: int, warnings: tuple[str, ...] = ()) -> None:
        check_whole("batch", batch, 1)
        self.name, self.batch, self.warnings = name, batch, warnings
        self._items = dict(parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this task has data for."""
        return tuple(self._items)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"batch": self.batch}

    def items(self, part: Part) -> T:
        """Return the items of a part, the same object every time.

        Raises:
            DataError: the part was not given.
        """
        return part_of(self._items, part, self.name)


class BatchedPartedTask(PartedTask[T], ABC):
    """One that asks a model once per batch: a `mergeopt.batched_task.BatchedTask`."""

    @abstractmethod
    def check(self, model: torch.nn.Module) -> None:
        """Raise `DataError` when the model cannot be asked this."""

    @abstractmethod
    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some items, None for all, in batches."""

    @abstractmethod
    def record(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Records:
        """Return what is recorded of one batch."""

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        """Return the records of some items, None for all: the columns of `record`.

        Raises:
            CandidateError: a logit is not finite.
        """
        return batched_records(self, model, part, device, items)
