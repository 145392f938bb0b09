"""Preferences spread evenly over the simplex of m objectives."""

from __future__ import annotations

from math import comb

import numpy as np
import numpy.typing as npt

__all__ = ["lattice", "spread_preferences"]

Points = npt.NDArray[np.float64]


def lattice(objectives: int, divisions: int) -> Points:
    """Return all points of the simplex whose entries are multiples of 1 / divisions, [n, m] (Das and Dennis 1998, SIAM J. Optim. 8)."""
    rows: list[list[int]] = [[]]
    for _ in range(objectives - 1):
        rows = [[*row, share] for row in rows for share in range(divisions - sum(row), -1, -1)]
    return np.array([[*row, divisions - sum(row)] for row in rows], dtype=np.float64) / divisions


def spread_preferences(objectives: int, points: int) -> Points:
    """Return at most `points` preferences, [n, m]: even steps for two objectives.

    For more: the finest lattice that fits together with the centre (a lattice holds the corners), the centre, and then points of the next
    finer lattice, each as far as possible from those before it. With fewer points than corners: the centre, then corners.

    Args:
        objectives: m >= 2.
        points: one or more.
    """
    if objectives == 2 and points > 1:
        share = np.linspace(1.0, 0.0, points)
        return np.stack([share, 1.0 - share], axis=1)
    centre = np.full((1, objectives), 1.0 / objectives)
    if points <= objectives:
        return np.concatenate([centre, np.eye(objectives)])[:points]
    divisions = 1
    while _with_centre(objectives, divisions + 1) <= points:
        divisions += 1
    chosen = lattice(objectives, divisions)
    others = np.concatenate([centre, lattice(objectives, divisions + 1)])
    while len(chosen) < points:
        gaps = np.linalg.norm(others[:, None] - chosen[None], axis=2).min(axis=1)
        place = 0 if gaps[0] > 1e-9 else int(gaps.argmax())  # the centre first, where the lattice does not hold it
        if gaps[place] <= 1e-9:
            break
        chosen = np.concatenate([chosen, others[place : place + 1]])
    return chosen


def _with_centre(objectives: int, divisions: int) -> int:
    """Return how many points a lattice and the centre have, which some lattices hold."""
    return comb(divisions + objectives - 1, objectives - 1) + (divisions % objectives != 0)
