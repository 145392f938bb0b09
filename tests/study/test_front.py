"""The front: dominance, hypervolume, and picking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.errors import ConfigError
from mergeopt.study.front import Front, FrontPoint, reference_point
from mergeopt.study.trial import losses, violations
from mergeopt.task import ObjectiveInfo

A = ObjectiveInfo("a", "maximize")
B = ObjectiveInfo("b", "minimize")


def points(rows: Sequence[Sequence[float]], names: str = "ab") -> list[FrontPoint]:
    """Return one point per row of natural values."""
    return [FrontPoint(i, dict(zip(names, row, strict=True))) for i, row in enumerate(rows)]


def front(rows: Sequence[Sequence[float]], reference: Sequence[float] | None = (0.0, 1.0)) -> Front:
    """Return a front in which a is maximised and b is minimised."""
    return Front(points(rows), (A, B), reference)


ROWS = st.integers(1, 6).flatmap(
    lambda m: st.lists(st.lists(st.integers(0, 5).map(lambda x: x / 4), min_size=m, max_size=m), min_size=1, max_size=20)
)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, data=st.data())
def test_no_point_of_a_front_is_dominated_whatever_the_order(rows: list[list[float]], data: st.DataObject) -> None:
    """For one to six objectives: nobody dominates a member, everybody else is dominated or equal, and order does not matter."""
    m = len(rows[0])
    objectives = [ObjectiveInfo(str(i), "maximize" if i % 2 else "minimize") for i in range(m)]
    given_points = points(rows, "".join(str(i) for i in range(m)))
    found = Front(given_points, objectives, [2.0 if i % 2 == 0 else -1.0 for i in range(m)])
    table = losses(rows, objectives)
    members = [point.trial for point in found.points]
    for i, row in enumerate(table):
        dominated = any(bool((other <= row).all() and (other < row).any()) for other in table)
        repeated = any(bool((table[j] == row).all()) for j in range(i))
        assert (i in members) == (not dominated and not repeated)
    shuffled = Front(data.draw(st.permutations(given_points)), objectives, found.reference)
    assert [point.trial for point in shuffled.points] == members
    assert (
        shuffled.hypervolume()
        == found.hypervolume()
        == pytest.approx(moocore.hypervolume(table, ref=[2.0 if i % 2 == 0 else 1.0 for i in range(m)]))
    )


def test_hypervolume_by_hand() -> None:
    """Three steps of a staircase have the area that one counts on paper, and points beyond the reference add none."""
    assert front([[1.0, 0.5], [0.5, 0.25], [0.25, 0.0]]).hypervolume() == pytest.approx(0.5 + 0.25 * 0.5 + 0.25 * 0.25)
    assert front([[1.0, 2.0]]).hypervolume() == 0.0
    assert Front(points([[0.25], [0.75]], "a"), [A], [0.5]).hypervolume() == pytest.approx(0.25)
    assert front([[1.0, 0.5]], None).hypervolume() is None
    assert front([[1.0, 0.5]]).hypervolume(reference=(0.5, 0.75)) == pytest.approx(0.125)
    assert front([]).hypervolume() == 0.0


def test_equal_vectors_keep_the_first_trial() -> None:
    """Of candidates with the same values the lowest trial number is the front's."""
    assert [point.trial for point in front([[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]]).points] == [0]


def test_one_objective_has_its_best_trial() -> None:
    """With a single objective the front is the best trial, and every way of picking gives it."""
    single = Front(points([[0.25], [0.75], [0.75], [0.5]], "a"), [A], [0.0])
    assert [point.trial for point in single.points] == [1]
    assert single.pick({"a": 1.0}).trial == single.knee().trial == single.where(["a>0.5"], best="a").trial == 1


CONVEX = [[1.0, 1.0], [0.9, 0.4], [0.7, 0.15], [0.3, 0.05], [0.0, 0.0]]


def test_picking_follows_the_preference() -> None:
    """All weight on one objective gives its best point, equal weights a point between, and only ratios count."""
    convex = front(CONVEX)
    assert convex.pick({"a": 1.0}).trial == 0
    assert convex.pick({"b": 3.0}).trial == 4
    assert convex.pick({"a": 0.5, "b": 0.5}).trial == 2  # normalised losses (0.3, 0.15): its worst is the least
    assert convex.pick({"a": 7.0, "b": 3.0}).trial == convex.pick({"a": 0.7, "b": 0.3}).trial == 1


def test_picking_breaks_ties_by_the_other_objectives() -> None:
    """Among points equally good in the preferred objective the augmentation takes the better rest."""
    c = ObjectiveInfo("c", "maximize")
    tied = Front(points([[1.0, 0.9, 0.0], [1.0, 0.2, -0.5], [0.0, 0.0, 1.0]], "abc"), (A, B, c), None)
    assert tied.pick({"a": 1.0}).trial == 1


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ({"q": 1.0}, "unknown objective 'q'; known: a, b"),
        ({"a": -1.0}, "'a' must be a finite number >= 0, got -1.0"),
        ({"a": math.nan}, "must be a finite number"),
        ({"a": "much"}, "must be a finite number"),
        ({"a": 0.0, "b": 0}, "above 0"),
        ({}, "above 0"),
    ],
)
def test_preferences_that_mean_nothing_are_refused(preferences: dict[str, float], message: str) -> None:
    """Unknown names, negative or missing numbers and all-zero weights are a ConfigError."""
    with pytest.raises(ConfigError, match=message):
        front(CONVEX).pick(preferences)


def test_conditions_choose_among_those_that_meet_them() -> None:
    """The best in one objective among the points that meet all conditions, in natural directions."""
    convex = front(CONVEX)
    assert convex.where(["a>=0.7"], best="b").trial == 2
    assert convex.where([" b < .4 ", "a>0"], best="a").trial == 2
    assert convex.where(["b<=4e-1"], best="a").trial == 1
    assert convex.where([], best="a").trial == 0


@pytest.mark.parametrize(
    ("conditions", "best", "message"),
    [
        (["a>>1"], "a", "expected a condition NAME>=NUMBER"),
        (["a"], "a", "expected a condition"),
        (["a=1"], "a", "expected a condition"),
        (["a>=much"], "a", "expected a number after >="),
        (["a>=nan"], "a", "expected a finite number"),
        (["aa>=1"], "a", "unknown objective 'aa'"),
        (["a>=0"], "z", "unknown objective 'z'"),
        ("a>=1", "a", "expected a list of conditions"),
        (["a>=0.95", "b<=0.5"], "b", r"none of the 5 points .* a>=0.95 and b<=0.5; nearest is trial 1 with a = 0.9, b = 0.4"),
    ],
)
def test_conditions_that_cannot_be_met_or_read_are_refused(conditions: list[str], best: str, message: str) -> None:
    """Syntax, unknown names and unmet conditions are a ConfigError; unmet ones name the nearest point."""
    with pytest.raises(ConfigError, match=message):
        front(CONVEX).where(conditions, best=best)


def test_the_knee_is_farthest_from_the_line_through_the_extremes() -> None:
    """Of a convex front the bend is taken, found by hand as the greatest distance to the line between the extremes."""
    normal = [(1 - a) + b for a, b in CONVEX]
    assert front(CONVEX).knee().trial == int(np.argmin(normal)) == 2


def test_an_empty_front_cannot_be_picked_from() -> None:
    """Where nothing was scored, picking says so."""
    empty = front([])
    with pytest.raises(ConfigError, match="the front is empty"):
        empty.pick({"a": 1.0})
    with pytest.raises(ConfigError, match="the front is empty"):
        empty.knee()
    with pytest.raises(ConfigError, match="the front is empty"):
        empty.where([], best="a")


def test_only_feasible_points_count_and_the_least_bad_when_there_are_none() -> None:
    """Points that break a bound are left out; when all do, those that break it least are kept and flagged."""
    bounded = ObjectiveInfo("b", "minimize", constraint=(None, 0.3))
    some = Front(points([[1.0, 1.0], [0.5, 0.3], [0.4, 0.1]]), (A, bounded), None)
    assert ([point.trial for point in some.points], some.feasible) == ([1, 2], True)
    none = Front(points([[1.0, 1.0], [0.5, 0.5], [0.7, 0.5]]), (A, bounded), None)
    assert ([point.trial for point in none.points], none.feasible) == ([2], False)


def test_violations_count_from_each_bound() -> None:
    """Bounds come in objective order, low before high, and are kept where <= 0."""
    both = ObjectiveInfo("a", "maximize", constraint=(0.2, 0.8))
    low = ObjectiveInfo("b", "minimize", constraint=(0.5, None))
    assert violations([0.9, 0.25], (both, low)) == pytest.approx([-0.7, 0.1, 0.25])
    assert violations([0.9], (A,)).shape == (0,)


def test_how_many_stay_nondominated_on_the_report_part() -> None:
    """Members that another member beats on held-out values are not counted; unscored ones neither."""
    rows = [([1.0, 0.5], [0.8, 0.5]), ([0.5, 0.25], [0.9, 0.25]), ([0.25, 0.0], [0.2, 0.0])]
    held_out = [FrontPoint(i, dict(zip("ab", s, strict=True)), dict(zip("ab", r, strict=True))) for i, (s, r) in enumerate(rows)]
    assert Front(held_out, (A, B), (0.0, 1.0)).still_nondominated_on_report() == 2
    assert Front(held_out, (A, B), (0.0, 1.0)).hypervolume("report") == pytest.approx(0.9 * 0.75 + 0.2 * 0.25)
    assert front(CONVEX).still_nondominated_on_report() == 0
    assert front(CONVEX).hypervolume("report") is None


def test_the_reference_point_is_declared_or_a_tenth_beyond_the_worst() -> None:
    """Declared worst values count as they are; others come from the known values, moved outward by a tenth of their range."""
    declared = ObjectiveInfo("a", "maximize", worst=0.1)
    assert reference_point((declared, B), [[0.5, 1.0], [0.6, 3.0]]) == pytest.approx((0.1, 3.2))
    assert reference_point((A,), [[0.5], [1.5]]) == pytest.approx((0.4,))
    assert reference_point((A,), [[0.5]]) == pytest.approx((0.45,))
    assert reference_point((declared,), []) == (0.1,)
    assert reference_point((A,), []) is None


def test_a_reference_point_of_another_length_is_refused() -> None:
    """A reference point must have one value per objective."""
    with pytest.raises(ConfigError, match="reference point with 2 values, got 3"):
        Front([], (A, B), [0.0, 0.0, 0.0])
