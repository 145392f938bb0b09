"""Prompts with what is to be said to them, from whatever `datasets` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt_problems.data_source import Data, DataSource
from mergeopt_problems.overlap import separated
from mergeopt_problems.tables import Table, quiet_datasets, read_tables, texts

__all__ = ["PromptSource", "Prompts", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource(DataSource):
    """Where the prompts and references of a task are; the `data` of a run file.

    Args:
        prompt: the column of what a model is given.
        reference: the column of what it should say to it: text, or whole numbers.
    """

    prompt: str = "prompt"
    reference: str = "reference"


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Prompts, and a reference for each."""

    prompts: Sequence[str]
    references: Sequence[str]

    def chosen(self, rows: Sequence[int] | npt.NDArray[np.intp]) -> Prompts:
        """Return some of them."""
        return Prompts([self.prompts[row] for row in rows], [self.references[row] for row in rows])


def read(source: PromptSource) -> Data[Prompts]:
    """Read the prompts and references of each part, in the order of the rows.

    Prompts of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_tables(source, {"prompt": source.prompt, "reference": source.reference}, item=["prompt"])
        parts = {part: Prompts(texts(table, source.prompt), _references(table, source.reference)) for part, table in tables.parts.items()}
        training = None if tables.training is None else texts(tables.training, source.prompt)
    kept = separated({part: own.prompts for part, own in parts.items()}, training, source, "prompt")
    return Data({part: parts[part].chosen(rows) for part, rows in kept.rows.items()}, kept.warnings)


def _references(table: Table, column: str) -> list[str]:
    values = list(table.rows[column])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"data: {table.where}, row {row}: expected text or a whole number in the column {column!r}, got {value!r:.80}")
    return [str(value) for value in values]
