"""What is stored at the head of a run: what it was begun with, in which conditions, and whether a resumed run is the same."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mergeopt.errors import ConfigError, StoreError
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import Problem
from mergeopt.recipe import ordered_json
from mergeopt.strategy import Budget, Strategy
from mergeopt.study.database import DATABASE
from mergeopt.study.store import Header, Store, read_header
from mergeopt.task import ObjectiveInfo

__all__ = ["begin", "check_budget", "describe", "stored_header"]

log = logging.getLogger(__name__)

PACKAGES = ("mergeopt", "numpy", "torch", "transformers", "moocore", "pymoo")


def describe(problem: Problem, strategy: Strategy, *, seed: int, batch: int, header: Mapping[str, Any] | None) -> Header:
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


def stored_header(folder: Path, described: Header, *, resume: bool) -> Header:
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


def check_budget(folder: Path, strategy: Strategy, budget: Budget, stored: Header) -> None:
    """Raise `StoreError` when a strategy that searches differently for another budget is resumed with one."""
    known = Budget(stored["budget"], stored.get("gradient_budget"))
    if strategy.info.needs_budget and _spending(budget) != _spending(known):
        raise StoreError(
            f"cannot resume {folder} with {_spending(budget)}: {strategy.info.name!r} searches differently for another budget than the "
            f"stored {_spending(known)}; keep that, or start a run in another folder with this run's front as starting points"
        )


def begin(store: Store, described: Header, budget: Budget, *, resume: bool) -> Budget:
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


def _spending(budget: Budget) -> str:
    steps = "" if budget.gradient_steps is None else f" and {budget.gradient_steps} gradient steps"
    return f"{budget.evaluations} evaluations{steps}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
