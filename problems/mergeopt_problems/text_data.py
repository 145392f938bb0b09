"""Documents from whatever `datasets` reads, and from plain text files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergeopt_problems.data_source import Data, DataSource
from mergeopt_problems.overlap import separated
from mergeopt_problems.tables import quiet_datasets, read_tables, texts

__all__ = ["TextSource", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource(DataSource):
    """Where the documents of a task are; the `data` of a run file. A UTF-8 text file (.txt) is one document.

    Args:
        text: the column of documents.
    """

    text: str = "text"


def read(source: TextSource) -> Data[Sequence[str]]:
    """Read the documents of each part, in the order of the rows.

    Documents of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_tables(source, {"text": source.text}, item=["text"], text=True)
        parts = {part: texts(table, source.text) for part, table in tables.parts.items()}
        training = None if tables.training is None else texts(tables.training, source.text)
    kept = separated(parts, training, source, "document")
    return Data({part: [parts[part][row] for row in rows] for part, rows in kept.rows.items()}, kept.warnings)
