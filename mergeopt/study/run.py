"""Runs: `optimize` makes or resumes one, `Run` reads what it stored."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergeopt.config import strategy_from
from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.race import Race
from mergeopt.evaluation.racing import Racing
from mergeopt.genomes.space import Choice, Dimension, Float, Int, Simplex, Space
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import FrugalProblem, ModelProblem, Problem, ProblemInfo, Proposal, RacedProblem
from mergeopt.recipe import LEARNED, STATISTICS, ordered_json
from mergeopt.strategy import Budget, Strategy
from mergeopt.study.database import DATABASE
from mergeopt.study.export import ExportReport, export_model
from mergeopt.study.front import Front, FrontPoint
from mergeopt.study.interrupt import Interrupted
from mergeopt.study.lock import is_locked
from mergeopt.study.loop import Plan, Search
from mergeopt.study.rebuild import rebuild
from mergeopt.study.snapshot import Progress, Publisher, front_json, search_front
from mergeopt.study.store import Header, Store, read_header, read_records, read_run
from mergeopt.study.trial import Trial, items_scored
from mergeopt.task import ObjectiveInfo, Part

__all__ = ["LEARNED_SETS", "Progress", "Run", "opened", "optimize", "race_of"]

log = logging.getLogger(__name__)

LEARNED_SETS = "learned"  # folder of a run that holds learned sets by content hash
PACKAGES = ("mergeopt", "numpy", "torch", "transformers", "moocore", "pymoo")
DIMENSIONS: dict[str, Callable[..., Dimension]] = {"float": Float, "int": Int, "choice": Choice, "simplex": Simplex}


class Run:
    """A stored run, as of the moment it was read; nothing of it is ever written through this class.

    Args:
        folder: where it is.
        header: of the store.
        trials: of the store, by number.
        problem: what was searched, where it is at hand.
    """

    def __init__(self, folder: Path, header: Header, trials: Sequence[Trial], problem: Problem | None = None) -> None:
        self.folder = folder
        self._problem = problem
        self.header = header
        self.trials: tuple[Trial, ...] = tuple(trials)
        self._alive = is_locked(folder)

    @classmethod
    def open(cls, folder: Path | str, problem: Problem | None = None) -> Run:
        """Read a run, also while another process writes it and where nothing can be written.

        Args:
            folder: of the run.
            problem: what was searched, for those who have it at hand; else it is built again from the run file when it is needed.

        Raises:
            StoreError: there is no run, or its file is damaged or foreign.
        """
        place = Path(folder)
        header, trials = read_run(place)
        return cls(place, header, trials, problem)

    @functools.cached_property
    def problem(self) -> Problem:
        """The problem itself, able to make and score models.

        Raises:
            UserError: it cannot be built again: the run was not made from a run file, or its models, data or code are not what they were.
        """
        if self._problem is not None:
            return self._problem
        problem = rebuild(self.header, self.info.fingerprint)
        if isinstance(problem, MergeProblem):
            problem.statistics.keep(self.folder / STATISTICS)
        return _as_reduced(problem, self.header)

    @functools.cached_property
    def info(self) -> ProblemInfo:
        """The problem as data: name, space, objectives, fingerprint."""
        data = self.header["problem"]
        try:
            space = Space([_dimension(dimension) for dimension in data["space"]])
            objectives = tuple(_objective(objective) for objective in data["objectives"])
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{self.folder / DATABASE}: its problem cannot be read ({error}); use the mergeopt version that wrote it"
            ) from error
        return ProblemInfo(data["name"], space, objectives, data["fingerprint"])

    @property
    def objectives(self) -> tuple[ObjectiveInfo, ...]:
        """The objectives, in order."""
        return self.info.objectives

    @property
    def status(self) -> Literal["finished", "interrupted", "running"]:
        """`running` while a process writes it; a run whose process was killed is `interrupted`."""
        if self.header.get("state") == "finished":
            return "finished"
        return "running" if self._alive else "interrupted"

    @property
    def reference(self) -> tuple[float, ...] | None:
        """The hypervolume's reference point in natural directions, fixed before the search began; None while unknown."""
        stored = self.header.get("reference")
        return None if stored is None else tuple(stored["values"])

    @property
    def evaluations(self) -> int:
        """Units of the budget spent."""
        return sum(trial.charged for trial in self.trials)

    @property
    def gradient_steps(self) -> int:
        """Gradient steps taken, 0 for a strategy that does not learn."""
        return int(self.header.get("gradient_steps", 0))

    @property
    def racing(self) -> Racing | None:
        """How candidates were raced, None where all were scored in full."""
        return Racing.of(self.header.get("racing"))

    @property
    def items_scored(self) -> tuple[int, int]:
        """On how many items candidates were scored, over all objectives, and how many full scorings would have taken."""
        return items_scored(self.trials, self.objectives)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the data and the strategy had to say about the search, a sentence each."""
        return tuple(self.header.get("warnings", ()))

    @property
    def baselines(self) -> tuple[Trial, ...]:
        """The points every result is held against, failed ones included."""
        return tuple(trial for trial in self.trials if trial.kind == "baseline")

    @functools.cached_property
    def front(self) -> Front:
        """The non-dominated among the candidates that the budget paid for."""
        front = search_front(self.trials, self.objectives, self.reference)
        return front.exportable(self._export)

    def point(self, trial: int) -> FrontPoint:
        """Return any trial that was scored, to look at or to export.

        Raises:
            ConfigError: there is no such trial, or it failed.
        """
        if not 0 <= trial < len(self.trials):
            raise ConfigError(f"{self.folder} has no trial {trial}; it has 0 to {len(self.trials) - 1}")
        if self.trials[trial].censored is not None:
            raise ConfigError(
                f"trial {trial} of {self.folder} was dropped by the race before it was scored in full: there is nothing to hold an export "
                "against; take a point of the front, or a trial that was scored"
            )
        if not self.trials[trial].ok:
            raise ConfigError(f"trial {trial} of {self.folder} failed ({self.trials[trial].error}), so there is nothing to export")
        alone = Front.of_trials([self.trials[trial]], self.objectives, self.reference)
        return alone.exportable(self._export).points[0]

    def _export(self, point: FrontPoint, to: str | Path, head: str | None) -> ExportReport:
        problem = self.problem
        if point.recipe is None or not isinstance(problem, MergeProblem):
            raise ConfigError(f"{self.folder} searched the problem {self.info.name!r}, which makes no models; there is nothing to export")
        recipe = point.recipe
        operator = problem.operator if problem.operator.name == recipe.operator else None
        if recipe.learned is not None and (moved := self.folder / LEARNED_SETS / Path(recipe.learned.path).name).is_dir():
            recipe = recipe.relocated({LEARNED: str(moved.absolute())})  # the run's folder may have moved since
        if recipe.statistics is not None and (moved := self.folder / STATISTICS / Path(recipe.statistics.path).name).is_dir():
            recipe = recipe.relocated({STATISTICS: str(moved.absolute())})
        return export_model(
            problem.pool,
            recipe,
            to,
            operator=operator,
            objectives=problem.objectives,
            promised=point.values,
            reported=point.report,
            device=str(problem.device),
            threads=problem.threads,
            head=head,
        )

    def records(self, trial: int, part: Part, objective: str) -> dict[str, npt.NDArray[np.generic]]:
        """Return the per-item columns behind a score, empty where there are none; a duplicate has those of its original.

        Raises:
            StoreError: there is no such trial, or the file is damaged.
        """
        if not 0 <= trial < len(self.trials):
            raise StoreError(f"{self.folder} has no trial {trial}; it has 0 to {len(self.trials) - 1}")
        return read_records(self.folder, self.trials[trial].origin, part, objective)

    def front_json(self) -> dict[str, Any]:
        """Return the front as JSON-able data, the shape that `front.json` and `mergeopt front --json` share."""
        data = front_json(self.trials, self.objectives, self.reference)
        if self.racing is not None:
            scored, full = self.items_scored
            data["racing"] = {**self.racing.describe(), "items_scored": scored, "items_in_full": full}
        return data


def optimize(
    problem: Problem,
    strategy: Strategy | str | Mapping[str, Any] = "nsga2",
    *,
    budget: int | Budget,
    seed: int = 0,
    out: Path | str,
    init: Sequence[Proposal] = (),
    batch: int = 8,
    resume: bool = False,
    racing: Racing | str | Mapping[str, Any] | None = None,
    header: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Search a problem with a strategy, storing every trial; return the run when it is finished.

    Baselines are scored first and cost nothing. Starting points come next and are charged; those with a genome are told to the
    strategy before its first ask. An exact duplicate of a charged candidate is answered from the store and not charged; the first
    repetition of a baseline is answered from the store too, but charged, so that baselines never change what a search finds.
    SIGINT and SIGTERM let the candidate at hand finish and be stored; a second one stops at once.

    Args:
        problem: what is searched.
        strategy: a registered name, a mapping with `name` and options, or a strategy, which must be fresh: it is set up here.
        budget: candidates to evaluate, >= 1; or a `Budget`, which has gradient steps too.
        seed: of the strategy, >= 0.
        out: folder of the run; it must not hold another run.
        init: starting points.
        batch: candidates per ask, >= 1.
        resume: go on with the run in `out`, by replaying it: what is stored is compared bit for bit and used, the rest is evaluated. A
            larger budget extends it; a finished run with the same budget is returned as it is.
        racing: how to drop candidates before they are scored in full: a rule's name, a mapping with `rule` and options, or a `Racing`; None
            scores all in full. Baselines and starting points always are.
        header: more to store with the run, JSON-able (the run file, say); its key `strategy` describes the strategy's options, which a
            resumed run must share.
        progress: called with every new trial.

    Raises:
        ConfigError: an argument cannot be; nothing was written.
        StoreError: `out` holds another run, or none to resume, is being written, or cannot be written.
        StrategyError: the strategy broke its contract, or cannot be replayed.
        Failure: nothing could be scored.
        Interrupted: a signal stopped it, cleanly.
    """
    folder = Path(out)
    spend = budget if isinstance(budget, Budget) else Budget(budget)
    if not isinstance(strategy, Strategy):
        header = {"strategy": strategy, **(header or {})}
        strategy = strategy_from(strategy)
    _check(problem, strategy, budget=spend, seed=seed, batch=batch, init=init)
    if isinstance(problem, MergeProblem):
        problem.statistics.keep(folder / STATISTICS)
    race = race_of(problem, Racing.of(racing), seed)
    if isinstance(problem, FrugalProblem):
        problem.expect(strategy.info.needs, strategy.info.together)
    described = _describe(problem, strategy, seed=seed, batch=batch, header=header)
    described["racing"] = None if race is None else race.racing.describe()
    stored = _stored_header(folder, described, resume=resume)
    if stored and strategy.info.needs_budget and _spending(spend) != _spending(_stored_budget(stored)):
        raise StoreError(
            f"cannot resume {folder} with {_spending(spend)}: {strategy.info.name!r} searches differently for another budget than the "
            f"stored {_spending(_stored_budget(stored))}; keep that, or start a run in another folder with this run's front as starting "
            "points"
        )
    if stored.get("state") == "finished" and spend.evaluations <= stored["budget"]:
        return Run.open(folder, problem)
    strategy.setup(opened(problem, strategy, folder), seed=seed, budget=spend, batch=batch)
    _as_reduced(problem, stored)
    store = Store(folder)
    try:
        plan = Plan(_begin(store, described, spend, resume=resume), batch, tuple(init), race)
        _search(problem, strategy, store, plan, Publisher(folder, problem.info.objectives, plan.budget, progress))
    finally:
        store.close()
    run = Run.open(folder, problem)
    if run.status == "interrupted":
        raise Interrupted(folder, run.header["reason"])
    return run


def race_of(problem: Problem, racing: Racing | None, seed: int) -> Race | None:
    """Return the race that a run of a problem would be, None without racing.

    Raises:
        ConfigError: the problem, or one of its objectives, cannot be raced.
    """
    if racing is None:
        return None
    if not isinstance(problem, RacedProblem):
        raise ConfigError(f"racing: the problem {problem.info.name!r} scores whole candidates only; leave it out")
    return problem.race(racing, seed=seed)


def _as_reduced(problem: Problem, stored: Header) -> Problem:
    """Return a problem that does with less, as that of a stored run had to."""
    if isinstance(problem, FrugalProblem) and stored.get("reduced"):
        problem.reduce(stored["reduced"][-1])
    return problem


def _search(problem: Problem, strategy: Strategy, store: Store, plan: Plan, publisher: Publisher) -> None:
    search = Search(problem, strategy, store, plan, publisher)
    state, reason = "interrupted", "an error"
    try:
        state, reason = search.run()
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        with contextlib.suppress(StoreError):  # the first error is the one to be seen; a state left at `running` reads as interrupted
            _end(store, search, publisher, state, reason)
        raise
    _end(store, search, publisher, state, reason)


def _end(store: Store, search: Search, publisher: Publisher, state: str, reason: str) -> None:
    segments = store.header()["segments"]
    segments[-1] |= {"ended": time.time(), "peak_memory": _peak_memory()}
    store.set({"state": state, "reason": reason, "segments": segments, "gradient_steps": search.gradient_steps})
    phase = "done" if state == "finished" else "stopped"
    publisher.publish(search.trials, search.reference, phase, state, gradient_steps=search.gradient_steps, force=True)


def opened(problem: Problem, strategy: Strategy, folder: Path | None) -> ProblemInfo:
    """Return what a strategy may see of a problem: data, and the doors to the models that it declared to need.

    Args:
        problem: what is searched.
        strategy: that is to search it.
        folder: of the run; None where nothing is to be written.

    Raises:
        ConfigError: it needs what the problem has not.
    """
    needs = strategy.info.needs
    if not needs:
        return problem.info
    if not isinstance(problem, ModelProblem):
        raise ConfigError(
            f"the strategy {strategy.info.name!r} works on the models themselves ({', '.join(needs)}), and the problem "
            f"{problem.info.name!r} makes none; choose a strategy that searches points of the space"
        )
    return replace(
        problem.info,
        members=problem.members() if "members" in needs else None,
        gradients=problem.gradients(folder and folder / LEARNED_SETS) if "gradients" in needs else None,
    )


def _stored_budget(stored: Header) -> Budget:
    return Budget(stored["budget"], stored.get("gradient_budget"))


def _spending(budget: Budget) -> str:
    steps = "" if budget.gradient_steps is None else f" and {budget.gradient_steps} gradient steps"
    return f"{budget.evaluations} evaluations{steps}"


def _begin(store: Store, described: Header, budget: Budget, *, resume: bool) -> Budget:
    """Store the header, or compare it with the stored one; return the budget that counts: never less than what is spent."""
    stored = store.header()
    spend = {"budget": budget.evaluations, "gradient_budget": budget.gradient_steps}
    segment = {"began": time.time(), **spend, "pid": os.getpid(), "host": socket.gethostname(), "versions": _versions()}
    if not stored:
        for warning in described["warnings"]:
            log.warning("%s", warning)
        store.set({**described, "created": time.time(), **spend, "state": "running", "reason": "", "segments": [segment]})
        return budget
    _compare(store.folder, described, stored, resume=resume)
    trials = store.trials()
    budget = replace(budget, evaluations=max(budget.evaluations, sum(trial.charged for trial in trials)))
    segments = [*stored["segments"], {**segment, "from_trial": len(trials)}]
    store.set({**spend, "budget": budget.evaluations, "state": "running", "reason": "", "segments": segments})
    return budget


def _stored_header(folder: Path, described: Header, *, resume: bool) -> Header:
    """Return the header of the run to resume, empty for a new run, before anything is written."""
    if resume and not (folder / DATABASE).is_file():
        raise StoreError(f"there is no run to resume in {folder}; check the folder, or start without --resume")
    stored = read_header(folder) or {}
    if stored:
        _compare(folder, described, stored, resume=resume)
    return stored


def _compare(folder: Path, described: Header, stored: Header, *, resume: bool) -> None:
    if not resume:
        raise StoreError(f"{folder} already holds a run; give --resume to go on with it, or another folder")
    pairs = {
        "seed": (described["seed"], stored.get("seed")),
        "batch": (described["batch"], stored.get("batch")),
        "strategy": (described["strategy"]["name"], stored.get("strategy", {}).get("name")),
        "strategy options": (described["strategy"]["options"], stored.get("strategy", {}).get("options")),
        "racing": (described["racing"], stored.get("racing")),
        "problem": (described["problem"]["fingerprint"], stored.get("problem", {}).get("fingerprint")),
    }
    different = [f"{what} (stored {was!r}, now {now!r})" for what, (now, was) in pairs.items() if now != was]
    if different:
        raise StoreError(
            f"cannot resume {folder}: it was begun with another {'; '.join(different)}; give what it was begun with, or another folder"
        )


def _describe(problem: Problem, strategy: Strategy, *, seed: int, batch: int, header: Mapping[str, Any] | None) -> Header:
    info, given = problem.info, dict(header or {})
    data = {
        "versions": _versions(),
        "seed": seed,
        "batch": batch,
        "strategy": {
            "name": strategy.info.name,
            "version": strategy.info.version,
            "options": given.get("strategy"),
            "needs_budget": strategy.info.needs_budget,
        },
        "problem": {
            "name": info.name,
            "fingerprint": info.fingerprint,
            "space": info.space.describe(),
            "objectives": [{name: getattr(o, name) for name in ObjectiveInfo.__slots__} for o in info.objectives],
            "parts": list(problem.parts),
        },
        "provenance": dict(problem.provenance()),
        "config": given,
        "warnings": [*getattr(problem, "warnings", ()), *_stale(problem, strategy)],
    }
    try:
        described: Header = json.loads(ordered_json(data))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the header and the problem's provenance must be JSON-able: {error}") from error
    return described


def _stale(problem: Problem, strategy: Strategy) -> list[str]:
    """Say so where members that evolve are merged with what was measured of the experts they began as."""
    if not isinstance(problem, MergeProblem) or "members" not in strategy.info.needs or not problem.operator.requires.statistics:
        return []
    rule = problem.operator.name
    return [
        f"members that evolve are merged by {rule!r} with what was measured of the experts they began as; it grows stale as they change"
    ]


def _check(problem: Problem, strategy: Strategy, *, budget: Budget, seed: int, batch: int, init: Sequence[Proposal]) -> None:
    numbers = [("budget", budget.evaluations, 1), ("batch", batch, 1), ("seed", seed, 0)]
    numbers += [] if budget.gradient_steps is None else [("gradient_steps", budget.gradient_steps, 0)]
    for name, value, least in numbers:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: expected a whole number >= {least}, got {value!r}")
    if len(init) > budget.evaluations:
        raise ConfigError(
            f"a budget of {budget.evaluations} evaluations cannot pay for {len(init)} starting points; raise it, or give fewer"
        )
    for proposal in init:
        if proposal.genome is not None:
            problem.info.space.check(proposal.genome)
        elif proposal.recipe is None:
            raise ConfigError(f"the starting point {proposal.name!r} has neither a genome nor a recipe; give it one")
    info, m = strategy.info, len(problem.info.objectives)
    if m < info.min_objectives or (info.max_objectives is not None and m > info.max_objectives):
        most = "any number" if info.max_objectives is None else info.max_objectives
        raise ConfigError(
            f"the strategy {info.name!r} takes {info.min_objectives} to {most} objectives, the problem has {m}; choose another strategy"
        )
    if m == 0 or len({objective.name for objective in problem.info.objectives}) < m:
        raise ConfigError(
            f"expected one or more objectives with unique names, got {[objective.name for objective in problem.info.objectives]}"
        )


def _peak_memory() -> int | None:
    """Return the largest resident memory of this process so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _dimension(data: Mapping[str, Any]) -> Dimension:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name != "kind"}
    return DIMENSIONS[data["kind"]](**fields)


def _objective(data: Mapping[str, Any]) -> ObjectiveInfo:
    bounds = data["constraint"]
    return ObjectiveInfo(**{**data, "constraint": None if bounds is None else (bounds[0], bounds[1])})
