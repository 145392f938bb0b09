"""How far a candidate's predictions are from an expert's: a task whose records say so beside what they say anyway.

KL(expert || candidate) = sum_c p_c (log p_c - log q_c) in nats, over the task's own logits, of each thing predicted; of an item, the mean
over its own. It needs no labels. Source: Kullback and Leibler (1951), On information and sufficiency.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mergeopt.batched_task import Batch, Indices, JudgedTask, batched_records
from mergeopt.evaluation.expert_logits import ExpertLogits, ExpertModel, rows_of
from mergeopt.task import Items, Part, Predictions, Records

__all__ = ["DIVERGENCE", "ComparedTask"]

DIVERGENCE = "kl"
"""The column of records that says how far predictions are from an expert's."""
ELEMENTS = 1 << 22  # compared at a time


class ComparedTask:
    """A task whose records have one more column, `kl` (float64): KL(expert || candidate) by item.

    Args:
        task: what is asked of both.
        expert: its name.
        model_of: returns a model of its own that holds an expert's weights, on the device where candidates are.
    """

    def __init__(self, task: JudgedTask, expert: str, model_of: ExpertModel) -> None:
        self.task, self.expert, self.name = task, expert, task.name
        self._expected = ExpertLogits(task, expert, model_of)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that the task has data for."""
        return self.task.parts

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {**getattr(self.task, "settings", {}), "compared_with": self.expert}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the task's data has to say of its own worth."""
        return tuple(getattr(self.task, "warnings", ()))

    def items(self, part: Part) -> Items:
        """Return the items of a part."""
        return self.task.items(part)

    def check(self, model: torch.nn.Module) -> None:
        """Raise `DataError` when the model cannot be asked."""
        self.task.check(model)

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        """Return the records of some items, None for all: the columns of `record`."""
        return batched_records(self, model, part, device, items)

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield the batches of the task."""
        return self.task.batches(model, part, items)

    def record(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Records:
        """Return what the task records of one batch, and `kl`.

        Raises:
            CandidateError: a logit is not finite.
        """
        made = self.task.record(model, part, items, logits)
        own = self.task.predictions(model, part, items, logits)
        nats = _divergences(self._expected(part, items, logits.device), own.logits)
        rows = rows_of(own)
        return {**made, DIVERGENCE: np.bincount(rows, weights=nats, minlength=len(items)) / np.bincount(rows, minlength=len(items))}

    def predictions(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Predictions:
        """Return what a model says of one batch."""
        return self.task.predictions(model, part, items, logits)

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return what a model says of some items, keeping the graph where gradients are on."""
        return self.task.predict(model, part, items, device)


def _divergences(expert: torch.Tensor, own: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return KL(expert || own) of logits [n, classes] in nats, [n]."""
    step = max(1, ELEMENTS // own.shape[1])
    parts = []
    for theirs, ours in zip(torch.split(expert, step), torch.split(own, step), strict=True):
        p, q = F.log_softmax(theirs.to(ours), dim=1), F.log_softmax(ours, dim=1)
        parts.append((p.exp() * (p - q)).sum(dim=1).double().cpu().numpy())
    return np.concatenate(parts)
