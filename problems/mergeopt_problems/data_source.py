"""Where the rows of a task are: the keys that `data` has for every task of a run file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from mergeopt.errors import ConfigError, nearest
from mergeopt.task import Part

__all__ = ["Data", "DataSource"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where the rows of a task are. Each kind of task adds the columns that it reads.

    Args:
        path: a parquet, csv or json-lines file, a mapping of split names to such files, a folder of them or one that `datasets` saved, or
            `hf://owner/name[@revision]`.
        search: name of the split that candidates are scored on during a search.
        report: name of the split that results are reported on; None when nothing is held out.
        train: what the models were trained on, to warn of items that stand in it too: a split, or another file, folder or hub id, whose
            split `train` counts where it has one, else all of its rows; None when it is not known.
        split_column: the column that names each row's split; by default `split` where a file has one.
        where: column -> the value (or one of the values) that a row must have there to be kept; None for all rows.
        subset: name of a configuration, of a hub data set or a folder that has several.
    """

    path: str | Path | Mapping[str, str]
    search: str
    report: str | None = None
    train: str | Path | None = None
    split_column: str | None = None
    where: Mapping[str, Any] | None = None
    subset: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read the `data` mapping of a run file.

        Raises:
            ConfigError: a key is unknown or missing, search and report are the same split, one of them is what the models were trained on,
                or `where` is no mapping.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ConfigError(f"data: unknown key {key!r}; {nearest(str(key), known)}")
        for key in ("path", "search"):
            if data.get(key) is None:
                raise ConfigError(f"data: the key {key!r} is missing (got {', '.join(map(str, data)) or 'nothing'})")
        source = cls(**data)
        if source.search == source.report:
            raise ConfigError(f"data: search and report are both {source.search!r}; a result must be reported on data no search has seen")
        if source.train is not None and source.train == source.report:
            raise ConfigError(
                f"data: train and report are both {source.train!r}; a result must be reported on data no model was trained on"
            )
        if source.where is not None and (not isinstance(source.where, Mapping) or not source.where):
            raise ConfigError(f"data: where: expected columns and the values to keep, such as {{domain: code}}, got {source.where!r}")
        return source


@dataclass(frozen=True, slots=True)
class Data(Generic[T]):
    """What was read of a source.

    Args:
        parts: the items of each part, in the order of the rows.
        warnings: what a run over them has to say, a sentence each.
    """

    parts: Mapping[Part, T]
    warnings: tuple[str, ...] = ()
