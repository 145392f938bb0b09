"""Per-item records as bytes: compressed numpy columns, never pickle."""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
import numpy.typing as npt

from mergeopt.errors import StoreError
from mergeopt.task import Records

__all__ = ["pack", "unpack"]


def pack(records: Records) -> bytes:
    """Return columns as one compressed frame: a JSON line of names and lengths, then one npy file per column.

    Raises:
        StoreError: a column is neither numbers nor fixed-width text.
    """
    names, bodies = [], []
    for name, column in records.items():
        buffer = io.BytesIO()
        try:
            np.save(buffer, np.asarray(column), allow_pickle=False)
        except ValueError as error:
            raise StoreError(f"record column {name!r}: expected numbers or fixed-width text, got {np.asarray(column).dtype}") from error
        names.append([name, buffer.tell()])
        bodies.append(buffer.getvalue())
    return zlib.compress(json.dumps(names).encode() + b"\n" + b"".join(bodies), level=6)


def unpack(frame: bytes) -> dict[str, npt.NDArray[np.generic]]:
    """Return the columns of a frame, bit for bit as they were packed.

    Raises:
        StoreError: the frame is damaged.
    """
    try:
        head, _, body = zlib.decompress(frame).partition(b"\n")
        columns: dict[str, npt.NDArray[np.generic]] = {}
        start = 0
        for name, length in json.loads(head):
            columns[name] = np.load(io.BytesIO(body[start : start + length]), allow_pickle=False)
            start += length
    except (zlib.error, ValueError, TypeError, EOFError) as error:
        raise StoreError(f"stored records are damaged ({error}); restore the run folder from a copy, or score the trial again") from error
    return columns
