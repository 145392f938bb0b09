"""Prepared images in a fixed order: what a model gets, kept in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.errors import DataError
from mergeopt.recipe import canonical_json

__all__ = ["ImageItems"]


class ImageItems:
    """The images of one part of a task.

    Args:
        pixels: prepared images, float32 [items, channels, height, width].
        labels: class numbers from 0, int64 [items].
        settings: how the pixels were prepared; JSON-able, part of the hash.

    Raises:
        DataError: there are no items, a label is negative, or the shapes are others than these.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor, *, settings: Mapping[str, Any]) -> None:
        if pixels.ndim != 4 or labels.shape != pixels.shape[:1]:
            raise DataError(f"expected pixels [n, C, H, W] and labels [n], got {list(pixels.shape)} and {list(labels.shape)}")
        if not len(labels):
            raise DataError("expected at least one image, got none")
        if int(labels.min()) < 0:
            raise DataError(f"expected class numbers from 0, got the label {int(labels.min())}; leave unlabelled images out")
        self.pixels = pixels.to(torch.float32).contiguous()
        self.labels = labels.to(torch.int64).contiguous()
        self.settings = dict(settings)
        self._hash = _digest(self.pixels, self.labels, self.settings)

    @property
    def hash(self) -> str:
        """SHA-256 over shape, pixels, labels and preparation."""
        return self._hash

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return `pixel_values`, float32 [channels, height, width], and `label`, an int."""
        return {"pixel_values": self.pixels[index], "label": int(self.labels[index])}


def _digest(pixels: torch.Tensor, labels: torch.Tensor, settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(canonical_json([list(pixels.shape), dict(settings)]).encode())
    for tensor in (pixels, labels):
        raw: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(raw.data)
    return digest.hexdigest()
