"""Rows by split from whatever `datasets` reads: parquet, csv and json lines, text, folders, hub data sets."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import numpy as np
import numpy.typing as npt

from mergeopt.cache import cache_folder
from mergeopt.errors import ConfigError, DataError, nearest
from mergeopt.task import Part

__all__ = ["HUB_PREFIX", "Table", "TableSource", "disjoint", "parsed", "quiet_datasets", "read_parts"]

log = logging.getLogger(__name__)

S = TypeVar("S", bound="TableSource")
T = TypeVar("T")

HUB_PREFIX = "hf://"
FILES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
TEXT = ".txt"
SAME_SPLIT = ("validation", "val", "valid", "dev")
FEW = 20
"""Values of a column that a message still lists."""


class TableSource(Protocol):
    """Where the rows of a task are; what every `data` of a run file has. Its implementations are dataclasses.

    Args:
        path: a file, a mapping of split names to files, a folder, or `hf://owner/name[@revision]`.
        search: name of the split that candidates are scored on during a search.
        report: name of the split that results are reported on; None when nothing is held out.
        split_column: the column that names each row's split; by default `split` where a file has one.
        subset: configuration name of a hub data set.
    """

    @property
    def path(self) -> str | Path | Mapping[str, str]: ...
    @property
    def search(self) -> str: ...
    @property
    def report(self) -> str | None: ...
    @property
    def split_column(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The rows of one part.

    Args:
        rows: as `datasets` gives them; a column is `rows[name]`.
        where: what to call them in messages.
    """

    rows: Any
    where: str


def parsed(kind: type[S], data: Mapping[str, Any]) -> S:
    """Read the `data` mapping of a run file.

    Args:
        kind: a dataclass whose fields are the keys.
        data: the mapping.

    Raises:
        ConfigError: a key is unknown or missing, search and report are the same split, or `where` is no mapping.
    """
    fields: Any = kind
    known = [field.name for field in dataclasses.fields(fields)]
    for key in data:
        if key not in known:
            raise ConfigError(f"data: unknown key {key!r}; {nearest(str(key), known)}")
    for key in ("path", "search"):
        if data.get(key) is None:
            raise ConfigError(f"data: the key {key!r} is missing (got {', '.join(map(str, data)) or 'nothing'})")
    source = kind(**data)
    if source.search == source.report:
        raise ConfigError(f"data: search and report are both {source.search!r}; a result must be reported on data no search has seen")
    where: Any = data.get("where")
    if where is not None and (not isinstance(where, Mapping) or not where):
        raise ConfigError(f"data: where: expected columns and the values to keep, such as {{domain: code}}, got {where!r}")
    return source


def read_parts(
    source: TableSource, columns: Mapping[str, str], *, where: Mapping[str, Any] | None = None, text: bool = False
) -> dict[Part, Table]:
    """Read the parts of a source.

    Args:
        source: where they are.
        columns: what the rows must have: key of the run file -> column.
        where: column -> the value, or one of the values, that kept rows have in it; compared as text.
        text: whether text files are accepted, each a row of the one column `text`.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    splits = _where(_by_column(_load(source, text), source), where or {}, source)
    parts: dict[Part, Table] = {"search": _part(splits, source, source.search, columns, where or {})}
    if source.report is not None:
        parts["report"] = _part(splits, source, source.report, columns, where or {})
    return parts


def disjoint(search: Sequence[Any], report: Sequence[Any], source: TableSource, what: str) -> list[int]:
    """Return which search items do not also stand in the report part; the others are counted in the log.

    Args:
        search: what identifies each item of the search part, hashable.
        report: the same of the report part.
        source: where they are from.
        what: what to call an item.

    Raises:
        DataError: none is left.
    """
    reported = set(report)
    kept = [row for row, item in enumerate(search) if item not in reported]
    copies = len(search) - len(kept)
    if not kept:
        raise DataError(
            f"data: {source.path}: every {what} of the split {source.search!r} also stands in {source.report!r}; they must be disjoint"
        )
    if copies:
        message = "%s: left %d of %d %ss out of %r, which also stand in %r"
        log.warning(message, source.path, copies, len(search), what, source.search, source.report)
    return kept


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


def _load(source: TableSource, text: bool) -> dict[str, Any]:
    if isinstance(source.path, Mapping):
        return {str(split): _file(Path(file), text) for split, file in source.path.items()}
    named = str(source.path)
    if named.startswith(HUB_PREFIX):
        name, _, revision = named.removeprefix(HUB_PREFIX).partition("@")
        return _read(named, lambda: dict(datasets.load_dataset(name, source.subset, revision=revision or None, cache_dir=_cache())))
    if not Path(named).is_dir():
        return {"train": _file(Path(named), text)}
    if (Path(named) / "dataset_dict.json").is_file():
        return _read(named, lambda: dict(datasets.load_from_disk(named)))
    # else each line of a text would be a row of its own, and its end would be lost
    options = {"sample_by": "document"} if text and any(Path(named).rglob(f"*{TEXT}")) else {}
    return _read(named, lambda: dict(datasets.load_dataset(named, cache_dir=_cache(), **options)))


def _file(path: Path, text: bool) -> Any:
    if not path.is_file():
        hint = f"; for a data set of the hub write {HUB_PREFIX}{path}" if len(path.parts) == 2 and not path.suffix else ""
        raise DataError(f"data: no such file or folder: {path}{hint}")
    if text and path.suffix.lower() == TEXT:
        return _read(str(path), lambda: datasets.Dataset.from_dict({"text": [path.read_bytes().decode("utf-8")]}))
    kind = FILES.get(path.suffix.lower())
    if kind is None:
        known = [*FILES, TEXT] if text else FILES
        raise DataError(f"data: cannot tell what {path} is; expected a folder or a file ending in {', '.join(known)}")
    # these readers, unlike load_dataset("parquet", ...), report no download count to the hub
    reader = getattr(datasets.Dataset, f"from_{kind}")
    return _read(str(path), lambda: reader(str(path), cache_dir=_cache()))


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


def _by_column(loaded: dict[str, Any], source: TableSource) -> Mapping[str, Any]:
    if len(loaded) != 1:
        return loaded
    (table,) = loaded.values()
    column = source.split_column or "split"
    if column not in table.column_names:
        if source.split_column is not None:
            raise DataError(f"data: {source.path} has no column {column!r}; {nearest(column, table.column_names)}")
        return loaded
    names = _as_text(table, column)
    return {str(name): table.select(np.flatnonzero(names == name)) for name in np.unique(names)}


def _where(splits: Mapping[str, Any], where: Mapping[str, Any], source: TableSource) -> Mapping[str, Any]:
    """Keep the rows that `where` asks for, split by split."""
    for column, given in where.items():
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


def _part(splits: Mapping[str, Any], source: TableSource, named: str, columns: Mapping[str, str], where: Mapping[str, Any]) -> Table:
    rows = splits.get(named)
    if rows is None and named in SAME_SPLIT:
        rows = next((splits[name] for name in SAME_SPLIT if name in splits), None)
    called = f"{source.path}, split {named!r}"
    if rows is None:
        raise DataError(f"data: {source.path} has no split {named!r}; {nearest(named, splits)}")
    if not len(rows):
        because = f" where {dict(where)}" if where else ""
        raise DataError(f"data: {called} is empty{because}; {nearest(named, (name for name, table in splits.items() if len(table)))}")
    for key, column in columns.items():
        if column not in rows.column_names:
            raise DataError(f"data: {called} has no column {column!r} ({key}); {nearest(column, rows.column_names)}")
    return Table(rows, called)
