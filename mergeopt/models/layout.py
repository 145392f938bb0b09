"""What is being made: the flat order of all merged tensors, and the live model whose weights they become."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergeopt.models.architecture import take_generation_settings
from mergeopt.models.carry import KINDS
from mergeopt.models.groups import layer_labels
from mergeopt.models.hollow import HollowCheckpoint
from mergeopt.models.pool import Pool

__all__ = ["Layout", "Segment"]

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """One merged tensor's place in a flat row.

    Args:
        name: stored name.
        live: name in the live model.
        start: first element.
        end: one past the last element.
        shape: of the tensor.
        layer: label of its layer.
    """

    name: str
    live: str
    start: int
    end: int
    shape: tuple[int, ...]
    layer: str


class Layout:
    """The flat order of a pool's merged tensors, in the model's order, each starting at a multiple of 64 elements.

    Args:
        pool: the models.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        segments: list[Segment] = []
        start = 0
        for name, layer in zip(pool.names, layer_labels(pool.names), strict=True):
            spec = pool.spec(name)
            segments.append(Segment(name, pool.tensors.live[name], start, start + spec.elements, spec.shape, layer))
            start += -(-spec.elements // ALIGNMENT) * ALIGNMENT
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.size = start

    @property
    def elements(self) -> int:
        """Number of merged parameters, padding not counted."""
        return sum(segment.end - segment.start for segment in self.segments)

    def live_model(self, dtype: torch.dtype, device: torch.device, head: str | None = None, *, hollow: bool = False) -> torch.nn.Module:
        """Return a new model in evaluation mode holding the base's weights; counters are the largest of all sources.

        Args:
            dtype: of its weights.
            device: where it is.
            head: where heads are separate, the expert whose head it has; its merged tensors are then that expert's.
            hollow: whether merged tensors take no memory: they hold NaN until others take their places. Such a model is on the CPU, and a
                bare module is whole at first.

        Raises:
            SourceError: a tensor left as it is in the base holds NaN or infinities (merged ones are checked as they are read).
        """
        pool, own = self.pool, None if head is None else self.pool.heads[head]
        for name in pool.coverage.excluded:
            pool.read_base(name)
        architecture, checkpoint = (pool.architecture, pool.base) if own is None else (own.architecture, own.checkpoint)
        merged = {pool.stored(head or "base", segment.name) for segment in self.segments if hollow}
        merged |= {name for name, first in pool.tensors.tied.items() if first in merged}
        model = architecture.load(HollowCheckpoint(checkpoint, merged, dtype) if hollow else checkpoint, dtype).requires_grad_(False)
        model = model if hollow else model.to(device)
        for file in (file for name, file in pool.carry.files.items() if name in KINDS["generation"]):
            take_generation_settings(model, file.parent)  # an export generates by the settings that are handed on with it
        state = model.state_dict(keep_vars=True)
        live = pool.tensors.live if own is None else own.live
        for name, reason in pool.coverage.copied.items():
            if reason.startswith("counter"):
                state[live[name]].copy_(pool.copied(name))
        for name in pool.coverage.excluded if own is not None else ():
            state[live[name]].copy_(pool.read_base(name))
        return model
