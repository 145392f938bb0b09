"""A race of candidates over the items of their tasks: who has been measured on what, and who is out.

All candidates of a run meet the items of a task in one order, a permutation that the run's seed gives. The archive, against which
candidates are compared, holds the non-dominated among those that were scored in full.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError
from mergeopt.evaluation.censored import Censored
from mergeopt.evaluation.contest import Contest
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.racing import Racing, beaten_by, evidence_of, most_doubtful, rungs
from mergeopt.task import ItemMetric, Objective, Records, Score

__all__ = ["ITEM", "Heat", "Race", "item_order"]

ITEM = "item"
"""Column of partial records that says which items they are of."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A candidate of the archive: its losses [m], and its records per pass in the order of the race."""

    number: int
    losses: Vector
    records: Sequence[Records]


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    """A candidate beside all members in one objective, on its first `count` items: evidence against it and their leads, [members]."""

    count: int
    evidence: Vector
    leads: Vector


@dataclass(slots=True, eq=False)
class _Runner:
    """A candidate in a heat.

    `counts` is on how many items per pass it was measured, `wanted` on how many it is to be before the next decision. It is alive until
    it is scored in full, censored or failed.
    """

    number: int
    records: list[dict[str, npt.NDArray[np.generic]]]
    counts: list[int]
    wanted: list[int] | None = None
    compared: list[_Compared] = field(default_factory=list)
    alive: bool = True
    failed: bool = False
    censored: Censored | None = None


class Race:
    """The items in their order, and the archive.

    Args:
        racing: the rule.
        objectives: all of a problem.
        seed: of the order of items.
        head_of: returns whose head an objective is measured with; objectives that share a task and a head share a pass over its data.

    Raises:
        ConfigError: an objective cannot be raced, or the rule does not fit them.
    """

    def __init__(
        self, racing: Racing, objectives: Sequence[Objective], *, seed: int, head_of: Callable[[Objective], str | None] = lambda _: None
    ) -> None:
        self.racing = racing
        self.passes: list[TaskObjective] = []
        self._head_of = head_of
        self._contests = [self._contest(objective) for objective in objectives]
        if racing.together and len(self._contests) > 1:
            raise ConfigError(
                f"racing: the rule {racing.rule!r} ranks by one objective, and there are {len(self._contests)}; use sequential or anytime"
            )
        self._orders = [item_order(f"{seed}:{one.task.items('search').hash}", _items(one)) for one in self.passes]
        self._members: list[_Member] = []
        self._tables: list[Vector] | None = None  # per objective, the members' losses in the order of the race, [members, items]

    @property
    def members(self) -> tuple[int, ...]:
        """Numbers of the archive's trials, in the order in which they came."""
        return tuple(member.number for member in self._members)

    @property
    def items(self) -> int:
        """Items of a full scoring, added up over the objectives."""
        return sum(contest.items for contest in self._contests)

    def admit(self, number: int, values: Mapping[str, float], records: Callable[[], Mapping[str, Records]]) -> None:
        """Take a candidate that was scored in full into the archive, unless a member is as good in everything or the rule needs none.

        Args:
            number: of its trial.
            values: objective name -> value, natural direction.
            records: gives its records by objective name; called only where they are needed.
        """
        losses = np.array([contest.sign * values[contest.name] for contest in self._contests])
        if self.racing.together or any(bool((member.losses <= losses).all()) for member in self._members):
            return
        found = records()
        ordered: list[dict[str, npt.NDArray[np.generic]]] = [{} for _ in self.passes]
        for contest in self._contests:
            order = self._orders[contest.place]
            ordered[contest.place] |= {name: found[contest.name][name][order] for name in contest.metric.requires}
        self._members = [member for member in self._members if not bool((losses <= member.losses).all())]
        self._members.append(_Member(number, losses, ordered))
        self._tables = None

    def heat(self, numbers: Sequence[int]) -> Heat:
        """Return the race of some candidates, by the numbers of their trials, in order."""
        return Heat(self, numbers)

    def order(self, place: int) -> npt.NDArray[np.intp]:
        """Return the items of a pass in the order in which candidates meet them."""
        return self._orders[place]

    def rungs(self, candidates: int, place: int | None = None) -> tuple[int, ...]:
        """Return after how many items of a pass decisions are taken; of the longest one by default."""
        items = max(map(len, self._orders)) if place is None else len(self._orders[place])
        return rungs(self.racing, items, candidates)

    def first(self) -> list[int]:
        """Return how many items per pass tell enough for a first decision; all of them where there is nobody to be compared with."""
        return [self.rungs(1, place)[0] if self._members else len(order) for place, order in enumerate(self._orders)]

    def judge(self, records: Sequence[Records], known: list[_Compared]) -> Censored | list[int]:
        """Compare a candidate, by its records per pass so far, with the archive.

        Returns what is known of it when it is out, else how many items per pass it is to be measured on before the next decision.

        Args:
            records: of the candidate.
            known: what came of comparing it before, per objective; brought up to date.
        """
        counts = [_count(own) for own in records]
        for place, contest in enumerate(self._contests):
            if len(known) <= place:
                known.append(self._compare(place, records))
            elif known[place].count < counts[contest.place]:
                known[place] = self._compare(place, records)
        evidence = np.array([one.evidence for one in known])
        by = beaten_by(self.racing, evidence)
        if by is not None:
            return self._censored(records, self._members[by])
        whole = [one.count == contest.items for one, contest in zip(known, self._contests, strict=True)]
        objective = most_doubtful(evidence, np.array([one.leads for one in known]), whole)
        if objective is None:
            return [len(order) for order in self._orders]
        chosen = self._contests[objective].place
        counts[chosen] = next(count for count in self.rungs(1, chosen) if count > counts[chosen])
        return counts

    def _compare(self, place: int, records: Sequence[Records]) -> _Compared:
        contest = self._contests[place]
        losses = contest.losses(records[contest.place])
        differences = losses - self._losses()[place][:, : len(losses)]
        evidence = evidence_of(self.racing, differences, contest.items, contest.span)
        return _Compared(len(losses), evidence, differences.mean(axis=1))

    def _censored(self, records: Sequence[Records], member: _Member) -> Censored:
        gaps = self.gaps(records, member.records)
        estimates = self.natural(np.array([worse_by(*pair) for pair in zip(member.losses.tolist(), gaps.tolist(), strict=True)]))
        return Censored(member.number, estimates, self.partial(records))

    def gaps(self, records: Sequence[Records], others: Sequence[Records]) -> Vector:
        """Return by how much one candidate loses more than another [m], on the items that the one was measured on."""
        same = [_first(other, _count(own)) for own, other in zip(records, others, strict=True)]
        return self.losses(records) - self.losses(same)

    def check(self, records: Sequence[Records]) -> None:
        """Raise `CandidateError` when an objective cannot be told from what was measured so far, or is not finite."""
        for contest in self._contests:
            contest.check(records[contest.place])
        self.partial(records)

    def losses(self, records: Sequence[Records]) -> Vector:
        """Return the aggregates over what was measured so far, as losses [m]."""
        return np.array([contest.loss(records[contest.place]) for contest in self._contests])

    def natural(self, losses: Vector) -> dict[str, float]:
        """Return losses [m] as values by objective name."""
        return {contest.name: contest.sign * loss for contest, loss in zip(self._contests, losses.tolist(), strict=True)}

    def partial(self, records: Sequence[Records]) -> dict[str, Score]:
        """Return scores over what was measured so far; their records say which items they are of."""
        scores = {}
        for contest in self._contests:
            own, order = records[contest.place], self._orders[contest.place]
            scores[contest.name] = contest.score({ITEM: order[: _count(own)].astype(np.int64), **own})
        return scores

    def full(self, records: Sequence[Records]) -> dict[str, Score]:
        """Return the scores of a candidate that was measured on everything, from its records in the order of the race."""
        back = [np.argsort(order) for order in self._orders]
        placed = [{name: column[where] for name, column in own.items()} for own, where in zip(records, back, strict=True)]
        return {contest.name: contest.score(placed[contest.place]) for contest in self._contests}

    def full_loss(self, records: Sequence[Records]) -> float:
        """Return the first objective's value of a candidate that was measured on everything, as a loss."""
        first = self._contests[0]
        return first.sign * self.full(records)[first.name].value

    def _losses(self) -> list[Vector]:
        if self._tables is None:
            self._tables = [
                np.array([contest.losses(member.records[contest.place]) for member in self._members]).reshape(-1, contest.items)
                for contest in self._contests
            ]
        return self._tables

    def _contest(self, objective: Objective) -> Contest:
        name = objective.info.name
        if not isinstance(objective, TaskObjective) or not isinstance(objective.metric, ItemMetric):
            what = f"its metric {objective.metric.name!r}" if isinstance(objective, TaskObjective) else "a function of a model"
            raise ConfigError(
                f"racing: the objective {name!r} cannot be measured item by item ({what} is no mean over items), and a candidate is "
                "dropped only where all objectives say so; use another metric for it, or racing: off"
            )
        span = objective.metric.item_range
        if self.racing.rule == "anytime" and span is None:
            raise ConfigError(
                f"racing: the rule 'anytime' needs to know between which numbers an item's value lies, and {objective.metric.name!r} of "
                f"the objective {name!r} has no such limits; use a metric such as accuracy, or the rule sequential"
            )
        sign = 1.0 if objective.info.direction == "minimize" else -1.0
        width = math.inf if span is None else span[1] - span[0]
        return Contest(name, objective, objective.metric, self._pass(objective), _items(objective), sign, width)

    def _pass(self, objective: TaskObjective) -> int:
        """Return the place of the pass over data that an objective is measured by."""
        for place, one in enumerate(self.passes):
            if one.task is objective.task and self._head_of(one) == self._head_of(objective):
                return place
        self.passes.append(objective)
        return len(self.passes) - 1


class Heat:
    """Some candidates on their way, told apart by their index.

    Measure what `todo` names on the items that `wanted` gives, `add` or `fail` each of them, then `decide`; until `todo` is empty.
    """

    def __init__(self, race: Race, numbers: Sequence[int]) -> None:
        self._race = race
        self._whole = [len(race.order(place)) for place in range(len(race.passes))]
        self._runners = [_Runner(number, [{} for _ in race.passes], [0 for _ in race.passes]) for number in numbers]
        self._rungs = race.rungs(len(numbers))  # of candidates that race together
        self._cuts: list[tuple[list[_Runner], list[_Runner]]] = []  # per rung: who went on, and who did not

    @property
    def passes(self) -> Sequence[TaskObjective]:
        """One objective per pass over data: its task is what is run."""
        return self._race.passes

    @property
    def left(self) -> list[int]:
        """Who is neither out nor measured in full, in order."""
        return [index for index, runner in enumerate(self._runners) if runner.alive]

    def todo(self) -> list[int]:
        """Return who is to be measured next: all that are left where they race together, else the first of them."""
        return self.left if self._race.racing.together else self.left[:1]

    def wanted(self, index: int) -> list[list[int]]:
        """Return the items, per pass, that a candidate is to be measured on next."""
        runner = self._runners[index]
        if self._race.racing.together:
            runner.wanted = [next((count for count in self._rungs if count > runner.counts[0]), self._rungs[-1])]
        elif runner.wanted is None:
            runner.wanted = self._race.first()
        pairs = zip(runner.counts, runner.wanted, strict=True)
        return [self._race.order(place)[start:stop].tolist() for place, (start, stop) in enumerate(pairs)]

    def add(self, index: int, records: Sequence[Records]) -> None:
        """Take in what was measured: the records of the items wanted, per pass; of no items, no columns.

        Raises:
            CandidateError: an objective cannot be told from what was measured so far, or is not finite.
        """
        runner = self._runners[index]
        for own, more in zip(runner.records, records, strict=True):
            for name, column in more.items():
                own[name] = np.concatenate([own[name], column]) if name in own else np.asarray(column)
        runner.counts = [_count(own) for own in runner.records]
        self._race.check(runner.records)

    def fail(self, index: int) -> None:
        """Take a candidate out that could not be measured."""
        self._runners[index].alive, self._runners[index].failed = False, True

    def decide(self) -> None:
        """Drop who is out, after all that `todo` named were measured or failed."""
        if self._race.racing.together:
            self._cut()
            return
        for runner in self._runners:
            if runner.alive and any(runner.counts):
                self._judge(runner)

    def _judge(self, runner: _Runner) -> None:
        if runner.counts == self._whole:
            runner.alive = False
            return
        verdict = self._race.judge(runner.records, runner.compared)
        if isinstance(verdict, Censored):
            runner.censored, runner.alive = verdict, False
        else:
            runner.wanted = verdict

    def finished(self, index: int) -> bool:
        """Whether nothing more is to be known of a candidate."""
        return not (any(runner.alive for runner in self._runners) if self._race.racing.together else self._runners[index].alive)

    def result(self, index: int) -> dict[str, Score] | Censored:
        """Return the scores of a candidate that finished and did not fail, or why there are none."""
        runner = self._runners[index]
        return runner.censored or self._race.full(runner.records)

    def _cut(self) -> None:
        """Let the best go on; where all of them have failed since, the best of those that were cut last take their place."""
        left = [runner for runner in self._runners if runner.alive]
        while not left and self._cuts:
            left = self._cuts.pop()[1]
        if left and left[0].counts == self._whole:
            for runner in left:
                runner.alive = False
            self._place(left)
        elif left:
            ranked = sorted(left, key=lambda runner: float(self._race.losses(runner.records)[0]))
            keep = self._race.racing.kept(len(ranked))
            self._cuts.append((ranked[:keep], ranked[keep:]))
            for position, runner in enumerate(ranked):
                runner.alive = position < keep

    def _place(self, finishers: Sequence[_Runner]) -> None:
        """Rank those that were cut below all that went on from their rung, the last cut first."""
        known = {runner: self._race.full_loss(runner.records) for runner in finishers}
        best = min(known, key=known.__getitem__)
        for survivors, cut in reversed(self._cuts):
            worst = max((runner for runner in survivors if not runner.failed), key=known.__getitem__)
            for runner in cut:
                known[runner] = worse_by(known[worst], float(self._race.gaps(runner.records, worst.records)[0]))
                estimates = self._race.natural(np.array([known[runner]]))
                runner.censored = Censored(best.number, estimates, self._race.partial(runner.records))


def item_order(identity: str, items: int) -> npt.NDArray[np.intp]:
    """Return a permutation of so many items: by the hash of their index and an identity, so that it is the same everywhere and for ever."""
    digests = [hashlib.blake2b(f"{identity}:{index}".encode(), digest_size=8, person=b"item order").digest() for index in range(items)]
    return np.array(sorted(range(items), key=digests.__getitem__), dtype=np.intp)


def worse_by(loss: float, gap: float) -> float:
    """Return a loss that is larger by a gap, and larger in any case."""
    return max(loss + gap, math.nextafter(loss, math.inf))


def _items(objective: TaskObjective) -> int:
    return len(objective.task.items("search"))


def _first(records: Records, count: int) -> Records:
    return {name: column[:count] for name, column in records.items()}


def _count(records: Records) -> int:
    return len(next(iter(records.values())))
