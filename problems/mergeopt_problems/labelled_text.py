"""Texts, or pairs of texts, with a class label or a number each, from whatever `datasets` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt.task import Part
from mergeopt_problems.labels import Labels, read_labels
from mergeopt_problems.tables import Table, disjoint, parsed, quiet_datasets, read_parts

__all__ = ["LabelledTextSource", "ScoredTextSource", "Texts", "read_labelled", "read_scored"]

Rows = Sequence[int] | npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class LabelledTextSource:
    """Where the texts and labels of a task are; the `data` of a run file.

    Args:
        path: a parquet, csv or json-lines file, a mapping of split names to such files, a folder, or `hf://owner/name[@revision]`.
        search: name of the split that candidates are scored on during a search.
        report: name of the split that results are reported on; None when nothing is held out.
        split_column: the column that names each row's split; by default `split` where a file has one.
        text: the column of texts.
        text_b: the column of second texts, for pairs; None for single texts.
        label: the column of class numbers from 0, or of class names.
        labels: class names in the order of their numbers; None where the model's own names are the data's.
        where: column -> the value (or one of the values) that a row must have there to be kept; None for all rows.
        subset: configuration name of a hub data set.
    """

    path: str | Path | Mapping[str, str]
    search: str
    report: str | None = None
    split_column: str | None = None
    text: str = "text"
    text_b: str | None = None
    label: str = "label"
    labels: Sequence[str] | None = None
    where: Mapping[str, Any] | None = None
    subset: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> LabelledTextSource:
        """Read the `data` mapping of a run file.

        Raises:
            ConfigError: a key is unknown or missing, `where` is no mapping, or search and report are the same split.
        """
        return parsed(cls, data)


@dataclass(frozen=True, slots=True)
class ScoredTextSource:
    """Where the texts and numbers of a task are; the `data` of a run file.

    Args:
        path: as `LabelledTextSource`; so are `search`, `report`, `split_column`, `text`, `text_b`, `where` and `subset`.
        target: the column of numbers.
    """

    path: str | Path | Mapping[str, str]
    search: str
    report: str | None = None
    split_column: str | None = None
    text: str = "text"
    text_b: str | None = None
    target: str = "target"
    where: Mapping[str, Any] | None = None
    subset: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ScoredTextSource:
        """Read the `data` mapping of a run file.

        Raises:
            ConfigError: a key is unknown or missing, `where` is no mapping, or search and report are the same split.
        """
        return parsed(cls, data)


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


def read_labelled(source: LabelledTextSource) -> dict[Part, tuple[Texts, Labels]]:
    """Read the texts and labels of each part, in the order of the rows.

    Texts of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_parts(source, {**_columns(source), "label": source.label}, where=source.where)
        texts = {part: _texts(table, source) for part, table in tables.items()}
        labels = {part: read_labels(table.rows[source.label], source.labels, table.where) for part, table in tables.items()}
    kept = _kept(texts, source)
    return {part: (texts[part].chosen(rows), labels[part].chosen(rows)) for part, rows in kept.items()}


def read_scored(source: ScoredTextSource) -> dict[Part, tuple[Texts, npt.NDArray[np.float64]]]:
    """Read the texts and numbers of each part, in the order of the rows; copies as `read_labelled`.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_parts(source, {**_columns(source), "target": source.target}, where=source.where)
        texts = {part: _texts(table, source) for part, table in tables.items()}
        targets = {part: _numbers(table, source.target) for part, table in tables.items()}
    kept = _kept(texts, source)
    return {part: (texts[part].chosen(rows), targets[part][rows]) for part, rows in kept.items()}


def _columns(source: LabelledTextSource | ScoredTextSource) -> dict[str, str]:
    return {"text": source.text} | ({} if source.text_b is None else {"text_b": source.text_b})


def _kept(texts: Mapping[Part, Texts], source: LabelledTextSource | ScoredTextSource) -> dict[Part, list[int]]:
    kept: dict[Part, list[int]] = {part: list(range(len(own.first))) for part, own in texts.items()}
    if "report" in texts:
        kept["search"] = disjoint(texts["search"].keys, texts["report"].keys, source, "text")
    return kept


def _texts(table: Table, source: LabelledTextSource | ScoredTextSource) -> Texts:
    return Texts(_text(table, source.text), None if source.text_b is None else _text(table, source.text_b))


def _text(table: Table, column: str) -> list[str]:
    texts: list[str] = list(table.rows[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"data: {table.where}, row {row}: expected text in the column {column!r}, got {text!r:.80}")
    return texts


def _numbers(table: Table, column: str) -> npt.NDArray[np.float64]:
    values = list(table.rows[column])
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"data: {table.where}, row {row}: expected a finite number in the column {column!r}, got {value!r:.80}")
    return np.asarray(values, dtype=np.float64)
