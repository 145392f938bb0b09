"""Sentences that are lists of words with a tag each, from whatever `datasets` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt_problems.data_source import Data, DataSource
from mergeopt_problems.overlap import separated
from mergeopt_problems.tables import Table, quiet_datasets, read_tables

__all__ = ["Tagged", "TaggedTextSource", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedTextSource(DataSource):
    """Where the words and tags of a task are, lists in columns of parquet or json-lines files; the `data` of a run file.

    Args:
        tokens: the column of lists of words.
        tags: the column of lists of tags, as many: names, or numbers (then `labels` names them).
        labels: names of the tags in the order of their numbers.
    """

    tokens: str = "tokens"
    tags: str = "tags"
    labels: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tagged:
    """Sentences.

    Args:
        words: of each sentence.
        tags: names, as many.
    """

    words: Sequence[Sequence[str]]
    tags: Sequence[Sequence[str]]

    def chosen(self, rows: Sequence[int] | npt.NDArray[np.intp]) -> Tagged:
        """Return some of them."""
        return Tagged([self.words[row] for row in rows], [self.tags[row] for row in rows])

    @property
    def kinds(self) -> npt.NDArray[np.str_]:
        """The rarest type of entity in each sentence, by how many sentences have it, or `O` where there is none; [sentences]."""
        types = [sorted({tag[2:] for tag in own if tag != "O"}) for own in self.tags]
        count = Counter(kind for own in types for kind in own)
        return np.asarray([min(own, key=lambda kind: (count[kind], kind)) if own else "O" for own in types])


def read(source: TaggedTextSource) -> Data[Tagged]:
    """Read the sentences of each part, in the order of the rows.

    Sentences of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_tables(source, {"tokens": source.tokens, "tags": source.tags}, item=["tokens"])
        parts = {part: _tagged(table, source) for part, table in tables.parts.items()}
        training = None if tables.training is None else _words(tables.training, source.tokens)
    keys = {part: [tuple(words) for words in own.words] for part, own in parts.items()}
    kept = separated(keys, None if training is None else [tuple(words) for words in training], source, "sentence")
    return Data({part: parts[part].chosen(rows) for part, rows in kept.rows.items()}, kept.warnings)


def _tagged(table: Table, source: TaggedTextSource) -> Tagged:
    words, tags = _words(table, source.tokens), list(table.rows[source.tags])
    named = []
    for row, (own, theirs) in enumerate(zip(words, tags, strict=True)):
        where = f"data: {table.where}, row {row}"
        if not isinstance(theirs, list) or len(theirs) != len(own):
            got = f"{len(theirs)} tags" if isinstance(theirs, list) else f"{theirs!r:.80}"
            raise DataError(f"{where}: expected one tag for each of {len(own)} words in the column {source.tags!r}, got {got}")
        named.append([_name(tag, source.labels, where) for tag in theirs])
    return Tagged(words, named)


def _words(table: Table, column: str) -> list[list[str]]:
    words: list[list[str]] = list(table.rows[column])
    for row, own in enumerate(words):
        if not isinstance(own, list) or not all(isinstance(word, str) for word in own):
            raise DataError(f"data: {table.where}, row {row}: expected a list of words in the column {column!r}, got {own!r:.80}")
    return words


def _name(tag: Any, labels: Sequence[str] | None, where: str) -> str:
    if isinstance(tag, str):
        return tag
    if isinstance(tag, bool) or not isinstance(tag, int):
        raise DataError(f"{where}: expected tags that are names or numbers, got {tag!r:.80}")
    if labels is None:
        raise DataError(f"{where}: the tags are numbers ({tag}, say); give `labels:`, the names of the tags in the order of their numbers")
    if not 0 <= tag < len(labels):
        raise DataError(f"{where}: the tag {tag} is not among the {len(labels)} `labels` (0 to {len(labels) - 1})")
    return str(labels[tag])
