"""Checks that the options of learning strategies are what they must be, with messages that name the strategy and the option."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mergeopt.differentiable import LOSSES, DifferentiableProblem
from mergeopt.errors import ConfigError, nearest
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Budget

__all__ = ["choice", "chosen_losses", "gradient_steps", "gradients", "number", "whole"]


def choice(who: str, option: str, value: Any, known: Iterable[str]) -> str:
    """Return a word that must be one of some.

    Raises:
        ConfigError: it is not.
    """
    options = tuple(known)
    if not isinstance(value, str) or value not in options:
        raise ConfigError(f"{who}: unknown {option} {value!r}; {nearest(str(value), options)}")
    return value


def whole(who: str, option: str, value: Any, least: int) -> int:
    """Return a whole number that must be at least some.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{who}: expected option {option!r} to be a whole number >= {least}, got {value!r}")
    return value


def number(who: str, option: str, value: Any, *, above: float | None = None, least: float | None = None) -> float:
    """Return a finite number that must be above some, or at least some.

    Raises:
        ConfigError: it is not.
    """
    fine = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not fine or (above is not None and value <= above) or (least is not None and value < least):
        bound = f" > {above:g}" if above is not None else "" if least is None else f" >= {least:g}"
        raise ConfigError(f"{who}: expected option {option!r} to be a finite number{bound}, got {value!r}")
    return float(value)


def gradients(who: str, problem: ProblemInfo, min_objectives: int) -> DifferentiableProblem:
    """Return the door to the gradients of a problem.

    Raises:
        ConfigError: there are too few objectives, or no gradients.
    """
    count = len(problem.objectives)
    if count < min_objectives:
        raise ConfigError(f"{who}: expected {min_objectives} or more objectives, got {count} in problem {problem.name!r}; use 'adamerging'")
    if problem.gradients is None:
        raise ConfigError(f"{who}: problem {problem.name!r} has no gradients: it must merge models; use another strategy")
    return problem.gradients


def gradient_steps(who: str, budget: Budget) -> int:
    """Return the budget's gradient steps.

    Raises:
        ConfigError: the budget says nothing of them.
    """
    if budget.gradient_steps is None:
        raise ConfigError(
            f"{who}: it learns by gradient, so the budget must say for how long: budget: {{evaluations: {budget.evaluations}, "
            "gradient_steps: 300}"
        )
    return budget.gradient_steps


def chosen_losses(who: str, problem: DifferentiableProblem, loss: Any, preferred: str | None = None) -> dict[str, str]:
    """Return the loss to learn by, for each objective.

    Args:
        who: the strategy.
        problem: what losses there are.
        loss: None for each objective's default, a name for all, or a mapping of objectives to names (those left out take their default).
        preferred: comes before an objective's own default, where it can give it.

    Raises:
        ConfigError: an objective is unknown, or cannot give the loss.
    """
    for name in loss if isinstance(loss, Mapping) else ():
        if name not in problem.objectives:
            raise ConfigError(f"{who}: loss: unknown objective {name!r}; {nearest(str(name), problem.objectives)}")
    found = {}
    for name in problem.objectives:
        given = problem.losses(name)
        wanted = loss.get(name) if isinstance(loss, Mapping) else loss
        if not given:
            raise ConfigError(
                f"{who}: objective {name!r} has no differentiable loss; give a function's objective one (differentiable:), or name the "
                "expert it refers to (expert:), or leave it out"
            )
        if wanted is None:
            wanted = preferred if preferred in given else given[0]
        if wanted not in given:
            known = f"it can give {', '.join(given)}" if wanted in LOSSES else nearest(str(wanted), given)
            raise ConfigError(f"{who}: objective {name!r} cannot give the loss {wanted!r}; {known}")
        found[name] = str(wanted)
    return found
