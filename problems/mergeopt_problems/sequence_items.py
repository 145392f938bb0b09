"""Encoded texts in a fixed order, with a class label or a number each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt_problems.content_hash import content_hash
from mergeopt_problems.sequences import Sequences

__all__ = ["SequenceItems"]


class SequenceItems:
    """The texts of one part of a task.

    Args:
        sequences: the texts, encoded.
        labels: class numbers, places in `names`, or numbers to be predicted; int64 or float64 [items].
        names: what the labels are called, where the data has names without an order; None where they are numbers.
        settings: how the texts were encoded; JSON-able, part of the hash.
    """

    def __init__(
        self,
        sequences: Sequences,
        labels: npt.NDArray[np.int64] | npt.NDArray[np.float64],
        *,
        names: Sequence[str] | None = None,
        settings: Mapping[str, Any],
    ) -> None:
        self.sequences = sequences
        self.labels = labels
        self.names = None if names is None else list(names)
        self.settings = dict(settings)
        self._hash = content_hash([*sequences.arrays, labels], {**self.settings, "names": self.names})

    @property
    def hash(self) -> str:
        """SHA-256 over token ids, segments, labels and how they were made."""
        return self._hash

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return what a model gets of one text, int64 [tokens] each, and its `label`: a class number, a class name, or a number."""
        batch = {name: rows[0] for name, rows in self.sequences.batch([index], 0).items()}
        label = self.labels[index].item()
        return {**batch, "label": label if self.names is None else self.names[label]}

    def named(self, places: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return class numbers int64 [items], where `places` holds the class number of each name."""
        return torch.from_numpy(places[self.labels.astype(np.int64)])
