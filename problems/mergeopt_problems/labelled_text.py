"""Texts, or pairs of texts, with a class label or a number each, from whatever `datasets` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt.task import Part
from mergeopt_problems.data_source import Data, DataSource
from mergeopt_problems.labels import Labels, read_labels
from mergeopt_problems.overlap import Kept, separated
from mergeopt_problems.tables import Table, Tables, quiet_datasets, read_tables, texts

__all__ = ["LabelledTextSource", "ScoredTextSource", "Texts", "read_labelled", "read_scored"]

Rows = Sequence[int] | npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPairSource(DataSource):
    """Where texts, or pairs of texts, are.

    Args:
        text: the column of texts.
        text_b: the column of second texts, for pairs; None for single texts.
    """

    text: str = "text"
    text_b: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledTextSource(TextPairSource):
    """Where the texts and labels of a task are; the `data` of a run file.

    Args:
        label: the column of class numbers from 0, or of class names.
        labels: class names in the order of their numbers; None where the model's own names are the data's.
    """

    label: str = "label"
    labels: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTextSource(TextPairSource):
    """Where the texts and numbers of a task are; the `data` of a run file.

    Args:
        target: the column of numbers.
    """

    target: str = "target"


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts, or pairs of texts.

    Args:
        first: the texts.
        second: the second of each pair; None for single texts.
    """

    first: Sequence[str]
    second: Sequence[str] | None = None

    def chosen(self, rows: Rows) -> Texts:
        """Return some of them."""
        return Texts([self.first[row] for row in rows], None if self.second is None else [self.second[row] for row in rows])

    @property
    def keys(self) -> Sequence[Any]:
        """What tells them apart."""
        return self.first if self.second is None else list(zip(self.first, self.second, strict=True))


def read_labelled(source: LabelledTextSource) -> Data[tuple[Texts, Labels]]:
    """Read the texts and labels of each part, in the order of the rows.

    Texts of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = _tables(source, {"label": source.label})
        found = {part: _texts(table, source) for part, table in tables.parts.items()}
        labels = {part: read_labels(table.rows[source.label], source.labels, table.where) for part, table in tables.parts.items()}
        kept = _kept(found, tables.training, source)
    parts = {part: (found[part].chosen(rows), labels[part].chosen(rows)) for part, rows in kept.rows.items()}
    return Data(parts, kept.warnings)


def read_scored(source: ScoredTextSource) -> Data[tuple[Texts, npt.NDArray[np.float64]]]:
    """Read the texts and numbers of each part, in the order of the rows; copies as `read_labelled`.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = _tables(source, {"target": source.target})
        found = {part: _texts(table, source) for part, table in tables.parts.items()}
        targets = {part: _numbers(table, source.target) for part, table in tables.parts.items()}
        kept = _kept(found, tables.training, source)
    return Data({part: (found[part].chosen(rows), targets[part][list(rows)]) for part, rows in kept.rows.items()}, kept.warnings)


def _tables(source: TextPairSource, more: Mapping[str, str]) -> Tables:
    own = {"text": source.text} | ({} if source.text_b is None else {"text_b": source.text_b})
    return read_tables(source, {**own, **more}, item=list(own))


def _kept(found: Mapping[Part, Texts], training: Table | None, source: TextPairSource) -> Kept:
    keys = {part: own.keys for part, own in found.items()}
    return separated(keys, None if training is None else _texts(training, source).keys, source, "text")


def _texts(table: Table, source: TextPairSource) -> Texts:
    return Texts(texts(table, source.text), None if source.text_b is None else texts(table, source.text_b))


def _numbers(table: Table, column: str) -> npt.NDArray[np.float64]:
    values = list(table.rows[column])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"data: {table.where}, row {row}: expected a finite number in the column {column!r}, got {value!r:.80}")
    return np.asarray(values, dtype=np.float64)
