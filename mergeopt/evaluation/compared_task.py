"""How far a candidate's predictions are from an expert's: a task whose records say so beside what they say anyway.

KL(expert || candidate) = sum_c p_c (log p_c - log q_c) in nats, over the task's own logits, of each thing predicted; of an item, the mean
over its own. It needs no labels. Source: Kullback and Leibler (1951), On information and sufficiency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mergeopt.batched_task import Batch, Indices, JudgedTask, batched_records
from mergeopt.forward import evaluating, forward
from mergeopt.models.layout import Layout
from mergeopt.task import Items, Part, Predictions, Records

__all__ = ["DIVERGENCE", "ComparedTask", "expert_model"]

DIVERGENCE = "kl"
"""The column of records that says how far predictions are from an expert's."""
MOST_LOGITS = 1 << 28  # of an expert on the items of a part, that are kept: a gigabyte
ELEMENTS = 1 << 22  # compared at a time

ExpertModel = Callable[[str], torch.nn.Module]
"""Returns a model of its own that holds an expert's weights."""


class ComparedTask:
    """A task whose records have one more column, `kl` (float64): KL(expert || candidate) by item.

    The expert is asked once per part, in the batches of a full scoring, and its logits are kept on the CPU. Where they are more than a
    gigabyte the expert stays in memory beside the candidates instead, and is asked again with every batch.

    Args:
        task: what is asked of both.
        expert: its name.
        model_of: returns a model of its own that holds an expert's weights, on the device where candidates are.
    """

    def __init__(self, task: JudgedTask, expert: str, model_of: ExpertModel) -> None:
        self.task, self.expert, self.name = task, expert, task.name
        self._model_of = model_of
        self._known: dict[Part, list[torch.Tensor] | None] = {}  # by item; None where they are too many
        self._model: torch.nn.Module | None = None

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
        rows = _rows(own)
        return {**made, DIVERGENCE: np.bincount(rows, weights=nats, minlength=len(items)) / np.bincount(rows, minlength=len(items))}

    def predictions(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Predictions:
        """Return what a model says of one batch."""
        return self.task.predictions(model, part, items, logits)

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return what a model says of some items, keeping the graph where gradients are on."""
        return self.task.predict(model, part, items, device)

    def _expected(self, part: Part, items: Indices, device: torch.device) -> torch.Tensor:
        """Return the expert's logits of some items, [things predicted, classes], item after item."""
        if part not in self._known:
            self._known[part] = self._asked(part, device)
        known = self._known[part]
        if known is not None:
            return torch.cat([known[item] for item in items])
        model = self._loaded()
        return torch.cat([self._said(model, part, batch, device).logits for batch in self.task.batches(model, part, items.tolist())])

    def _asked(self, part: Part, device: torch.device) -> list[torch.Tensor] | None:
        """Ask the expert about a whole part; return its logits by item, None where they are too many to keep."""
        model, room = self._loaded(), MOST_LOGITS
        found: dict[int, torch.Tensor] = {}
        for batch in self.task.batches(model, part):
            said = self._said(model, part, batch, device)
            room -= said.logits.numel()
            if room < 0:
                return None
            own = said.logits.cpu()
            counts = np.bincount(_rows(said), minlength=len(batch.items))
            found.update(zip(batch.items.tolist(), torch.split(own, counts.tolist()), strict=True))
        if all(known is not None for known in self._known.values()):
            self._model = None
        return [found[item] for item in range(len(self.items(part)))]

    def _said(self, model: torch.nn.Module, part: Part, batch: Batch, device: torch.device) -> Predictions:
        with evaluating(model):
            return self.task.predictions(model, part, batch.items, forward(model, batch.inputs, device))

    def _loaded(self) -> torch.nn.Module:
        if self._model is None:
            self._model = self._model_of(self.expert)
        return self._model


def expert_model(layout: Layout, expert: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Return a model of its own with the weights that the recipe of one expert alone makes: its own, in the type of the candidates.

    Args:
        layout: what candidates are made of.
        expert: its name; where heads are separate, the model has its head.
        dtype: of the weights.
        device: where it is put.
    """
    pool, head = layout.pool, layout.pool.head_of(expert)
    model = layout.live_model(dtype, device, head)
    names = pool.tensors.live if head is None else pool.heads[head].live
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for segment in layout.segments:
            state[names[segment.name]].copy_(pool.experts[expert].read(pool.stored(expert, segment.name), device))
    return model


def _divergences(expert: torch.Tensor, own: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return KL(expert || own) of logits [n, classes] in nats, [n]."""
    step = max(1, ELEMENTS // own.shape[1])
    parts = []
    for theirs, ours in zip(torch.split(expert, step), torch.split(own, step), strict=True):
        p, q = F.log_softmax(theirs.to(ours), dim=1), F.log_softmax(ours, dim=1)
        parts.append((p.exp() * (p - q)).sum(dim=1).double().cpu().numpy())
    return np.concatenate(parts)


def _rows(predictions: Predictions) -> npt.NDArray[np.int64]:
    found = torch.arange(len(predictions.logits)) if predictions.rows is None else predictions.rows
    return found.cpu().numpy()
