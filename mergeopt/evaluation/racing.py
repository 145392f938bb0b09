"""When a candidate is out of a race: decisions on numbers alone, after the first n of N items in one fixed random order.

A candidate is compared with each fully scored member of the archive by the differences d_i = candidate's loss - member's loss of the same
items. It is out when for some member the evidence says of every objective that the candidate is worse over all N items; as long as
that is open in one of them it may belong to the front, and more is measured where least is known. Which objective that is follows from
what was seen, which none of the rules minds.

`sequential` takes the paired z statistic, with the finite-population factor of sampling without replacement (Cochran 1977, Sampling
Techniques, eq. 2.20): z = mean(d) / sqrt(var(d) / n * (1 - n / N)). Looking several times at z = 3 is no exact level.

`anytime` bets against "the candidate is no worse" and multiplies a capital K that cannot be expected to grow while this is so; by Ville's
inequality it ever reaches 1 / alpha with probability alpha at most, however often one looks. With x_i = (1 + d_i / R) / 2 in [0, 1], R the
range of an item's loss, the mean of what is left is m_t = (N / 2 - sum_{i<t} x_i) / (N - t + 1) at most, and

    K_n = prod_{t<=n} 1 + l_t (x_t - m_t),   l_t = min(c / m_t, max(0, (u - m_t) / (v + (u - m_t)^2)))

with u and v the mean and variance of the x before t. Source: Waudby-Smith and Ramdas (2024), Estimating means of bounded random variables
by betting, JRSS B 86(1): the capital of its section 4, the bets "aGRAPA" of its appendix B, sampling without replacement in section 5. Over
the objectives the smallest capital counts, over the members their mean: if no member is better in everything, each of the smallest
capitals lies below one that cannot be expected to grow, so alpha bounds the error of a candidate against all members together.

`halving` compares the candidates of one ask with each other: after each rung the best 1 / eta by their mean go on, to eta times the
items (successive halving; Jamieson and Talwalkar 2016, AISTATS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError, nearest

__all__ = ["Racing", "Rule", "beaten_by", "evidence_of", "log_capitals", "most_doubtful", "rungs", "z_scores"]

Rule = Literal["sequential", "anytime", "halving"]
Vector = npt.NDArray[np.float64]

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "sequential": ("first", "growth", "z"),
    "anytime": ("first", "growth", "alpha"),
    "halving": ("first", "eta"),
}
STAKE = 0.75  # c: largest share of the capital that one bet may lose
ROUNDING = 1e-9  # in which a sum of items may differ from the exact one


@dataclass(frozen=True, slots=True)
class Racing:
    """How candidates are raced.

    Args:
        rule: see above.
        first: items of each objective before the first decision, >= 2.
        growth: items at a decision over those at the one before, > 1.
        z: of `sequential`, > 0.
        alpha: of `anytime`: largest probability of dropping a candidate that no member dominates, in (0, 1).
        eta: of `halving`, > 1.

    Raises:
        ConfigError: an option is out of its range.
    """

    rule: Rule = "sequential"
    first: int = 50
    growth: float = 1.5
    z: float = 3.0
    alpha: float = 0.001
    eta: float = 3.0

    def __post_init__(self) -> None:
        if self.rule not in OPTIONS:
            raise ConfigError(f"racing: unknown rule {self.rule!r}; {nearest(str(self.rule), OPTIONS)}")
        if isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 2:
            raise ConfigError(f"racing: first: expected a whole number of items >= 2, got {self.first!r}")
        limits = {"growth": (1.0, math.inf), "z": (0.0, math.inf), "alpha": (0.0, 1.0), "eta": (1.0, math.inf)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > low or value >= high:
                below = f" and below {high:g}" if high < math.inf else ""
                raise ConfigError(f"racing: {name}: expected a number above {low:g}{below}, got {value!r}")

    @classmethod
    def of(cls, spec: Any) -> Racing | None:
        """Return what a run file asks for.

        Args:
            spec: None, `off` (or false, as YAML reads it), a rule's name, or a mapping with `rule` and options.

        Raises:
            ConfigError: it says something else, or an option that the rule does not have.
        """
        if spec is None or spec is False or spec == "off":
            return None
        if isinstance(spec, cls):
            return spec
        given: dict[str, Any] = {"rule": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
        if "rule" not in given:
            raise ConfigError(f"racing: expected off, one of {', '.join(OPTIONS)}, or a mapping with the key 'rule', got {spec!r}")
        known = OPTIONS.get(str(given["rule"]), tuple(field.name for field in fields(cls)))
        for key in given:
            if key not in ("rule", *known):
                raise ConfigError(f"racing: the rule {given['rule']!r} has no option {key!r}; {nearest(str(key), known)}")
        return cls(**given)

    @property
    def together(self) -> bool:
        """Whether the candidates of one ask are compared with each other, so that they race together."""
        return self.rule == "halving"

    def kept(self, count: int) -> int:
        """Return how many of so many candidates go on, by `halving`: one in eta, and fewer than there are."""
        return max(1, min(math.ceil(count / self.eta), count - 1))

    def describe(self) -> dict[str, Any]:
        """Return the rule and its own options; JSON-able."""
        return {"rule": self.rule, **{name: getattr(self, name) for name in OPTIONS[self.rule]}}


def rungs(racing: Racing, items: int, candidates: int = 1) -> tuple[int, ...]:
    """Return after how many items decisions are taken, ascending; the last is all of them.

    Args:
        racing: the rule.
        items: of the objective that has most, >= 1.
        candidates: that race together.
    """
    counts: list[int] = []
    if racing.together:
        while candidates > 1:
            candidates = racing.kept(candidates)
            counts.append(max(racing.first, math.ceil(items / racing.eta ** (len(counts) + 1))))
    else:
        count = racing.first
        while count < items:
            counts.append(count)
            count = math.ceil(count * racing.growth)
    return (*sorted({count for count in counts if count < items}), items)


def evidence_of(racing: Racing, differences: Vector, items: int, span: float) -> Vector:
    """Return how much says that a candidate is worse than each member in one objective, [members]: z, or log K.

    Args:
        racing: `sequential` or `anytime`.
        differences: candidate's loss - member's loss, [members, n], in the order of the race.
        items: how many there are in all.
        span: largest minus smallest loss that an item can have; `anytime` needs it.
    """
    return z_scores(differences, items) if racing.rule == "sequential" else log_capitals(differences / span, items)


def beaten_by(racing: Racing, evidence: Vector) -> int | None:
    """Return the member that the evidence [objectives, members] says a candidate is dominated by, None while there is not enough."""
    if not evidence.shape[1]:
        return None
    least = evidence.min(axis=0)
    if racing.rule == "sequential":
        enough = least.max() > racing.z
    else:
        enough = np.logaddexp.reduce(least) - math.log(len(least)) >= -math.log(racing.alpha)
    return int(np.argmax(least)) if enough else None


def most_doubtful(evidence: Vector, leads: Vector, whole: Sequence[bool]) -> int | None:
    """Return the objective to measure more of a candidate: where least says that the member likeliest to beat it does.

    None when no member can beat it any more, whatever the items left say.

    Args:
        evidence: [objectives, members].
        leads: by how much each member is better so far, mean differences [objectives, members].
        whole: per objective, whether all items were measured.
    """
    done = np.asarray(whole)
    may = (leads[done] > 0.0).all(axis=0)
    if done.all() or not may.any():
        return None
    likeliest = int(np.argmax(np.where(may, evidence.min(axis=0), -np.inf)))
    return int(np.argmin(np.where(done, np.inf, evidence[:, likeliest])))


def z_scores(differences: Vector, items: int) -> Vector:
    """Return mean over standard error of differences [members, n] drawn without replacement from so many items; [members].

    Where differences do not vary, or all items are there, it is infinite with the sign of their mean; 0 where that is 0.
    """
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    variance = differences.var(axis=1, ddof=1) if n > 1 else np.zeros_like(mean)
    error = np.sqrt(variance / n * (1.0 - n / items))
    scores: Vector = np.where(mean == 0.0, 0.0, np.copysign(np.inf, mean))
    np.divide(mean, error, out=scores, where=error > 0.0)
    return scores


def log_capitals(differences: Vector, items: int) -> Vector:
    """Return log K_n against "their mean over all items is 0 or less" for differences [members, n] in [-1, 1]; [members].

    Infinite where no values of the items left could make it so.
    """
    x = (1.0 + np.clip(differences, -1.0, 1.0)) / 2.0
    n = x.shape[1]
    before = np.arange(n)
    total = np.cumsum(x, axis=1) - x
    left = (items / 2.0 - total) / (items - before)
    mean = (0.5 + total) / (before + 1.0)
    deviations = (x - (0.5 + total + x) / (before + 2.0)) ** 2
    variance = (0.25 + np.cumsum(deviations, axis=1) - deviations) / (before + 1.0)
    possible = left > 0.0
    lead = mean - left
    bet = np.clip(lead / (variance + lead**2), 0.0, STAKE / np.where(possible, left, 1.0))
    gains = np.log1p(np.where(possible, bet * (x - left), 0.0))
    decided = (left < -ROUNDING).any(axis=1) | (items / 2.0 - x.sum(axis=1) < -ROUNDING * items)
    capitals: Vector = np.where(decided, np.inf, gains.sum(axis=1))
    return capitals
