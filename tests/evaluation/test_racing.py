"""The rules of racing, on numbers alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeopt.errors import ConfigError
from mergeopt.evaluation.racing import Racing, beaten_by, evidence_of, log_capitals, most_doubtful, rungs, z_scores

NOWHERE = np.empty((0, 10))
Differences = list[npt.NDArray[np.float64]]


def out(racing: Racing, differences: Differences, items: int) -> int | None:
    """Return who beats a candidate, in objectives of so many items that span 1."""
    return beaten_by(racing, np.array([evidence_of(racing, d, items, 1.0) for d in differences]))


def doubtful(racing: Racing, differences: Differences, items: list[int]) -> int | None:
    """Return the objective that is measured next, with so many items per objective."""
    evidence = np.array([evidence_of(racing, d, count, 1.0) for d, count in zip(differences, items, strict=True)])
    whole = [d.shape[1] == count for d, count in zip(differences, items, strict=True)]
    return most_doubtful(evidence, np.array([d.mean(axis=1) for d in differences]), whole)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rule": "sequental"}, "did you mean 'sequential'"),
        ({"rule": "anytime", "z": 3}, "no option 'z'"),
        ({"z": 3}, "'rule'"),
        ("on", "unknown rule 'on'"),
        (True, "expected off"),
        ({"rule": "anytime", "alpha": 1.0}, "alpha.*below 1"),
        ({"rule": "sequential", "z": 0}, "z: expected a number above 0"),
        ({"rule": "sequential", "z": math.inf}, "z: expected a number above 0"),
        ({"rule": "sequential", "first": 1}, "first.*>= 2"),
        ({"rule": "sequential", "first": 2.5}, "first.*whole number"),
        ({"rule": "halving", "eta": True}, "eta"),
        ({"rule": "sequential", "growth": math.nan}, "growth"),
    ],
)
def test_bad_options_are_refused(spec: object, words: str) -> None:
    """A rule or an option that cannot be is a ConfigError that says what was expected."""
    with pytest.raises(ConfigError, match=f"(?i){words}"):
        Racing.of(spec)


def test_options_of_a_run_file() -> None:
    """Off (false to YAML) is no racing, a name is a rule with its defaults, a mapping sets options; a description can be read again."""
    assert Racing.of(None) is Racing.of("off") is Racing.of(False) is None
    assert Racing.of("anytime") == Racing("anytime")
    made = Racing.of({"rule": "sequential", "z": 2, "first": 30})
    assert made == Racing("sequential", z=2, first=30)
    assert made is not None
    assert Racing.of(made.describe()) == made


@given(
    st.sampled_from(
        [Racing("sequential", first=7, growth=1.01), Racing("anytime"), Racing("halving"), Racing("halving", eta=1.5, first=2)]
    ),
    st.integers(1, 5000),
    st.integers(1, 40),
)
def test_rungs_rise_to_all_items(racing: Racing, items: int, candidates: int) -> None:
    """Whatever the rule, decisions are taken after ever more items, the first after `first` at least, and the last rung is all items."""
    found = rungs(racing, items, candidates)
    assert found[-1] == items
    assert list(found) == sorted(set(found))
    assert found[0] >= min(racing.first, items)


def test_halving_leaves_one() -> None:
    """With eta 3, nine candidates are cut after a ninth and a third of the items; a lone one is scored in full at once."""
    assert rungs(Racing("halving", first=2), 900, 9) == (100, 300, 900)
    assert rungs(Racing("halving"), 900, 1) == (900,)


def test_z_is_the_paired_statistic() -> None:
    """z is mean over standard error with the finite-population factor; certain at all items or without variance; 0 for equal items."""
    d = np.random.default_rng(0).normal(0.1, 1.0, (3, 40))
    expected = d.mean(axis=1) / (d.std(axis=1, ddof=1) / math.sqrt(40)) / math.sqrt(1 - 40 / 160)
    np.testing.assert_allclose(z_scores(d, 160), expected)
    assert z_scores(d, 40).tolist() == np.copysign(math.inf, d.mean(axis=1)).tolist()
    assert z_scores(np.array([[0.0] * 5, [1.0] * 5, [-1.0] * 5]), 50).tolist() == [0.0, math.inf, -math.inf]


def test_the_capital_is_a_product_of_bets() -> None:
    """The capital equals the product written out bet by bet from the formula."""
    rng = np.random.default_rng(1)
    d = rng.choice([-1.0, 0.0, 1.0], size=(4, 60), p=[0.2, 0.5, 0.3])
    for row, found in zip(d, log_capitals(d, 200), strict=True):
        x, capital, seen, squares = (1 + row) / 2, 1.0, 0.0, 0.25
        for t, value in enumerate(x):
            left, mean, variance = (100 - seen) / (200 - t), (0.5 + seen) / (t + 1), squares / (t + 1)
            bet = min(0.75 / left, max(0.0, (mean - left) / (variance + (mean - left) ** 2)))
            capital *= 1 + bet * (value - left)
            seen += value
            squares += (value - (0.5 + seen) / (t + 2)) ** 2
        assert math.exp(found) == pytest.approx(capital)


def test_the_capital_is_infinite_where_nothing_can_turn_it() -> None:
    """Once the items left cannot make up for the lead, the candidate is worse for certain; exact equality is never certain."""
    assert log_capitals(np.array([[1.0] * 6, [-1.0] * 6]), 10).tolist() == [math.inf, pytest.approx(0.0)]
    assert math.isfinite(log_capitals(np.array([[1.0] * 5 + [-1.0] * 5]), 10)[0])


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_error_of_anytime_holds(share: float) -> None:
    """A candidate that equals a member over all items is dropped at any of many looks with probability alpha at most, in 3,000 races."""
    racing, items, alpha = Racing("anytime", first=10, growth=1.2, alpha=0.05), 400, 0.05
    half = int(share * items / 2)
    d = np.concatenate([np.ones(half), -np.ones(half), np.zeros(items - 2 * half)])
    rng = np.random.default_rng(2)
    races = rng.permuted(np.tile(d, (3000, 1)), axis=1)
    dropped = np.zeros(len(races), dtype=bool)
    for n in rungs(racing, items)[:-1]:
        dropped |= log_capitals(races[:, :n], items) >= -math.log(alpha)
    assert dropped.mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / len(races))
    assert dropped.any()


def test_the_error_of_anytime_holds_against_many_members() -> None:
    """With two objectives and ten members, none of which is better in both, alpha bounds the error of all comparisons together."""
    racing, items, alpha, members = Racing("anytime", first=10, growth=1.3, alpha=0.1), 200, 0.1, 10
    rng = np.random.default_rng(3)
    better, equal = rng.choice([0.0, 1.0], size=(members, items), p=[0.5, 0.5]), np.repeat([1.0, -1.0], items // 2)
    dropped = 0
    for _ in range(300):
        order = rng.permutation(items)
        ties = rng.permuted(np.tile(equal, (members, 1)), axis=1)[:, order]
        looks = rungs(racing, items)[:-1]
        dropped += any(out(racing, [better[:, order[:n]], ties[:, :n]], items) is not None for n in looks)
    assert dropped / 300 <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 300)


@pytest.mark.parametrize("racing", [Racing("sequential"), Racing("anytime")])
def test_dropping_needs_one_member_better_in_everything(racing: Racing) -> None:
    """Two members that are each better in one objective drop nobody; one that is better in both does, and is named."""
    worse, better = np.ones(60), -np.ones(60)
    noise = np.random.default_rng(4).choice([0.0, 1.0], size=60)
    one = [np.array([worse * noise, better * noise]), np.array([better * noise, worse * noise])]
    assert out(racing, one, 500) is None
    both = [np.vstack([one[0], worse * noise]), np.vstack([one[1], worse * noise])]
    assert out(racing, both, 500) == 2
    assert out(racing, [NOWHERE, NOWHERE], 500) is None


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["sequential", "anytime"]))
def test_nobody_is_beaten_by_an_equal(seed: int, rule: str) -> None:
    """A candidate whose items are all those of a member stays in, whatever the other members are."""
    racing = Racing("sequential" if rule == "sequential" else "anytime")
    d = np.random.default_rng(seed).choice([-1.0, 0.0, 0.0, 0.5], size=(3, 50))
    d[1] = 0.0
    assert out(racing, [d], 200) is None


@pytest.mark.parametrize("racing", [Racing("sequential"), Racing("anytime")])
def test_more_is_measured_where_least_is_known(racing: Racing) -> None:
    """Of the member likeliest to dominate a candidate, the objective with the least evidence is next; one measured in full never is."""
    rng = np.random.default_rng(5)
    clear, faint = rng.choice([0.0, 1.0], size=60, p=[0.2, 0.8]), rng.choice([-1.0, 0.0, 1.0], size=60, p=[0.1, 0.6, 0.3])
    hopeless = -clear
    differences = [np.array([clear, hopeless]), np.array([faint, faint])]
    assert doubtful(racing, differences, [500, 500]) == 1
    assert doubtful(racing, differences, [500, 60]) == 0


@pytest.mark.parametrize("racing", [Racing("sequential"), Racing("anytime")])
def test_who_cannot_be_beaten_is_measured_to_the_end(racing: Racing) -> None:
    """Where every member is no better in an objective that was measured in full, nothing is left to decide."""
    better, worse = np.full((1, 60), -1.0), np.full((1, 60), 1.0)
    for differences in ([better, worse], [np.zeros((1, 60)), worse]):
        assert doubtful(racing, differences, [60, 500]) is None
    both = [np.vstack([better, worse]), np.vstack([worse, worse * 0.0])]
    assert doubtful(racing, both, [60, 500]) == 1
    nobody: Differences = [NOWHERE, NOWHERE]
    assert doubtful(racing, nobody, [500, 500]) is None
