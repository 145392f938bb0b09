"""Pictures and labels from whatever `datasets` reads: parquet, csv and json lines, image folders, data set folders, hub data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergeopt.errors import DataError
from mergeopt_problems.data_source import Data, DataSource
from mergeopt_problems.image_decoding import decode
from mergeopt_problems.image_preprocessing import Picture
from mergeopt_problems.labels import read_labels
from mergeopt_problems.overlap import separated
from mergeopt_problems.tables import Table, quiet_datasets, read_tables

__all__ = ["ImageSource", "Pictures", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource(DataSource):
    """Where the images of a task are; the `data` of a run file. A folder may also hold images, in one subfolder per class.

    Args:
        image: the column of pictures: bytes or nested lists of values 0..255, encoded image files, or paths relative to the file.
        label: the column of class numbers from 0, or of class names (then `labels` gives their order).
        shape: height and width (and 3 for RGB) of pictures given as raw values.
        labels: class names in the order of their numbers.
    """

    image: str = "image"
    label: str = "label"
    shape: Sequence[int] | None = None
    labels: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded pictures and their class numbers, int64 [pictures]."""

    pictures: Sequence[Picture]
    labels: npt.NDArray[np.int64]

    def chosen(self, rows: Sequence[int] | npt.NDArray[np.intp]) -> Pictures:
        """Return some of them."""
        return Pictures([self.pictures[row] for row in rows], self.labels[np.asarray(rows, dtype=np.intp)])


def read(source: ImageSource) -> Data[Pictures]:
    """Read and decode the parts of a source.

    Pictures of the search part that also stand in the report part are left out, and counted in the log.

    Raises:
        DataError: something is missing, empty, or not what the source says.
    """
    with quiet_datasets():
        tables = read_tables(source, {"image": source.image, "label": source.label}, item=["image"])
        parts = {part: _pictures(table, source) for part, table in tables.parts.items()}
        training = None if tables.training is None else _keys(_decoded(tables.training, source))
    kept = separated({part: _keys(own.pictures) for part, own in parts.items()}, training, source, "picture")
    return Data({part: parts[part].chosen(rows) for part, rows in kept.rows.items()}, kept.warnings)


def _pictures(table: Table, source: ImageSource) -> Pictures:
    return Pictures(_decoded(table, source), _labels(table.rows[source.label], source.labels, table.where))


def _decoded(table: Table, source: ImageSource) -> list[Picture]:
    return [decode(value, source.shape, table.folder, f"{table.where}, row {row}") for row, value in enumerate(table.rows[source.image])]


def _labels(column: Sequence[object], order: Sequence[str] | None, where: str) -> npt.NDArray[np.int64]:
    labels = read_labels(column, order, where)
    if labels.names is not None:
        some = labels.names[0]
        raise DataError(f"data: {where}: the labels are names ({some!r}, say); give `labels:`, the names in the order of the classes")
    return labels.numbers


def _keys(pictures: Sequence[Picture]) -> list[tuple[tuple[int, ...], bytes]]:
    return [(picture.shape, picture.tobytes()) for picture in pictures]
