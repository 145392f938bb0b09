"""From a value in a table to a picture: raw bytes, nested lists, encoded images, paths of image files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mergeopt.errors import DataError
from mergeopt_problems.image_preprocessing import Picture

__all__ = ["decode"]

GREY_MODES = ("1", "L")


def decode(value: Any, shape: Sequence[int] | None, folder: Path, where: str) -> Picture:
    """Return the picture that a value of a table stands for, uint8 [height, width] or [height, width, 3].

    Args:
        value: a picture, raw or encoded bytes, (nested) numbers 0..255, or the path of an image file.
        shape: height and width (and 3) of raw values.
        folder: what paths are relative to.
        where: file, split and row, for messages.

    Raises:
        DataError: the value is no such picture.
    """
    if isinstance(value, Mapping):  # an image column that came without its type
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return _of_image(value, where)
    if isinstance(value, bytes):
        return _of_values(np.frombuffer(value, np.uint8), shape, where) if shape is not None else _open(io.BytesIO(value), where)
    if isinstance(value, str):
        return _open(folder / value, where)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"data: {where}: the rows of the picture differ in length") from error
    if array.dtype.kind not in "iu" or not array.size:
        raise DataError(f"data: {where}: expected a picture (bytes, an image, whole numbers 0..255, or a path), got {type(value).__name__}")
    if array.min() < 0 or array.max() > 255:
        raise DataError(f"data: {where}: expected pixels in 0..255, got {array.min()}..{array.max()}")
    return _of_values(array.astype(np.uint8), shape, where)


def _of_values(array: Picture, shape: Sequence[int] | None, where: str) -> Picture:
    if shape is not None:
        if int(np.prod(shape)) != array.size:
            raise DataError(f"data: {where}: {array.size} values cannot have the shape {list(shape)}; correct `shape:`")
        array = array.reshape(tuple(shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise DataError(f"data: {where}: expected a picture [height, width] or [height, width, 3], got {list(array.shape)}; give `shape:`")
    return array


def _open(file: Path | io.BytesIO, where: str) -> Picture:
    try:
        with Image.open(file) as image:
            return _of_image(image, where)
    except (OSError, UnidentifiedImageError) as error:
        hint = "; raw pixels need `shape:`" if isinstance(file, io.BytesIO) else ""
        raise DataError(f"data: {where}: no readable image: {error}{hint}") from error


def _of_image(image: Image.Image, where: str) -> Picture:
    try:
        return np.asarray(image.convert("L" if image.mode in GREY_MODES else "RGB"), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"data: {where}: damaged image: {error}") from error
