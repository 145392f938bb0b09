"""Encoded texts in a fixed order, and the encoded texts that a model is to write of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt_problems.content_hash import content_hash
from mergeopt_problems.sequences import Sequences
from mergeopt_problems.text_items import IGNORED
from mergeopt_problems.tokenization import Tokens

__all__ = ["PairItems"]


class PairItems:
    """The pairs of one part of a task.

    Args:
        sources: what is read.
        targets: what is to be written, as many, of one token or more each.
        settings: how both were encoded; JSON-able, part of the hash.
    """

    def __init__(self, sources: Sequence[Tokens], targets: Sequence[Tokens], *, settings: Mapping[str, Any]) -> None:
        self.sources = Sequences([own.ids.tolist() for own in sources])
        self.targets = Sequences([own.ids.tolist() for own in targets])
        self.bytes = np.asarray([own.sizes.sum() for own in targets], dtype=np.int64)
        self.settings = dict(settings)
        self._hash = content_hash([*self.sources.arrays, *self.targets.arrays, self.bytes], self.settings)

    @property
    def hash(self) -> str:
        """SHA-256 over the token ids of both, bytes of the targets and how they were made."""
        return self._hash

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return `input_ids`, `attention_mask` and `label`, int64 [tokens]: what is read, and what is to be written."""
        source = {name: rows[0] for name, rows in self.sources.batch([index], 0).items()}
        return {**source, "label": self.labels([index])[0]}

    def labels(self, items: Sequence[int] | npt.NDArray[np.intp]) -> torch.Tensor:
        """Return the token ids of some targets, `IGNORED` after their ends; int64 [n, t]."""
        return self.targets.batch(items, IGNORED)["input_ids"]
