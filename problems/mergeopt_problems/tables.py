"""Rows by split from whatever `datasets` reads: parquet, csv and json lines, text, folders, hub data sets."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import numpy.typing as npt

from mergeopt.cache import cache_folder
from mergeopt.errors import DataError, nearest
from mergeopt.task import Part
from mergeopt_problems.data_source import DataSource

__all__ = ["HUB_PREFIX", "Table", "Tables", "quiet_datasets", "read_tables", "texts"]

T = TypeVar("T")

HUB_PREFIX = "hf://"
FILES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
TEXT = ".txt"
SAVED = ("dataset_dict.json", "state.json")  # what `datasets` leaves in a folder that it saved
SAME_SPLIT = ("validation", "val", "valid", "dev")
FEW = 20
"""Values of a column that a message still lists."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The rows of one part.

    Args:
        rows: as `datasets` gives them; a column is `rows[name]`.
        where: what to call them in messages.
        folder: what paths in them are relative to.
    """

    rows: Any
    where: str
    folder: Path


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """All rows of a source.

    Args:
        parts: what candidates are scored on.
        training: what the models were trained on; None where it is not known.
    """

    parts: Mapping[Part, Table]
    training: Table | None = None


def read_tables(source: DataSource, columns: Mapping[str, str], *, item: Sequence[str], text: bool = False) -> Tables:
    """Read the rows of a source.

    Args:
        source: where they are.
        columns: what the rows must have: key of the run file -> column.
        item: those keys that make an item what it is; training data needs no others.
        text: whether text files are accepted, each a row of the one column `text`.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    splits = _by_column(_load(source.path, source.subset, text), source.path, source.split_column)
    kept = _where(splits, source)
    parts: dict[Part, Table] = {"search": _part(kept, source, source.search, columns)}
    if source.report is not None:
        parts["report"] = _part(kept, source, source.report, columns)
    own = {key: column for key, column in columns.items() if key in item}
    return Tables(parts, None if source.train is None else _training(splits, source, own, text))


def texts(table: Table, column: str) -> list[str]:
    """Return a column of texts.

    Raises:
        DataError: a value is no text.
    """
    found: list[str] = list(table.rows[column])
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"data: {table.where}, row {row}: expected text in the column {column!r}, got {text!r:.80}")
    return found


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and log lines of `datasets`: our own errors say what went wrong."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _load(path: str | Path | Mapping[str, str], subset: str | None, text: bool) -> dict[str, Any]:
    if isinstance(path, Mapping):
        return {str(split): _file(Path(file), subset, text) for split, file in path.items()}
    named = str(path)
    if named.startswith(HUB_PREFIX):
        name, _, revision = named.removeprefix(HUB_PREFIX).partition("@")
        return _read(named, lambda: dict(datasets.load_dataset(name, subset, revision=revision or None, cache_dir=_cache())))
    if not Path(named).is_dir():
        return {"train": _file(Path(named), subset, text)}
    if any((Path(named) / file).is_file() for file in SAVED):
        _check_subset(named, subset)
        saved = _read(named, lambda: datasets.load_from_disk(named))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    # else each line of a text would be a row of its own, and its end would be lost
    options = {"sample_by": "document"} if text and any(Path(named).rglob(f"*{TEXT}")) else {}
    return _read(named, lambda: dict(datasets.load_dataset(named, subset, cache_dir=_cache(), **options)))


def _file(path: Path, subset: str | None, text: bool) -> Any:
    if not path.is_file():
        hint = f"; for a data set of the hub write {HUB_PREFIX}{path}" if len(path.parts) == 2 and not path.suffix else ""
        raise DataError(f"data: no such file or folder: {path}{hint}")
    _check_subset(str(path), subset)
    if text and path.suffix.lower() == TEXT:
        return _read(str(path), lambda: datasets.Dataset.from_dict({"text": [path.read_bytes().decode("utf-8")]}))
    kind = FILES.get(path.suffix.lower())
    if kind is None:
        known = [*FILES, TEXT] if text else FILES
        raise DataError(f"data: cannot tell what {path} is; expected a folder or a file ending in {', '.join(known)}")
    # these readers, unlike load_dataset("parquet", ...), report no download count to the hub
    reader = getattr(datasets.Dataset, f"from_{kind}")
    return _read(str(path), lambda: reader(str(path), cache_dir=_cache()))


def _check_subset(named: str, subset: str | None) -> None:
    if subset is not None:
        raise DataError(f"data: subset: {named} has no configurations to choose from; leave the key out")


def _read(named: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"data: {named} holds no rows, or has a split without any") from error
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise DataError(f"data: cannot read {named}: {reason.splitlines()[0]}") from error


def _cache() -> str:
    return str(cache_folder() / "datasets")


def _by_column(loaded: dict[str, Any], path: object, split_column: str | None) -> Mapping[str, Any]:
    if len(loaded) != 1:
        return loaded
    (table,) = loaded.values()
    column = split_column or "split"
    if column not in table.column_names:
        if split_column is not None:
            raise DataError(f"data: {path} has no column {column!r}; {nearest(column, table.column_names)}")
        return loaded
    names = _as_text(table, column)
    return {str(name): table.select(np.flatnonzero(names == name)) for name in np.unique(names)}


def _where(splits: Mapping[str, Any], source: DataSource) -> Mapping[str, Any]:
    """Keep the rows that `where` asks for, split by split; values are compared as text."""
    for column, given in (source.where or {}).items():
        wanted = [str(value) for value in (given if isinstance(given, list | tuple) else [given])]
        for table in splits.values():
            if column not in table.column_names:
                raise DataError(f"data: where: {source.path} has no column {column!r}; {nearest(str(column), table.column_names)}")
        values = {name: _as_text(table, column) for name, table in splits.items()}
        known = {str(value) for found in values.values() for value in np.unique(found)}
        for value in wanted:
            if value not in known:
                listed = known if len(known) <= FEW else difflib.get_close_matches(value, sorted(known), n=FEW, cutoff=0.0)
                raise DataError(f"data: where: no row of {source.path} has {value!r} as its {column}; {nearest(value, listed)}")
        splits = {name: table.select(np.flatnonzero(np.isin(values[name], wanted))) for name, table in splits.items()}
    return splits


def _as_text(table: Any, column: str) -> npt.NDArray[np.str_]:
    return np.asarray([str(value) for value in table[column]], dtype=np.str_)


def _part(splits: Mapping[str, Any], source: DataSource, named: str, columns: Mapping[str, str]) -> Table:
    rows = splits.get(named)
    if rows is None and named in SAME_SPLIT:
        rows = next((splits[name] for name in SAME_SPLIT if name in splits), None)
    called = f"{source.path}, split {named!r}"
    if rows is None:
        raise DataError(f"data: {source.path} has no split {named!r}; {nearest(named, splits)}")
    if not len(rows):
        because = f" where {dict(source.where)}" if source.where else ""
        raise DataError(f"data: {called} is empty{because}; {nearest(named, (name for name, table in splits.items() if len(table)))}")
    _check_columns(rows, called, columns)
    first = next(iter(source.path.values())) if isinstance(source.path, Mapping) else source.path
    return Table(rows, called, Path(first).parent)


def _training(splits: Mapping[str, Any], source: DataSource, columns: Mapping[str, str], text: bool) -> Table:
    """Return what the models were trained on, all of it: `where` does not apply, since it need not have those columns."""
    named = str(source.train)
    if named in splits:
        tables, called = [splits[named]], f"{source.path}, split {named!r}"
    elif named.startswith(HUB_PREFIX) or Path(named).exists():
        other = _by_column(_load(named, None, text), named, None)
        tables, called = [other["train"]] if "train" in other else list(other.values()), named
    else:
        raise DataError(f"data: train: {source.path} has no split {named!r}, and there is no such file or folder; {nearest(named, splits)}")
    for table in tables:
        _check_columns(table, called, columns)
    rows = {column: [value for table in tables for value in table[column]] for column in columns.values()}
    return Table(rows, called, Path(str(source.path if named in splits else named)).parent)


def _check_columns(rows: Any, called: str, columns: Mapping[str, str]) -> None:
    for key, column in columns.items():
        if column not in rows.column_names:
            raise DataError(f"data: {called} has no column {column!r} ({key}); {nearest(column, rows.column_names)}")
