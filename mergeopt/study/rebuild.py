"""Builds the problem of a stored run again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeopt.config import RunFile, build_problem
from mergeopt.errors import ConfigError
from mergeopt.problem import Problem

__all__ = ["rebuild"]


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
        raise ConfigError("models, data or code behind this run have changed since; what it scored cannot be made again")
    return problem
