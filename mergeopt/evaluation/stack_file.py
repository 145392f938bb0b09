"""Rows of an arena in a file: for a base and experts that do not fit into memory beside everything else.

The file is mapped and shared with the system's cache of files, so that what is read again and again stays there as long as memory allows,
and counts as no memory of this process. It has no name: it is gone with the process, however that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from mergeopt.errors import ConfigError, StoreError
from mergeopt.memory import size_text

__all__ = ["StackFile", "check_folder"]


class StackFile:
    """A nameless file of float32 rows [rows, size], zeros at first: `reader` and `writer` show the same numbers.

    Args:
        rows: how many.
        size: elements of each.
        folder: on a disk with room for it; made where it is missing.

    Raises:
        StoreError: there is no room, or nothing can be written there.
    """

    def __init__(self, rows: int, size: int, folder: Path) -> None:
        needed = 4 * rows * size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:  # what is mapped stays when it is closed
                if hasattr(os, "posix_fallocate"):  # all of it now: a mapped file that finds the disk full later ends the process
                    os.posix_fallocate(file.fileno(), 0, needed)
                else:
                    file.truncate(needed)
                self.reader, self.writer = (_mapped(file.fileno(), (rows, size), writable) for writable in (False, True))
        except OSError as error:
            raise StoreError(
                f"cannot write the {size_text(needed)} of base and experts as they are merged to {folder}: {error.strerror or error}; "
                "free space, or name another folder with memory: {folder: ...}"
            ) from error


def check_folder(folder: Path) -> None:
    """Find out whether a folder for such files is there or can be made, without making it.

    Raises:
        ConfigError: it cannot be, or nothing may be written there.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ConfigError(f"memory: folder: {folder} cannot be made: {place} is no folder; name one on a disk with room")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"memory: folder: {folder} cannot be used: {place} may not be written to; name another one")


def _mapped(file: int, shape: tuple[int, int], writable: bool) -> torch.Tensor:
    mapped = mmap.mmap(file, 4 * shape[0] * shape[1], access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # as it should be
        return torch.from_numpy(np.frombuffer(mapped, dtype=np.float32)).view(shape)
