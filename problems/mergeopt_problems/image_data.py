"""Pictures and labels from whatever `datasets` reads: parquet, csv and json lines, image folders, data set folders, hub data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt.task import Part
from mergeopt_problems.image_decoding import decode
from mergeopt_problems.image_preprocessing import Picture
from mergeopt_problems.labels import read_labels
from mergeopt_problems.tables import Table, disjoint, parsed, quiet_datasets, read_parts

__all__ = ["ImageSource", "Pictures", "read"]


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
        return parsed(cls, data)


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
    with quiet_datasets():
        tables = read_parts(source, {"image": source.image, "label": source.label})
        parts = {part: _pictures(table, source) for part, table in tables.items()}
    if "report" in parts:
        parts["search"] = _without_copies(parts["search"], parts["report"], source)
    return parts


def _pictures(table: Table, source: ImageSource) -> Pictures:
    folder = Path(source.path).parent if isinstance(source.path, str | Path) else Path(next(iter(source.path.values()))).parent
    pictures = [decode(value, source.shape, folder, f"{table.where}, row {row}") for row, value in enumerate(table.rows[source.image])]
    return Pictures(pictures, _labels(table.rows[source.label], source.labels, table.where))


def _labels(column: Sequence[Any], order: Sequence[str] | None, where: str) -> npt.NDArray[np.int64]:
    labels = read_labels(column, order, where)
    if labels.names is not None:
        some = labels.names[0]
        raise DataError(f"data: {where}: the labels are names ({some!r}, say); give `labels:`, the names in the order of the classes")
    return labels.numbers


def _without_copies(search: Pictures, report: Pictures, source: ImageSource) -> Pictures:
    kept = disjoint(_keys(search), _keys(report), source, "picture")
    return Pictures([search.pictures[row] for row in kept], search.labels[kept])


def _keys(pictures: Pictures) -> list[tuple[tuple[int, ...], bytes]]:
    return [(picture.shape, picture.tobytes()) for picture in pictures.pictures]
