"""Models without memory for their merged weights: every number of these is one and the same NaN, until other tensors take their places."""

from __future__ import annotations

from collections.abc import Collection

import torch

from mergeopt.models.checkpoint import Checkpoint

__all__ = ["HollowCheckpoint", "hollow_tensor"]


def hollow_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a tensor that takes no memory: a NaN, seen at every place."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


class HollowCheckpoint:
    """A checkpoint, some of whose tensors take no memory when they are read.

    Args:
        checkpoint: the whole one.
        hollow: names of the tensors that are not read from it.
        dtype: of these, that of the model to be made: in another one, they would be converted, into memory.
    """

    def __init__(self, checkpoint: Checkpoint, hollow: Collection[str], dtype: torch.dtype) -> None:
        self._checkpoint, self._hollow, self._dtype = checkpoint, frozenset(hollow), dtype

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._checkpoint.names

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, as it is or hollow."""
        return hollow_tensor(self._checkpoint.spec(name).shape, self._dtype) if name in self._hollow else self._checkpoint.read(name)
