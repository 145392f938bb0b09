"""The one loop of every run: ask, evaluate, store, tell; resuming is the same loop, answered from the store as far as it reaches."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergeopt.errors import CandidateError, ConfigError, Failure, StoreError, StrategyError
from mergeopt.evaluation.race import Race
from mergeopt.problem import Evaluation, FrugalProblem, Problem, Proposal
from mergeopt.recipe import ordered_json
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Learner, Result, Status, Strategy
from mergeopt.study.evaluations import evaluations, raced, verdict
from mergeopt.study.front import reference_point
from mergeopt.study.interrupt import Interrupt
from mergeopt.study.snapshot import Publisher, held_out, report_warnings
from mergeopt.study.store import Learned, Store
from mergeopt.study.trial import Kind, Trial, losses, proposal_key, violations
from mergeopt.task import Score

__all__ = ["Plan", "Search"]

log = logging.getLogger(__name__)

PATIENCE = 50  # batches of nothing but duplicates before a search counts as exhausted
SAVING = 1.0  # seconds of learning between two times that a learner's state is stored, at least
SHARE = 0.1  # of a learner's time that storing its state may take
HOPELESS = 20  # charged candidates that all failed before a run gives up


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a run was asked to do: what it may spend, candidates per ask, starting points, and a race where candidates are raced."""

    budget: Budget
    batch: int
    init: tuple[Proposal, ...]
    race: Race | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A proposal on its way, with the key of its duplicates and the reason why it could not even be decoded."""

    proposal: Proposal
    key: str
    error: str | None = None


class Search:
    """One pass of the loop over a store that is empty (a new run) or not (a resumed one).

    Args:
        problem: what is searched.
        strategy: set up, not yet asked.
        store: of this very run; open.
        plan: what to do.
        publisher: told of every step.
    """

    def __init__(self, problem: Problem, strategy: Strategy, store: Store, plan: Plan, publisher: Publisher) -> None:
        self._problem = problem
        self._strategy = strategy
        self._store = store
        self._plan = plan
        self._publisher = publisher
        self._objectives = problem.info.objectives
        self._stored = store.trials()
        self._reference: tuple[float, ...] | None = None
        self._trials: list[Trial] = []
        self._first: dict[str, Trial] = {}  # key -> the trial that was really evaluated
        self._charged: dict[str, None] = {}  # keys that the budget has paid for, in order
        self._failures: list[str] = []  # reasons, of charged trials
        self._repeats = 0  # uncharged candidates in a row
        self._steps = 0  # gradient steps taken
        self._saved = 0.0  # when the learner's state was stored last
        self._pause = SAVING
        self._warnings: dict[str, None] = dict.fromkeys(store.header().get("warnings", []))
        self._phase = "baselines"
        self._interrupt = Interrupt()

    @property
    def trials(self) -> list[Trial]:
        """All trials so far; after `run`, as stored."""
        return self._trials

    @property
    def gradient_steps(self) -> int:
        """Gradient steps taken so far."""
        return self._steps

    @property
    def reference(self) -> tuple[float, ...] | None:
        """The hypervolume's reference point, None while unknown."""
        return self._reference

    def run(self) -> tuple[str, str]:
        """Run to the end or to a signal, and return the state (`finished` or `interrupted`) with the reason.

        Raises:
            StoreError: the store cannot be written, or holds another run's trials.
            StrategyError: the strategy broke its contract, or does not repeat what it asked before.
            Failure: no candidate could be scored.
        """
        with self._interrupt:
            reason = self._work()
        if self._interrupt.requested is not None:
            return "interrupted", self._interrupt.requested
        return "finished", reason

    def _work(self) -> str:
        self._baselines()
        self._starting_points()
        reason = self._ask_and_tell()
        if self._interrupt.requested is None:
            if self._charged and len(self._failures) == len(self._charged):
                raise self._nothing_scored()
            self._report()
        return reason

    def _baselines(self) -> None:
        self._score("baseline", [_item(proposal) for proposal in self._problem.baselines()])
        if self._interrupt.requested is None:
            self._fix_reference("baseline")

    def _starting_points(self) -> None:
        self._phase = "starting points"
        trials = self._score("init", [self._made(proposal) for proposal in self._plan.init])
        if self._interrupt.requested is None:
            pairs = [(Candidate(trial.genome), trial) for trial in trials if trial.genome is not None]
            self._tell(pairs)
            self._fix_reference("init")

    def _ask_and_tell(self) -> str:
        self._phase = "search"
        self._go_on_learning()
        while len(self._charged) < self._plan.budget.evaluations and self._interrupt.requested is None:
            n = min(self._plan.batch, self._plan.budget.evaluations - len(self._charged))
            asked = self._strategy.ask(n)
            candidates = self._checked(asked, n)
            self._warn(asked.warnings)
            if asked.state is AskState.LEARNING:
                self._learn(asked.gradient_steps)
                continue
            self._phase = "search"
            trials = self._score("asked", [self._decoded(candidate) for candidate in candidates])
            if len(trials) < len(candidates):
                break
            self._tell(list(zip(candidates, trials, strict=True)))
            self._fix_reference("asked")
            if self._repeats >= PATIENCE * self._plan.batch:
                return f"exhausted: the last {self._repeats} candidates repeat earlier ones"
            if asked.state in (AskState.DONE, AskState.EXHAUSTED):
                return f"the strategy is {asked.state.value}"
        return "budget"

    def _go_on_learning(self) -> None:
        """Put a learner back to where it stood last; what was tried until then is taken as it is stored."""
        learned = self._store.learned()
        if learned is None or not isinstance(self._strategy, Learner):
            return
        for trial in self._stored[len(self._trials) : learned.trials]:
            self._note(trial)
        self._strategy.load_state(learned.state)
        self._steps = learned.steps
        self._saved = time.monotonic()

    def _learn(self, steps: int) -> None:
        """Account for gradient steps, and store where the learner stands from time to time and whenever it has to stop."""
        self._phase = "learning"
        self._steps += steps
        allowed = self._plan.budget.gradient_steps
        if steps < 1 or (allowed is not None and self._steps > allowed):
            raise StrategyError(
                f"the strategy {self._strategy.info.name!r} says that it is learning and took {steps} gradient steps, {self._steps} in "
                f"all; expected at least one at a time, and {allowed} in all at most"
            )
        now = time.monotonic()
        if now >= self._saved + self._pause or self._steps == allowed or self._interrupt.requested is not None:
            self._save()
            self._saved = time.monotonic()
            self._pause = max(SAVING, (self._saved - now) / SHARE)
        self._publish()

    def _save(self) -> None:
        self._store.set({"gradient_steps": self._steps})
        if isinstance(self._strategy, Learner):
            self._store.learn(Learned(len(self._trials), self._steps, self._strategy.state()))

    def _warn(self, warnings: Sequence[str]) -> None:
        """Keep what a strategy has to say with the run, each sentence once, and say it now."""
        new = [warning for warning in warnings if warning not in self._warnings]
        if new:
            self._warnings |= dict.fromkeys(new)
            self._store.set({"warnings": list(self._warnings)})
            for warning in new:
                log.warning("%s: %s", self._strategy.info.name, warning)

    def _keep_reduced(self) -> None:
        """Store what the problem had to make smaller, before the first trial that was scored so."""
        reduced = dict(self._problem.reduced) if isinstance(self._problem, FrugalProblem) else {}
        known = self._store.header().get("reduced", []) if reduced else []
        if reduced and (not known or {key: value for key, value in known[-1].items() if key != "from_trial"} != reduced):
            self._store.set({"reduced": [*known, {"from_trial": len(self._trials), **reduced}]})
            self._warn([f"memory was short: from trial {len(self._trials)} on, {_said(reduced)}"])

    def _report(self) -> None:
        """Score the baselines and the front's members on the report part, as far as that has not been done, or failed."""
        self._phase = "report"
        if "report" not in self._problem.parts:
            return
        wanted = held_out(self._trials, self._objectives, self._reference)
        origins = sorted({trial.origin for trial in wanted if "report" not in self._trials[trial.origin].scores})
        proposals = [Proposal(t.name, t.genome, t.recipe) for t in (self._trials[number] for number in origins)]
        stream = evaluations(self._problem, proposals, "report")
        for number in origins:
            evaluation = next(stream)
            self._store.rescore(number, "report", replace(evaluation, error=verdict(evaluation, self._objectives)))
            self._publish()
            if self._interrupt.requested is not None:
                break
        self._trials = self._store.trials()
        for warning in report_warnings(self._trials, self._objectives, self._reference):
            log.warning("%s", warning)

    def _score(self, kind: Kind, items: Sequence[_Item]) -> list[Trial]:
        """Return one trial per item, in order; fewer when a signal came."""
        unseen, first = self._unseen(items), len(self._trials)
        trials = [self._replayed(kind, item) for item in items[: max(0, len(self._stored) - len(self._trials))]]
        if kind == "asked" and self._plan.race is not None:
            numbered = {first + index: items[index].proposal for index in unseen}
            stream = raced(self._problem, self._plan.race, numbered, first + len(trials))
        else:
            stream = evaluations(self._problem, [items[index].proposal for index in unseen if index >= len(trials)], "search")
        for item in items[len(trials) :]:
            if self._interrupt.requested is not None:
                break
            trial = self._fresh(kind, item, stream)
            self._keep_reduced()
            self._store.append(trial)
            trial = _light(trial)
            trials.append(trial)
            self._note(trial)
            self._publish()
        return trials

    def _unseen(self, items: Sequence[_Item]) -> list[int]:
        """Return the indices of those that are to be evaluated: no repetitions, and none that could not be decoded."""
        keys = dict.fromkeys(self._first)
        unseen = []
        for index, item in enumerate(items):
            if item.key not in keys and item.error is None:
                unseen.append(index)
            keys[item.key] = None
        return unseen

    def _fresh(self, kind: Kind, item: _Item, stream: Iterator[Evaluation]) -> Trial:
        proposal, twin = item.proposal, self._first.get(item.key)
        recipe = proposal.recipe
        trial = Trial(
            number=len(self._trials),
            kind=kind,
            name=proposal.name,
            genome=proposal.genome,
            recipe_json=None if recipe is None else ordered_json(recipe.to_json()),
            key=item.key,
            status=Status.FAILED,
            error=item.error,
            charged=kind != "baseline" and item.key not in self._charged,
            created=time.time(),
        )
        if twin is not None:
            trial = replace(trial, status=twin.status, error=twin.error, scores=twin.scores, censored=twin.censored)
            return replace(trial, duplicate_of=twin.number)
        if item.error is not None:
            return trial
        evaluation = next(stream)
        error = verdict(evaluation, self._objectives)
        trial = replace(trial, error=error, seconds=dict(evaluation.seconds))
        if error is not None:
            return trial
        if evaluation.censored is not None:
            return replace(trial, status=Status.CENSORED, censored=evaluation.censored)
        scores = {objective.name: evaluation.scores[objective.name] for objective in self._objectives}
        return replace(trial, status=Status.OK, scores={"search": scores})

    def _replayed(self, kind: Kind, item: _Item) -> Trial:
        trial = self._stored[len(self._trials)]
        if kind != trial.kind or not _same_bits(trial, item):
            raise self._mismatch(kind, trial, item)
        self._note(trial)
        return trial

    def _mismatch(self, kind: Kind, trial: Trial, item: _Item) -> StoreError | StrategyError:
        if kind != "asked" or trial.kind != "asked":
            return StoreError(
                f"cannot resume {self._store.folder}: its trial {trial.number} is {trial.kind} {trial.name!r}, but now "
                f"{kind} {item.proposal.name!r} is in its place; give the same starting points and baselines, or start in another folder"
            )
        info = self._strategy.info
        return StrategyError(
            f"cannot resume {self._store.folder}: the strategy {info.name!r} (version {info.version}) is not replayable: it asked another "
            f"candidate {trial.number} than the stored one. Use the library versions named in the run's header, or start a run in another "
            "folder with this run's front as starting points"
        )

    def _note(self, trial: Trial) -> None:
        self._trials.append(trial)
        if trial.duplicate_of is None:
            self._first[trial.key] = trial
        if not trial.charged:
            self._repeats += trial.kind == "asked"
            return
        self._repeats = 0
        self._charged[trial.key] = None
        self._admit(trial)
        if trial.status is Status.FAILED:
            self._failures.append(trial.error or "unknown")
        if len(self._charged) == len(self._failures) == HOPELESS:
            raise self._nothing_scored()

    def _admit(self, trial: Trial) -> None:
        """Let the candidates behind a trial race against it; baselines do not count, since they are no part of a front."""
        values, named = trial.vector(self._objectives), trial.values()
        if self._plan.race is None or values is None or named is None or bool((violations(values, self._objectives) > 0).any()):
            return
        self._plan.race.admit(trial.number, named, lambda: self._store.records(trial.origin))

    def _nothing_scored(self) -> Failure:
        reason, times = Counter(self._failures).most_common(1)[0]
        baselines = [trial.ok for trial in self._trials if trial.kind == "baseline"]
        beside = f"; of {len(baselines)} baselines, {sum(baselines)} were scored" if baselines else ""
        elsewhere = len(self._failures) == HOPELESS or self._strategy.info.needs_budget  # replaying it ends here again
        ways_on = "--resume with a larger --budget, or, where what is searched has changed by that, "
        return Failure(
            f"no candidate could be scored: all of the first {len(self._failures)} candidates failed, {times} of them with: {reason}"
            f"{beside}. Correct that, then {'' if elsewhere else ways_on}start in another folder"
        )

    def _checked(self, asked: Ask, n: int) -> tuple[Candidate, ...]:
        name = self._strategy.info.name
        if asked.candidates and asked.state is AskState.LEARNING:
            raise StrategyError(f"the strategy {name!r} says that it is learning and gave candidates; expected one or the other")
        if len(asked.candidates) > n:
            raise StrategyError(f"the strategy {name!r} was asked for at most {n} candidates and gave {len(asked.candidates)}")
        if not asked.candidates and asked.state in (AskState.READY, AskState.WAITING):
            raise StrategyError(
                f"the strategy {name!r} gave no candidate and says {asked.state.value!r}, though all results were told; "
                "expected DONE or EXHAUSTED"
            )
        return asked.candidates

    def _decoded(self, candidate: Candidate) -> _Item:
        if candidate.recipe is not None:
            return _item(Proposal("asked", recipe=candidate.recipe))
        try:
            genome = self._problem.info.space.check(candidate.genome)
        except ConfigError as error:
            raise StrategyError(f"the strategy {self._strategy.info.name!r} asked for what is no point of the space: {error}") from error
        genome = genome.copy()  # a strategy may go on using its own array
        return self._made(Proposal("asked", genome))

    def _made(self, proposal: Proposal) -> _Item:
        """Return a proposal with the recipe of its genome; without it, it could be neither exported nor told from its duplicates."""
        if proposal.recipe is not None or proposal.genome is None:
            return _item(proposal)
        try:
            return _item(replace(proposal, recipe=self._problem.decode(proposal.genome)))
        except CandidateError as error:
            return replace(_item(proposal), error=f"cannot be made: {error}")

    def _tell(self, pairs: Sequence[tuple[Candidate, Trial]]) -> None:
        results = [self._result(candidate, trial) for candidate, trial in pairs]
        if results:
            self._strategy.tell(results)

    def _result(self, candidate: Candidate, trial: Trial) -> Result:
        known = trial.censored.estimates if trial.censored else trial.values()
        if trial.status is Status.FAILED or known is None:
            return Result(candidate, Status.FAILED, None)
        values = [known[objective.name] for objective in self._objectives]
        broken = violations(values, self._objectives)
        return Result(candidate, trial.status, losses(values, self._objectives), broken if len(broken) else None)

    def _fix_reference(self, kind: Kind) -> None:
        """Fix the reference point once: from the baselines, or from the first trials told when there are none."""
        if self._reference is not None:
            return
        stored = self._store.header().get("reference")
        if stored is not None:
            self._reference = tuple(stored["values"])
            return
        known = [row.tolist() for row in (t.vector(self._objectives) for t in self._trials if t.kind == kind and t.ok) if row is not None]
        point = reference_point(self._objectives, known)
        if point is None:
            return
        source = {objective.name: "declared" if objective.worst is not None else kind for objective in self._objectives}
        self._store.set({"reference": {"values": list(point), "source": source}})
        self._reference = point

    def _publish(self) -> None:
        self._publisher.publish(self._trials, self._reference, self._phase, "running", gradient_steps=self._steps)


def _said(reduced: Mapping[str, Any]) -> str:
    parts = [f"{name} is scored {size} items at a time" for name, size in reduced.get("items", {}).items()]
    return ", ".join([*parts, *([f"{reduced['candidates']} candidates are made at a time"] if "candidates" in reduced else [])])


def _item(proposal: Proposal) -> _Item:
    return _Item(proposal, proposal_key(proposal))


def _light(trial: Trial) -> Trial:
    """Return the trial as it will be read back: without its records, and with zero of one sign, since SQLite keeps no other."""
    censored = None if trial.censored is None else replace(trial.censored, scores=_bare(trial.censored.scores))
    return replace(trial, scores={part: _bare(scores) for part, scores in trial.scores.items()}, censored=censored)


def _bare(scores: Mapping[str, Score]) -> dict[str, Score]:
    return {name: replace(score, value=score.value + 0.0, records={}) for name, score in scores.items()}


def _same_bits(trial: Trial, item: _Item) -> bool:
    mine, stored = item.proposal.genome, trial.genome
    if mine is None or stored is None:
        return mine is stored and item.key == trial.key
    return item.key == trial.key and mine.shape == stored.shape and mine.tobytes() == np.ascontiguousarray(stored).tobytes()
