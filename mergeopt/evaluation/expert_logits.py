"""What an expert says of a task's items: its logits, as losses and metrics compare candidates with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import BatchedTask
from mergeopt.models.layout import Layout
from mergeopt.task import DifferentiableTask, Part, Predictions

__all__ = ["ExpertLogits", "ExpertModel", "expert_model", "rows_of"]

MOST_LOGITS = 1 << 28  # of an expert on the items of a part, that are kept: a gigabyte

ExpertModel = Callable[[str], torch.nn.Module]
"""Returns a model of its own that holds an expert's weights."""


class ExpertLogits:
    """An expert's logits of a task's items.

    The expert is asked once per part, in the batches of a full scoring, and its logits are kept on the CPU. Where they are more than a
    gigabyte the expert stays in memory beside the candidates instead, and is asked again for every batch.

    Args:
        task: what is asked.
        expert: its name.
        model_of: returns a model of its own that holds an expert's weights, on the device where candidates are.
    """

    def __init__(self, task: DifferentiableTask, expert: str, model_of: ExpertModel) -> None:
        self.task, self.expert = task, expert
        self._model_of = model_of
        self._known: dict[Part, list[torch.Tensor] | None] = {}  # by item; None where they are too many
        self._model: torch.nn.Module | None = None

    def __call__(self, part: Part, items: Sequence[int] | npt.NDArray[np.intp], device: torch.device) -> torch.Tensor:
        """Return the logits of some items, item after item, [things predicted, classes]; where they are kept they are on the CPU.

        Args:
            part: which data.
            items: distinct indices, one batch.
            device: where candidates are.
        """
        if part not in self._known:
            self._known[part] = self._asked(part, device)
        known = self._known[part]
        if known is None:
            return self._said(self._loaded(), part, [int(item) for item in items], device).logits
        return torch.cat([known[item] for item in items])

    def _asked(self, part: Part, device: torch.device) -> list[torch.Tensor] | None:
        """Ask the expert about a whole part; return its logits by item, None where they are too many to keep."""
        model, room = self._loaded(), MOST_LOGITS
        found: dict[int, torch.Tensor] = {}
        for items in self._batches(model, part):
            said = self._said(model, part, items, device)
            room -= said.logits.numel()
            if room < 0:
                return None
            counts = np.bincount(rows_of(said), minlength=len(items))
            found.update(zip(items, torch.split(said.logits.cpu(), counts.tolist()), strict=True))
        if all(known is not None for known in self._known.values()):
            self._model = None
        return [found[item] for item in range(len(self.task.items(part)))]

    def _batches(self, model: torch.nn.Module, part: Part) -> list[list[int]]:
        if isinstance(self.task, BatchedTask):
            return [batch.items.tolist() for batch in self.task.batches(model, part)]
        return [[item] for item in range(len(self.task.items(part)))]

    def _said(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        with torch.no_grad():  # not inference mode: losses keep what they compare with
            return self.task.predict(model, part, items, device)

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


def rows_of(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Return which of the items asked for each prediction is of, as its place among them, [n]."""
    found = torch.arange(len(predictions.logits)) if predictions.rows is None else predictions.rows
    return found.cpu().numpy()
