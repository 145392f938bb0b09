from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mergeopt.errors import ConfigError
from mergeopt.genomes.space import Choice, Dimension, Float, Int, Simplex, Space

UNIT = st.floats(0.0, 1.0)


@st.composite
def floats(draw: st.DrawFn, name: str = "x") -> Float:
    log = draw(st.booleans())
    bound = st.floats(1e-9, 1e9) if log else st.floats(-1e9, 1e9)
    low, high = sorted((draw(bound), draw(bound)))
    assume(low < high)
    return Float(name, low, high, log)


@st.composite
def ints(draw: st.DrawFn, name: str = "n") -> Int:
    log = draw(st.booleans())
    low = draw(st.integers(1, 10**6) if log else st.integers(-(10**9), 10**9))
    return Int(name, low, low + draw(st.integers(1, 10**6)), log)


CHOICES = st.lists(st.text(max_size=3), min_size=2, max_size=9, unique=True).map(lambda options: Choice("c", tuple(options)))
SIMPLEXES = st.integers(2, 12).map(lambda k: Simplex("s", tuple(f"s/{i}" for i in range(k))))
DIMENSIONS: st.SearchStrategy[Dimension] = st.one_of(floats(), ints(), CHOICES, SIMPLEXES)


@given(data=st.data(), dimension=DIMENSIONS)
def test_decoding_stays_inside(data: st.DataObject, dimension: Dimension) -> None:
    """Every point of the cube decodes to a value of the dimension, the corners included."""
    code = data.draw(st.lists(UNIT, min_size=dimension.width, max_size=dimension.width))
    values = Space([dimension]).decode(code)
    assert tuple(values) == dimension.names
    for value in values.values():
        match dimension:
            case Float() | Int():
                assert isinstance(value, float if isinstance(dimension, Float) else int)
                assert dimension.low <= value <= dimension.high
            case Choice():
                assert value in dimension.options
            case Simplex():
                assert isinstance(value, float)
                assert 0.0 <= value <= 1.0


@given(data=st.data(), dimension=DIMENSIONS)
def test_a_decoded_value_has_a_code(data: st.DataObject, dimension: Dimension) -> None:
    """decode(encode(decode(u))) == decode(u) exactly, for every kind, and encoding gives one code for it."""
    space = Space([dimension])
    values = space.decode(data.draw(st.lists(UNIT, min_size=space.dim, max_size=space.dim)))
    code = space.encode(values)
    assert space.decode(code) == values
    np.testing.assert_array_equal(space.encode(space.decode(code)), code)


@given(dimension=floats())
def test_bounds_of_a_range_are_reached(dimension: Float) -> None:
    """Zero is the low bound and one the high bound, exactly, and both encode back."""
    space = Space([dimension])
    for code, bound in ((0.0, dimension.low), (1.0, dimension.high)):
        assert space.decode([code]) == {"x": bound}
        assert space.decode(space.encode({"x": bound})) == {"x": bound}


@given(dimension=floats(), first=UNIT, second=UNIT)
def test_a_range_keeps_the_order(dimension: Float, first: float, second: float) -> None:
    """A larger code never decodes to a smaller value."""
    low, high = sorted((first, second))
    assert dimension.decode([low]) <= dimension.decode([high])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.25, 0.3, 1 / 3, 0.7, 1.0, 1.2, 1.5])
def test_numbers_people_write_come_back_close(value: float) -> None:
    """A number of a range comes back within rounding of the range, also where no code gives it exactly."""
    space = Space([Float("x", 0.0, 1.5)])
    assert float(space.decode(space.encode({"x": value}))["x"]) == pytest.approx(value, abs=4e-16)


@given(dimension=ints())
def test_whole_numbers_come_back(dimension: Int) -> None:
    """Both ends of a range of whole numbers, and some between, come back exactly."""
    space = Space([dimension])
    between = np.linspace(dimension.low, dimension.high, 7).astype(int).tolist()
    for value in (dimension.low, dimension.high, *between):
        assert space.decode(space.encode({"n": value})) == {"n": value}


@given(dimension=CHOICES)
def test_options_come_back(dimension: Choice) -> None:
    """Every option has a code."""
    space = Space([dimension])
    assert [space.decode(space.encode({"c": option}))["c"] for option in dimension.options] == list(dimension.options)


def test_whole_numbers_and_options_have_equal_shares() -> None:
    """A uniform code gives each of five whole numbers and of five options a fifth of the cube."""
    codes = (np.arange(1000) + 0.5) / 1000
    space = Space([Int("n", 3, 7), Choice("c", ("a", "b", "c", "d", "e"))])
    values = [space.decode([code, code]) for code in codes]
    assert np.unique([value["n"] for value in values], return_counts=True)[1].tolist() == [200] * 5
    assert np.unique([str(value["c"]) for value in values], return_counts=True)[1].tolist() == [200] * 5


@given(data=st.data(), dimension=SIMPLEXES)
def test_shares_add_up_to_one(data: st.DataObject, dimension: Simplex) -> None:
    """Shares are non-negative and sum to one exactly, in any order of summing."""
    shares = dimension.decode(data.draw(st.lists(UNIT, min_size=dimension.width, max_size=dimension.width)))
    assert min(shares) >= 0.0
    assert sum(shares) == sum(reversed(shares)) == math.fsum(shares) == 1.0


@given(raw=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8))
def test_any_shares_have_a_code(raw: list[float]) -> None:
    """Shares that a user gives come back within the grid's spacing."""
    assume(sum(raw) > 1e-3)
    shares = [value / sum(raw) for value in raw]
    dimension = Simplex("s", tuple(map(str, range(len(shares)))))
    np.testing.assert_allclose(dimension.decode(dimension.encode(shares)), shares, atol=len(shares) * 2.0**-39)


def test_uniform_codes_are_uniform_shares() -> None:
    """Uniform points of the cube give each member of a simplex the same distribution: mean 1/k, variance (k-1)/(k^2 (k+1))."""
    k = 4
    shares = np.array([Simplex("s", tuple("abcd")).decode(row) for row in np.random.default_rng(0).random((20000, k - 1))])
    np.testing.assert_allclose(shares.mean(axis=0), 1 / k, atol=0.006)
    np.testing.assert_allclose(shares.var(axis=0), (k - 1) / (k**2 * (k + 1)), rtol=0.05)


def test_logarithmic_ranges_are_uniform_in_the_logarithm() -> None:
    """The middle of a logarithmic range is the geometric mean; a logarithmic range of whole numbers favours small ones."""
    assert float(Space([Float("x", 1e-4, 1.0, log=True)]).decode([0.5])["x"]) == pytest.approx(1e-2)
    assert int(Space([Int("n", 1, 1000, log=True)]).decode([0.5])["n"]) == 31


@given(dimensions=st.tuples(floats("x"), ints("n"), CHOICES, SIMPLEXES), seed=st.integers(0, 2**32 - 1))
def test_dimensions_stand_side_by_side(dimensions: tuple[Dimension, ...], seed: int) -> None:
    """A space of several kinds decodes each part as that dimension alone would, and is described by JSON."""
    space = Space(dimensions)
    (genome,) = space.sample(np.random.default_rng(seed), 1)
    assert genome.shape == (space.dim,) == (sum(d.width for d in dimensions),)
    apart: dict[str, object] = {}
    start = 0
    for dimension in dimensions:
        apart |= Space([dimension]).decode(genome[start : start + dimension.width])
        start += dimension.width
    assert space.decode(genome) == apart
    assert [d["kind"] for d in json.loads(json.dumps(space.describe()))] == ["float", "int", "choice", "simplex"]


def test_an_empty_space_is_a_point() -> None:
    """A space without dimensions has one genome, of length 0."""
    assert Space([]).dim == 0
    assert Space([]).decode([]) == {}
    assert Space([]).encode({}).shape == (0,)


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        ([0.5], r"shape \(d,\) = \(2,\), got shape \(1,\)"),
        ([0.5, 0.5, 0.5], r"got shape \(3,\)"),
        ([[0.5, 0.5]], r"got shape \(1, 2\)"),
        ([0.5, math.nan], r"inside \[0, 1\]\^2, got nan at coordinate 1"),
        ([-1e-12, 0.5], "got -1e-12 at coordinate 0"),
        ([0.5, 1.0000001], "at coordinate 1"),
        ([math.inf, 0.5], "got inf at coordinate 0"),
    ],
)
def test_points_outside_the_cube_are_refused(genome: list[float], message: str) -> None:
    """A genome of another length, or with a coordinate outside [0, 1] or NaN, is refused with where."""
    with pytest.raises(ConfigError, match=message):
        Space([Float("x", 0, 1), Float("y", 0, 1)]).decode(genome)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": 0.5}, r"missing: \['c', 'n', 'a', 'b'\]"),
        ({"x": 0.5, "c": "l", "n": 1, "a": 0.5, "b": 0.5, "z": 1}, r"unknown: \['z'\]"),
        ({"x": 1.5, "c": "l", "n": 1, "a": 0.5, "b": 0.5}, r"x: expected a value in \[0.0, 1.0\], got 1.5"),
        ({"x": math.nan, "c": "l", "n": 1, "a": 0.5, "b": 0.5}, "x: expected a finite number, got nan"),
        ({"x": True, "c": "l", "n": 1, "a": 0.5, "b": 0.5}, "x: expected a finite number, got True"),
        ({"x": "0.5", "c": "l", "n": 1, "a": 0.5, "b": 0.5}, "x: expected a finite number, got '0.5'"),
        ({"x": 0.5, "c": "m", "n": 1, "a": 0.5, "b": 0.5}, r"c: expected one of \['l', 'r'\], got 'm'"),
        ({"x": 0.5, "c": "l", "n": 1.5, "a": 0.5, "b": 0.5}, r"n: expected a whole number in 1..3, got 1.5"),
        ({"x": 0.5, "c": "l", "n": 4, "a": 0.5, "b": 0.5}, r"n: expected a whole number in 1..3, got 4"),
        ({"x": 0.5, "c": "l", "n": 1, "a": 0.5, "b": 0.6}, r"non-negative shares with sum 1, .*sum 1\.1"),
        ({"x": 0.5, "c": "l", "n": 1, "a": 1.5, "b": -0.5}, "non-negative shares with sum 1"),
    ],
)
def test_values_outside_the_space_are_refused(values: dict[str, object], message: str) -> None:
    """A missing or unknown name, and a value that no genome decodes to, are refused by name."""
    space = Space([Float("x", 0.0, 1.0), Choice("c", ("l", "r")), Int("n", 1, 3), Simplex("s", ("a", "b"))])
    with pytest.raises(ConfigError, match=message):
        space.encode(values)  # type: ignore[arg-type]


def test_dimensions_that_cannot_be_are_refused() -> None:
    """Empty, infinite and logarithmic ranges through zero, single options, and repeated names are refused at construction."""
    for low, high in ((1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ConfigError, match="x: expected finite bounds with low < high"):
            Float("x", low, high)
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ConfigError, match="a logarithmic range needs low > 0"):
            Float("x", low, high, log=True)
    with pytest.raises(ConfigError, match="whole-number bounds"):
        Int("n", 0.5, 2)  # type: ignore[arg-type]
    for options in (("a",), ("a", "a")):
        with pytest.raises(ConfigError, match="two or more different options"):
            Choice("c", options)
    with pytest.raises(ConfigError, match="two or more members"):
        Simplex("s", ("a",))
    with pytest.raises(ConfigError, match="unique names, got a more than once"):
        Space([Float("a", 0, 1), Simplex("s", ("a", "b"))])
