"""Sentences that are lists of words with a tag each, from whatever `datasets` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt.task import Part
from mergeopt_problems.tables import Table, disjoint, parsed, quiet_datasets, read_parts

__all__ = ["Tagged", "TaggedTextSource", "read"]


@dataclass(frozen=True, slots=True)
class TaggedTextSource:
    """Where the words and tags of a task are; the `data` of a run file.

    Args:
        path: a parquet or json-lines file, a mapping of split names to such files, a folder, or `hf://owner/name[@revision]`.
        search: name of the split that candidates are scored on during a search.
        report: name of the split that results are reported on; None when nothing is held out.
        split_column: the column that names each row's split; by default `split` where a file has one.
        tokens: the column of lists of words.
        tags: the column of lists of tags, as many: names, or numbers (then `labels` names them).
        labels: names of the tags in the order of their numbers.
        where: column -> the value (or one of the values) that a row must have there to be kept; None for all rows.
        subset: configuration name of a hub data set.
    """

    path: str | Path | Mapping[str, str]
    search: str
    report: str | None = None
    split_column: str | None = None
    tokens: str = "tokens"
    tags: str = "tags"
    labels: Sequence[str] | None = None
    where: Mapping[str, Any] | None = None
    subset: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> TaggedTextSource:
        """Read the `data` mapping of a run file.

        Raises:
            ConfigError: a key is unknown or missing, `where` is no mapping, or search and report are the same split.
        """
        return parsed(cls, data)


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


def read(source: TaggedTextSource) -> dict[Part, Tagged]:
    """Read the sentences of each part, in the order of the rows.

    Sentences of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_parts(source, {"tokens": source.tokens, "tags": source.tags}, where=source.where)
        parts = {part: _tagged(table, source) for part, table in tables.items()}
    if "report" in parts:
        keys = {part: [tuple(words) for words in own.words] for part, own in parts.items()}
        parts["search"] = parts["search"].chosen(disjoint(keys["search"], keys["report"], source, "sentence"))
    return parts


def _tagged(table: Table, source: TaggedTextSource) -> Tagged:
    words, tags = list(table.rows[source.tokens]), list(table.rows[source.tags])
    named = []
    for row, (own, theirs) in enumerate(zip(words, tags, strict=True)):
        where = f"data: {table.where}, row {row}"
        if not isinstance(own, list) or not all(isinstance(word, str) for word in own):
            raise DataError(f"{where}: expected a list of words in the column {source.tokens!r}, got {own!r:.80}")
        if not isinstance(theirs, list) or len(theirs) != len(own):
            got = f"{len(theirs)} tags" if isinstance(theirs, list) else f"{theirs!r:.80}"
            raise DataError(f"{where}: expected one tag for each of {len(own)} words in the column {source.tags!r}, got {got}")
        named.append([_name(tag, source.labels, where) for tag in theirs])
    return Tagged(words, named)


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
