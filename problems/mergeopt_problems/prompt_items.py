"""Encoded prompts in a fixed order, with a reference text each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergeopt_problems.content_hash import content_hash
from mergeopt_problems.sequences import Sequences

__all__ = ["PromptItems"]


class PromptItems:
    """The prompts of one part of a task.

    Args:
        sequences: the prompts, encoded.
        references: what a model should say to each.
        settings: how the prompts were encoded; JSON-able, part of the hash.
    """

    def __init__(self, sequences: Sequences, references: Sequence[str], *, settings: Mapping[str, Any]) -> None:
        self.sequences = sequences
        self.references = list(references)
        self.settings = dict(settings)
        self._hash = content_hash(sequences.arrays, {**self.settings, "references": self.references})

    @property
    def hash(self) -> str:
        """SHA-256 over token ids, references and how they were made."""
        return self._hash

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Return what a model gets of one prompt, int64 [tokens] each, and its `label`: the reference."""
        return {**{name: rows[0] for name, rows in self.sequences.batch([index], 0).items()}, "label": self.references[index]}
