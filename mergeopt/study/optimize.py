"""`optimize` makes a run or goes on with one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeopt.config import strategy_from
from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.race import Race
from mergeopt.evaluation.racing import Racing
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import FrugalProblem, ModelProblem, Problem, ProblemInfo, Proposal, RacedProblem
from mergeopt.recipe import STATISTICS
from mergeopt.strategy import Budget, Strategy
from mergeopt.study.header import begin, check_budget, describe, stored_header
from mergeopt.study.interrupt import Interrupted
from mergeopt.study.loop import Plan, Search
from mergeopt.study.rebuild import as_reduced
from mergeopt.study.run import LEARNED_SETS, Run
from mergeopt.study.snapshot import Progress, Publisher
from mergeopt.study.store import Store

__all__ = ["opened", "optimize", "race_of"]


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
            larger budget extends it; a finished run with the same budget is returned as it is, after
            another try at what could not be scored on the report part.
        racing: how to drop candidates before they are scored in full: a rule's name, a mapping with `rule` and options, or a `Racing`; None
            scores all in full. Baselines and starting points always are.
        header: more to store with the run, JSON-able (the run file, say); its key `strategy` describes the strategy's options, which a
            resumed run must share.
        progress: called with every new trial.

    Raises:
        ConfigError: an argument cannot be; nothing was written.
        StoreError: `out` holds another run, or none to resume, is being written, or cannot be written.
        StrategyError: the strategy broke its contract, or cannot be replayed.
        Failure: no candidate could be scored.
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
    described = describe(problem, strategy, seed=seed, batch=batch, header=header)
    described["racing"] = None if race is None else race.racing.describe()
    stored = stored_header(folder, described, resume=resume)
    if stored:
        check_budget(folder, strategy, spend, stored)
    if stored.get("state") == "finished" and spend.evaluations <= stored["budget"]:
        finished = Run.open(folder, problem)
        if not finished.report_failures:
            return finished
        spend = Budget(stored["budget"], stored.get("gradient_budget"))
    strategy.setup(opened(problem, strategy, folder), seed=seed, budget=spend, batch=batch)
    as_reduced(problem, stored)
    if isinstance(problem, MergeProblem):
        problem.load()  # what is wrong with the models is found before anything is written
    store = Store(folder)
    try:
        plan = Plan(begin(store, described, spend, resume=resume), batch, tuple(init), race)
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


def _peak_memory() -> int | None:
    """Return the largest resident memory of this process so far, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
