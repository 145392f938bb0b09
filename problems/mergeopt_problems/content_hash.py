"""Content hash of items that are kept as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from mergeopt.recipe import canonical_json

__all__ = ["content_hash"]


def content_hash(arrays: Iterable[npt.NDArray[Any]], settings: Mapping[str, Any]) -> str:
    """Return SHA-256 over arrays and how they were made.

    Args:
        arrays: always the same ones in the same order and types, the lengths of ragged ones first.
        settings: JSON-able.
    """
    digest = hashlib.sha256(canonical_json(dict(settings)).encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
