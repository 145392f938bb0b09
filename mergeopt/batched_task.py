"""Tasks that ask a model once per batch: what it is given and what is recorded are the task's, the forward pass is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.forward import evaluating, forward
from mergeopt.task import DifferentiableTask, Part, Predictions, Records, Task

__all__ = ["Batch", "BatchedTask", "Columns", "Indices", "JudgedTask", "asked_items", "batched_records", "in_batches"]

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some items as a model gets them.

    Args:
        items: indices [n].
        inputs: by argument name, [n, ...] each, as `mergeopt.forward.forward` takes them.
    """

    items: Indices
    inputs: Mapping[str, torch.Tensor]


@runtime_checkable
class BatchedTask(Task, Protocol):
    """A task that asks a model for the logits of each batch, once, and needs nothing else of it.

    Its `records` are `batched_records`. An evaluator that runs the model in another way, layer by layer say, uses the two halves.
    """

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield each of some items once, in batches that are always the same.

        Args:
            model: whose configuration may say how texts are padded; it is not run.
            part: which data.
            items: distinct indices; None for all items.
        """
        ...

    def record(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Records:
        """Return what is recorded of one batch, columns [n] in the order of its items.

        Args:
            model: whose configuration names its logits; it is not run.
            part: which data.
            items: of the batch, [n].
            logits: the model's for this batch, in its own type.

        Raises:
            CandidateError: a logit is not finite.
        """
        ...


@runtime_checkable
class JudgedTask(BatchedTask, DifferentiableTask, Protocol):
    """A batched task that classifies, so that the predictions of two models can be compared."""

    def predictions(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Predictions:
        """Return what the logits of one batch say; arguments as `record`."""
        ...


def batched_records(
    task: BatchedTask, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None
) -> Records:
    """Run a model over the batches of a task and return its records, in the order of the items asked for.

    Args:
        task: what is asked.
        model: on the device; it is left in the mode it was in.
        part: which data.
        device: where the model is.
        items: distinct indices, one or more; None for all, in order.
    """
    columns = Columns(len(task.items(part)), items)
    with evaluating(model):
        for batch in task.batches(model, part, items):
            columns.add(batch.items, task.record(model, part, batch.items, forward(model, batch.inputs, device)))
    return columns.records


class Columns:
    """Records that come batch by batch, each batch put where its items belong.

    Args:
        count: items of the part.
        items: those asked for, distinct; None for all, in order.

    Raises:
        ValueError: an item is asked for twice.
    """

    def __init__(self, count: int, items: Sequence[int] | None) -> None:
        asked = asked_items(count, items)
        if len(np.unique(asked)) < len(asked):
            raise ValueError("expected distinct items, got one of them twice")
        self.records: dict[str, npt.NDArray[Any]] = {}
        self._rows = len(asked)
        self._place = np.zeros(count, dtype=np.intp)
        self._place[asked] = np.arange(self._rows)

    def add(self, items: Indices, made: Records) -> None:
        """Put what is recorded of some items, columns [n], in their places."""
        for name, values in made.items():
            if name not in self.records:
                self.records[name] = np.zeros(self._rows, dtype=values.dtype)
            self.records[name][self._place[items]] = values


def asked_items(count: int, items: Sequence[int] | None) -> Indices:
    """Return the items asked for; None for all of so many, in order."""
    return np.arange(count) if items is None else np.asarray(items, dtype=np.intp)


def in_batches(order: Indices, size: int) -> list[Indices]:
    """Cut items, in the order they shall be scored in, into batches of `size`; the last may be smaller."""
    return [order[start : start + size] for start in range(0, len(order), size)]
