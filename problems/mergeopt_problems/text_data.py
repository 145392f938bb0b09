"""Documents from whatever `datasets` reads, and from plain text files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeopt.errors import DataError
from mergeopt.task import Part
from mergeopt_problems.tables import Table, disjoint, parsed, quiet_datasets, read_parts

__all__ = ["TextSource", "read"]


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where the documents of a task are; the `data` of a run file.

    Args:
        path: a parquet, csv or json-lines file with one document a row, a UTF-8 text file (.txt) that is one document, a mapping of split
            names to such files, a folder, or `hf://owner/name[@revision]`.
        search: name of the split that candidates are scored on during a search.
        report: name of the split that results are reported on; None when nothing is held out.
        split_column: the column that names each row's split; by default `split` where a file has one.
        text: the column of documents.
        where: column -> the value (or one of the values) that a row must have there to be kept; None for all rows.
        subset: configuration name of a hub data set.
    """

    path: str | Path | Mapping[str, str]
    search: str
    report: str | None = None
    split_column: str | None = None
    text: str = "text"
    where: Mapping[str, Any] | None = None
    subset: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> TextSource:
        """Read the `data` mapping of a run file.

        Raises:
            ConfigError: a key is unknown or missing, `where` is no mapping, or search and report are the same split.
        """
        return parsed(cls, data)


def read(source: TextSource) -> dict[Part, Sequence[str]]:
    """Read the documents of each part, in the order of the rows.

    Documents of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_parts(source, {"text": source.text}, where=source.where, text=True)
        parts: dict[Part, Sequence[str]] = {part: _documents(table, source.text) for part, table in tables.items()}
    if "report" in parts:
        search = parts["search"]
        parts["search"] = [search[row] for row in disjoint(search, parts["report"], source, "document")]
    return parts


def _documents(table: Table, column: str) -> list[str]:
    documents: list[str] = list(table.rows[column])
    for row, document in enumerate(documents):
        if not isinstance(document, str):
            raise DataError(f"data: {table.where}, row {row}: expected text in the column {column!r}, got {document!r:.80}")
    return documents
