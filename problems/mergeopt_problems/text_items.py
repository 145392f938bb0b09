"""Windows of tokens in a fixed order: what a language model gets, and which of its predictions count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.errors import DataError
from mergeopt_problems.content_hash import content_hash
from mergeopt_problems.tokenization import Tokens

__all__ = ["IGNORED", "TextItems", "Window", "WindowBatch", "windows"]

IGNORED = -100
"""Label of a position whose prediction does not count; torch's and transformers' own."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Neighbouring tokens of one document.

    Args:
        tokens: two or more.
        context: how many of them, from the first on, are only read, at least 1; all others are predicted.
    """

    tokens: Tokens
    context: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class WindowBatch:
    """Some windows, padded on the right to the longest.

    Args:
        input_ids: all tokens of a window but its last, then zeros; int64 [n, t].
        attention_mask: 1 on tokens, 0 on padding; int64 [n, t].
        labels: the token after each position, `IGNORED` where it is context or padding; int64 [n, t].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model gets."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def windows(documents: Iterable[Tokens], window: int, stride: int) -> Iterator[Window]:
    """Cut documents into windows, in order; no window crosses from one document into the next.

    Windows start every `stride` tokens as long as there is something to predict, and the last may be shorter. Every token is predicted at
    most once, in the first window that can: never is a document's first token, nor, without overlap, any window's.

    Args:
        documents: tokenized.
        window: tokens of a window, at least 2.
        stride: from the start of one to the start of the next, in [1, window].
    """
    for document in documents:
        predicted = 0  # tokens before this one are context
        for start in range(0, len(document.ids), stride):
            end = min(start + window, len(document.ids))
            context = max(start + 1, predicted) - start
            if start + context < end:
                yield Window(Tokens(document.ids[start:end], document.sizes[start:end]), context)
            predicted = end


class TextItems:
    """The windows of one part of a task.

    Args:
        cut: the windows.
        settings: how they were made; JSON-able, part of the hash.

    Raises:
        DataError: there are none.
    """

    def __init__(self, cut: Sequence[Window], *, settings: Mapping[str, Any]) -> None:
        if not cut:
            raise DataError("expected at least one window of two tokens or more, got none")
        self.settings = dict(settings)
        self.lengths = np.asarray([len(one.tokens.ids) for one in cut], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._context = np.asarray([one.context for one in cut], dtype=np.int64)
        self._ids = np.concatenate([one.tokens.ids for one in cut])
        sizes = np.concatenate([one.tokens.sizes for one in cut])
        self.tokens: npt.NDArray[np.int64] = self.lengths - self._context
        self.bytes = np.asarray([one.tokens.sizes[one.context :].sum() for one in cut], dtype=np.int64)
        self._hash = content_hash([self.lengths, self._context, self._ids, sizes], self.settings)

    @property
    def hash(self) -> str:
        """SHA-256 over tokens, their bytes, the windows and how they were made."""
        return self._hash

    @property
    def highest(self) -> int:
        """The highest token id."""
        return int(self._ids.max())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return `input_ids` and `label`, int64 [tokens - 1]: the tokens but the last, and the token after each (`IGNORED`: not asked)."""
        batch = self.batch([index])
        return {"input_ids": batch.input_ids[0], "label": batch.labels[0]}

    def batch(self, items: Sequence[int] | npt.NDArray[np.intp]) -> WindowBatch:
        """Return some windows, in the order asked for."""
        chosen = np.asarray(items, dtype=np.int64)
        lengths, context = self.lengths[chosen], self._context[chosen]
        place = np.arange(int(lengths.max()))
        inside = place < lengths[:, None]
        ids = np.zeros(inside.shape, dtype=np.int64)
        ids[inside] = self._ids[(self._starts[chosen][:, None] + place)[inside]]
        labels = np.where(inside & (place >= context[:, None]), ids, IGNORED)
        # the last token of a window is read by no prediction
        read = place[:-1] < lengths[:, None] - 1
        inputs = np.where(read, ids[:, :-1], 0)
        return WindowBatch(torch.from_numpy(inputs), torch.from_numpy(read.astype(np.int64)), torch.from_numpy(labels[:, 1:].copy()))
