"""Preferences: on the simplex, well spread, as many as asked for."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.genomes.preferences import lattice, spread_preferences
from mergeopt_strategies.preferences import draw_preference, edge_paths


@given(objectives=st.integers(2, 5), divisions=st.integers(1, 6))
def test_a_lattice_is_whole(objectives: int, divisions: int) -> None:
    """It has C(H + m - 1, m - 1) different points, all on the simplex and on multiples of 1 / H."""
    points = lattice(objectives, divisions)
    assert len(np.unique(points, axis=0)) == len(points) == comb(divisions + objectives - 1, objectives - 1)
    np.testing.assert_allclose(points.sum(axis=1), 1.0)
    np.testing.assert_allclose(points * divisions, np.round(points * divisions), atol=1e-9)


@settings(deadline=None)
@given(objectives=st.integers(2, 7), points=st.integers(1, 40))
def test_spread_preferences_are_what_was_asked_for(objectives: int, points: int) -> None:
    """At most as many as asked, different, on the simplex; with room for them, all corners are there, and the centre from m = 3 on."""
    found = spread_preferences(objectives, points)
    assert 1 <= len(found) <= points
    assert len(np.unique(found.round(9), axis=0)) == len(found)
    assert np.all(found >= 0)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    rows = {tuple(row) for row in found.round(9).tolist()}
    if points > objectives:
        assert all(tuple(corner) in rows for corner in np.eye(objectives).tolist())
        assert objectives == 2 or tuple(np.full(objectives, 1 / objectives).round(9).tolist()) in rows


def test_two_objectives_are_stepped_evenly() -> None:
    """Eleven preferences go from one objective to the other in steps of a tenth."""
    found = spread_preferences(2, 11)
    np.testing.assert_allclose(found[:, 0], np.linspace(1, 0, 11))
    np.testing.assert_array_equal(spread_preferences(2, 1), [[0.5, 0.5]])


def test_room_beyond_a_lattice_is_used() -> None:
    """Twenty points for three objectives: the lattice of fifteen, the centre, and four more that keep their distance."""
    found = spread_preferences(3, 20)
    assert len(found) == 20
    distances = np.linalg.norm(found[:, None] - found[None], axis=2) + np.eye(20)
    assert distances.min() > 0.1


@pytest.mark.parametrize(("objectives", "walks"), [(2, 1), (3, 3), (5, 5)])
def test_walks_visit_every_corner(objectives: int, walks: int) -> None:
    """Each walk leads from its first objective's corner to its second's, and together they start or end at all of them."""
    paths = edge_paths(objectives, 5)
    assert len(paths) == walks
    assert {k for i, j, _ in paths for k in (i, j)} == set(range(objectives))
    for i, j, path in paths:
        np.testing.assert_array_equal(path[[0, -1]], np.eye(objectives)[[i, j]])
        np.testing.assert_allclose(path.sum(axis=1), 1.0)


def test_draws_follow_the_concentration() -> None:
    """A small alpha gives preferences near corners, a large one near the centre."""
    rng = np.random.default_rng(0)
    largest = {alpha: np.mean([draw_preference(rng, 3, alpha).max() for _ in range(300)]) for alpha in (0.1, 1.0, 30.0)}
    assert largest[0.1] > 0.85 > largest[1.0] > 0.5 > largest[30.0]
