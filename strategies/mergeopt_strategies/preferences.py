"""Preferences, points of the simplex of m objectives: drawn at random to learn from, or along its edges to be looked at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["draw_preference", "edge_paths"]

Points = npt.NDArray[np.float64]


def draw_preference(rng: np.random.Generator, objectives: int, alpha: float) -> Points:
    """Return gamma [m] from the symmetric Dirichlet distribution; alpha 1 is uniform, less favours the corners, more the centre."""
    return rng.dirichlet(np.full(objectives, alpha))


def edge_paths(objectives: int, points: int) -> list[tuple[int, int, Points]]:
    """Return walks along edges of the simplex that visit every corner: (from, to, preferences [points, m]); one for two objectives."""
    corners = np.eye(objectives)
    share = np.linspace(1.0, 0.0, points)[:, None]
    ends = [(i, (i + 1) % objectives) for i in range(1 if objectives == 2 else objectives)]
    return [(i, j, share * corners[i] + (1.0 - share) * corners[j]) for i, j in ends]
