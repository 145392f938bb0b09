"""Checks of the options that several tasks share."""

from __future__ import annotations

from typing import Any

from mergeopt.errors import ConfigError

__all__ = ["check_whole"]


def check_whole(name: str, value: Any, low: int, high: int | None = None, bound: str = "") -> None:
    """Raise `ConfigError` when an option is no whole number in [low, high].

    Args:
        name: of the option.
        value: what was given.
        low: lowest value.
        high: highest value, None where there is none.
        bound: the option that `high` comes from.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"from {low} to {high} (`{bound}`)"
        raise ConfigError(f"{name}: expected a whole number {wanted}, got {value!r}")
