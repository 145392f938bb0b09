"""Seeded draws of items, for tasks with a limit; what is drawn keeps its order."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["drawn", "drawn_by_label"]

Rows = npt.NDArray[np.intp]


def drawn(count: int, limit: int | None, seed: int) -> Rows:
    """Return which of `count` items are kept: `limit` of them, drawn uniformly, in order; all where the limit is None or higher."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def drawn_by_label(labels: npt.NDArray[Any], limit: int | None, seed: int) -> Rows:
    """Return which items are kept: `limit` of them, each label in its share, in order; all where the limit is None or higher.

    Args:
        labels: of the items, [items].
        limit: how many to keep.
        seed: of the draw.
    """
    count = len(labels)
    if limit is None or limit >= count:
        return np.arange(count)
    # an item's place within its own class, from 0 to 1: the lowest places hold each class in its share
    order = np.random.default_rng(seed).permutation(count)
    place = np.empty(count)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(place[order], kind="stable")[:limit]])
