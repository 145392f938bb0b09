"""Builds the problem of a stored run again, as frugal as it had to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeopt.config import RunFile, build_problem
from mergeopt.errors import ConfigError
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import FrugalProblem, Problem
from mergeopt.recipe import ordered_json

__all__ = ["as_reduced", "rebuild"]


def rebuild(header: Mapping[str, Any], fingerprint: str) -> Problem:
    """Return the problem a run searched, from the run file that its store keeps.

    Args:
        header: of the store.
        fingerprint: of the problem as it was searched.

    Raises:
        ConfigError: the run was not made from a run file, or models, data or code are not what they were.
        UserError: models or data are no longer there.
    """
    config = header.get("config", {})
    if "run_file" not in config:
        raise ConfigError(
            "this run was not made from a run file, so its problem cannot be built again; export from the script that made it"
        )
    problem = build_problem(RunFile.parse(config["run_file"], "the stored run file"), Path(config["root"]))
    if problem.info.fingerprint != fingerprint:
        raise ConfigError(
            f"{_changes(header.get('provenance', {}), problem)} behind this run changed since, so what it scored cannot be made again; "
            "put back what it was made with, or search again in another folder"
        )
    return problem


def _changes(stored: Mapping[str, Any], problem: Problem) -> str:
    """Say what of a problem is not what it was, by name where it is a model or an objective."""
    if not isinstance(problem, MergeProblem):
        return "data or code"
    now = json.loads(ordered_json(dict(problem.provenance())))
    then = {"base": stored["base"], **stored["experts"]}
    models = {"base": now["base"], **now["experts"]}
    changed = [f"the model {name!r} ({now['paths'].get(name)})" for name in then if then[name] != models.get(name)]
    objectives = {objective["name"]: objective for objective in now["objectives"]}
    changed += [f"the objective {o['name']!r} (its data or code)" for o in stored["objectives"] if objectives.get(o["name"]) != o]
    told = ("base", "experts", "objectives", "paths", "evaluator")
    changed += [f"the {key}" for key in stored if key not in told and stored[key] != now.get(key)]
    return ", ".join(changed) or "something"


def as_reduced(problem: Problem, stored: Mapping[str, Any]) -> Problem:
    """Return a problem that does with less, as that of a stored run had to."""
    if isinstance(problem, FrugalProblem) and stored.get("reduced"):
        problem.reduce(stored["reduced"][-1])
    return problem
