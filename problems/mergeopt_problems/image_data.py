"""Pictures and labels from whatever `datasets` reads: parquet, csv and json lines, image folders, data set folders, hub data sets."""

from __future__ import annotations

import dataclasses
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
from mergeopt.errors import ConfigError, DataError, nearest
from mergeopt.task import Part
from mergeopt_problems.image_decoding import decode
from mergeopt_problems.image_preprocessing import Picture

__all__ = ["ImageSource", "Pictures", "read"]

log = logging.getLogger(__name__)

T = TypeVar("T")

HUB_PREFIX = "hf://"
FILES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
SAME_SPLIT = ("validation", "val", "valid", "dev")


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the images of a task are; the `data` of a run file.

    Args:
        path: a parquet, csv or json-lines file, a mapping of split names to such files, a folder (images in one subfolder per class,
            below one per split; or a data set folder), or `hf://owner/name[@revision]`.
        search: name of the split that candidates are scored on during a search.
        report: name of the split that results are reported on; None when nothing is held out.
        split_column: the column that names each row's split; by default `split` where a file has one.
        image: the column of pictures: bytes or nested lists of values 0..255, encoded image files, or paths relative to the file.
        label: the column of class numbers from 0, or of class names (then `labels` gives their order).
        shape: height and width (and 3 for RGB) of pictures given as raw values.
        labels: class names in the order of their numbers.
        subset: configuration name of a hub data set.
    """

    path: str | Path | Mapping[str, str]
    search: str
    report: str | None = None
    split_column: str | None = None
    image: str = "image"
    label: str = "label"
    shape: Sequence[int] | None = None
    labels: Sequence[str] | None = None
    subset: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> ImageSource:
        """Read the `data` mapping of a run file.

        Raises:
            ConfigError: a key is unknown or missing, or search and report are the same split.
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
        return source


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded pictures and their class numbers, int64 [pictures]."""

    pictures: Sequence[Picture]
    labels: npt.NDArray[np.int64]


def read(source: ImageSource) -> dict[Part, Pictures]:
    """Read and decode the parts of a source.

    Pictures of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with _quiet_datasets():
        splits = _by_column(_load(source), source)
        parts: dict[Part, Pictures] = {"search": _part(splits, source, source.search)}
        if source.report is not None:
            parts["report"] = _part(splits, source, source.report)
            parts["search"] = _without_copies(parts["search"], parts["report"], source)
    return parts


def _load(source: ImageSource) -> dict[str, Any]:
    if isinstance(source.path, Mapping):
        return {str(split): _file(Path(file)) for split, file in source.path.items()}
    named = str(source.path)
    if named.startswith(HUB_PREFIX):
        name, _, revision = named.removeprefix(HUB_PREFIX).partition("@")
        return _read(named, lambda: dict(datasets.load_dataset(name, source.subset, revision=revision or None, cache_dir=_cache())))
    if not Path(named).is_dir():
        return {"train": _file(Path(named))}
    if (Path(named) / "dataset_dict.json").is_file():
        return _read(named, lambda: dict(datasets.load_from_disk(named)))
    return _read(named, lambda: dict(datasets.load_dataset(named, cache_dir=_cache())))


def _file(path: Path) -> Any:
    if not path.is_file():
        hint = f"; for a data set of the hub write {HUB_PREFIX}{path}" if len(path.parts) == 2 and not path.suffix else ""
        raise DataError(f"data: no such file or folder: {path}{hint}")
    kind = FILES.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"data: cannot tell what {path} is; expected a folder or a file ending in {', '.join(FILES)}")
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


def _by_column(loaded: dict[str, Any], source: ImageSource) -> Mapping[str, Any]:
    if len(loaded) != 1:
        return loaded
    (table,) = loaded.values()
    column = source.split_column or "split"
    if column not in table.column_names:
        if source.split_column is not None:
            raise DataError(f"data: {source.path} has no column {column!r}; {nearest(column, table.column_names)}")
        return loaded
    names = np.asarray([str(name) for name in table[column]], dtype=np.str_)
    return {str(name): table.select(np.flatnonzero(names == name)) for name in np.unique(names)}


def _part(splits: Mapping[str, Any], source: ImageSource, named: str) -> Pictures:
    table = splits.get(named)
    if table is None and named in SAME_SPLIT:
        table = next((splits[name] for name in SAME_SPLIT if name in splits), None)
    where = f"{source.path}, split {named!r}"
    if table is None:
        raise DataError(f"data: {source.path} has no split {named!r}; {nearest(named, splits)}")
    if not len(table):
        raise DataError(f"data: {where} is empty; {nearest(named, (name for name, rows in splits.items() if len(rows)))}")
    for key, column in (("image", source.image), ("label", source.label)):
        if column not in table.column_names:
            raise DataError(f"data: {where} has no column {column!r} ({key}); {nearest(column, table.column_names)}")
    folder = Path(source.path).parent if isinstance(source.path, str | Path) else Path(next(iter(source.path.values()))).parent
    pictures = [decode(value, source.shape, folder, f"{where}, row {row}") for row, value in enumerate(table[source.image])]
    return Pictures(pictures, _labels(table[source.label], source.labels, where))


def _labels(column: Sequence[Any], order: Sequence[str] | None, where: str) -> npt.NDArray[np.int64]:
    values = np.asarray(list(column))
    if values.dtype.kind in "iub" and values.ndim == 1:
        return values.astype(np.int64)
    if values.dtype.kind not in "U" or values.ndim != 1:
        raise DataError(f"data: {where}: expected labels that are whole numbers or names, got {values.reshape(-1)[0]!r}")
    if order is None:
        raise DataError(f"data: {where}: the labels are names ({values[0]!r}, say); give `labels:`, the names in the order of the classes")
    number = {name: index for index, name in enumerate(order)}
    for name in np.unique(values):
        if str(name) not in number:
            raise DataError(f"data: {where}: the label {str(name)!r} is not among `labels`; {nearest(str(name), number)}")
    return np.asarray([number[str(name)] for name in values], dtype=np.int64)


def _without_copies(search: Pictures, report: Pictures, source: ImageSource) -> Pictures:
    reported = {(picture.shape, picture.tobytes()) for picture in report.pictures}
    kept = [row for row, picture in enumerate(search.pictures) if (picture.shape, picture.tobytes()) not in reported]
    copies = len(search.pictures) - len(kept)
    if not kept:
        raise DataError(
            f"data: {source.path}: every picture of the split {source.search!r} also stands in {source.report!r}; they must be disjoint"
        )
    if copies:
        log.warning(
            "%s: left %d of %d pictures out of %r, which also stand in %r",
            source.path,
            copies,
            copies + len(kept),
            source.search,
            source.report,
        )
    return Pictures([search.pictures[row] for row in kept], search.labels[kept]) if copies else search


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    # our own errors say what went wrong; its bars and log lines would stand between the lines of a run
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
