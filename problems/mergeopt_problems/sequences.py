"""Texts as token ids, of many lengths, and the padded batches that a model gets of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import asked_items

__all__ = ["Sequences"]


class Sequences:
    """Token ids of some texts, in a fixed order.

    Args:
        ids: of each text, one or more.
        types: segment of each token (0 the first text, 1 the second), of the same lengths; None where the tokenizer names none.
    """

    def __init__(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> None:
        self.lengths = np.asarray([len(one) for one in ids], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._ids = _flat(ids)
        self._types = None if types is None else _flat(types)

    @property
    def arrays(self) -> list[npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
        """All that they hold, for a content hash."""
        return [self.lengths, self._ids, *([] if self._types is None else [self._types])]

    @property
    def highest(self) -> int:
        """The highest token id."""
        return int(self._ids.max())

    @property
    def highest_type(self) -> int:
        """The highest segment, 0 where there are none."""
        return 0 if self._types is None else int(self._types.max())

    def __len__(self) -> int:
        return len(self.lengths)

    def chosen(self, items: npt.NDArray[np.intp]) -> Sequences:
        """Return some of them."""
        types = None if self._types is None else [self._of(self._types, item) for item in items]
        return Sequences([self._of(self._ids, item) for item in items], types)

    def batch(self, items: Sequence[int] | npt.NDArray[np.intp], padding: int, *, left: bool = False) -> dict[str, torch.Tensor]:
        """Return some texts, in the order asked for, padded to the longest.

        Args:
            items: which.
            padding: token id that stands after a text's end.
            left: whether it stands before its start instead, for models that are to go on with the text.

        Returns:
            `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and, where there are segments, `token_type_ids`: int64 [n, t].
        """
        rows = np.asarray(items, dtype=np.int64)
        lengths = self.lengths[rows]
        place = np.arange(int(lengths.max()))
        shift = int(lengths.max()) - lengths if left else np.zeros_like(lengths)
        inside = (place >= shift[:, None]) & (place < (shift + lengths)[:, None])
        source = ((self._starts[rows] - shift)[:, None] + place)[inside]
        made = {"input_ids": _filled(inside, self._ids[source], padding), "attention_mask": torch.from_numpy(inside.astype(np.int64))}
        if self._types is not None:
            made["token_type_ids"] = _filled(inside, self._types[source], 0)
        return made

    def longest_first(self, items: Sequence[int] | None = None) -> npt.NDArray[np.intp]:
        """Return some items, None for all, from the longest to the shortest, so that batches of neighbours are padded little."""
        asked = asked_items(len(self), items)
        return asked[np.argsort(-self.lengths[asked], kind="stable")]

    def _of(self, flat: npt.NDArray[np.int32], item: int) -> list[int]:
        start = self._starts[item]
        found: list[int] = flat[start : start + self.lengths[item]].tolist()
        return found


def _flat(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.empty(0, dtype=np.int32)


def _filled(inside: npt.NDArray[np.bool_], values: npt.NDArray[np.int32], otherwise: int) -> torch.Tensor:
    table = np.full(inside.shape, otherwise, dtype=np.int64)
    table[inside] = values
    return torch.from_numpy(table)
