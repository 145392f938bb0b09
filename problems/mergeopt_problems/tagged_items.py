"""Encoded sentences in a fixed order, with a tag at the first token of each word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt_problems.content_hash import content_hash
from mergeopt_problems.sequences import Sequences
from mergeopt_problems.text_items import IGNORED

__all__ = ["TaggedItems"]


class TaggedItems:
    """The sentences of one part of a task.

    Args:
        sequences: the sentences, encoded.
        positions: of the first token of each word, -1 where none stands for it; int64 [words] each.
        tags: of each word, by name.
        settings: how the sentences were encoded; JSON-able, part of the hash.
    """

    def __init__(
        self,
        sequences: Sequences,
        positions: Sequence[npt.NDArray[np.int64]],
        tags: Sequence[Sequence[str]],
        *,
        settings: Mapping[str, Any],
    ) -> None:
        self.sequences = sequences
        self.settings = dict(settings)
        self.words = np.asarray([len(own) for own in positions], dtype=np.int64)
        self._starts = np.cumsum(self.words) - self.words
        self.positions = np.concatenate(list(positions))
        self.names: list[str] = sorted({tag for own in tags for tag in own})
        place = {name: index for index, name in enumerate(self.names)}
        self.tags = np.asarray([place[tag] for own in tags for tag in own], dtype=np.int64)
        self._hash = content_hash([*sequences.arrays, self.words, self.positions, self.tags], {**self.settings, "names": self.names})

    @property
    def hash(self) -> str:
        """SHA-256 over token ids, segments, tags, their places and how they were made."""
        return self._hash

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return what a model gets of one sentence and its `label`, int64 [tokens] each.

        The label of a word's first token is the place of its tag in `names`, that of any other token -100, which no loss counts.
        """
        batch = {name: rows[0] for name, rows in self.sequences.batch([index], 0).items()}
        label = torch.full_like(batch["input_ids"], IGNORED)
        _, positions, words = self.asked([index])
        label[torch.from_numpy(positions)] = torch.from_numpy(self.tags[words])
        return {**batch, "label": label}

    def asked(
        self, items: Sequence[int] | npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the words of some sentences that a token stands for, sentence after sentence.

        Returns:
            Row among `items`, position in the sentence, and place among all words of the part; int64 [words] each.
        """
        rows = np.repeat(np.arange(len(items)), self.words[np.asarray(items, dtype=np.intp)])
        words = self.words_of(items)
        read = self.positions[words] >= 0
        return rows[read], self.positions[words][read], words[read]

    def words_of(self, items: Sequence[int] | npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Return the places of all words of some sentences among those of the part, sentence after sentence, int64 [words]."""
        chosen = np.asarray(items, dtype=np.intp)
        counts = self.words[chosen]
        return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(self._starts[chosen], counts)
