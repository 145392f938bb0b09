"""Checks of the options that several tasks share."""

from __future__ import annotations

from typing import Any

from mergeopt.errors import ConfigError

__all__ = ["check_draw", "check_whole"]


def check_draw(*, limit: Any, seed: Any, batch: Any) -> None:
    """Raise `ConfigError` when the options are out of range that say which items are drawn, and how many are scored at a time."""
    check_whole("limit", 1 if limit is None else limit, 1)
    check_whole("seed", seed, 0)
    check_whole("batch", batch, 1)


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
