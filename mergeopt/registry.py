"""Finds strategies, problems, tasks, metrics and operators by name, and loads them when they are asked for.

Plug-ins register through entry points of the groups in `GROUPS`; ours use the same door as a stranger's. Nothing is imported
until `load` is called, so listing names never pulls in a search library.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mergeopt.errors import PluginError, nearest

__all__ = ["GROUPS", "load", "names"]

GROUPS = {
    "operators": "mergeopt.operators",
    "strategies": "mergeopt.strategies",
    "problems": "mergeopt.problems",
    "tasks": "mergeopt.tasks",
    "metrics": "mergeopt.metrics",
}
SINGULAR = {"operators": "operator", "strategies": "strategy", "problems": "problem", "tasks": "task", "metrics": "metric"}


def names(kind: str) -> tuple[str, ...]:
    """Return the sorted names registered for a kind.

    Args:
        kind: one of `GROUPS`.

    Raises:
        PluginError: the kind is unknown.
    """
    return tuple(sorted(_found(kind)))


def load(kind: str, name: str) -> Any:
    """Import and return what is registered under a name. A name `FAMILY:ALGORITHM` is answered by the entry point `FAMILY:`.

    Args:
        kind: one of `GROUPS`.
        name: the registered name, for instance `ties` or `pymoo:NSGA2`.

    Raises:
        PluginError: nothing is registered under that name, or importing it fails.
    """
    found = _found(kind)
    family = name.split(":", 1)[0]
    entry = found.get(name) or (found.get(f"{family}:") if ":" in name else None)
    if entry is None:
        raise PluginError(
            f"unknown {SINGULAR[kind]} {name!r}; {nearest(name, found)}. A plug-in is found once the package that declares it in "
            f"[project.entry-points.{GROUPS[kind]!r}] is installed (reinstall it after editing its pyproject.toml)"
        )
    try:
        return entry.load()
    except ImportError as error:
        raise PluginError(f"{SINGULAR[kind]} {name!r} ({entry.value}) cannot be imported: {error}") from error
    except AttributeError as error:
        raise PluginError(f"{SINGULAR[kind]} {name!r}: {entry.value} does not exist: {error}") from error


def _found(kind: str) -> dict[str, EntryPoint]:
    if kind not in GROUPS:
        raise PluginError(f"unknown kind of plug-in {kind!r}; {nearest(kind, GROUPS)}")
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUPS[kind]), key=lambda e: (e.name, e.value)):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(
                f"two installed packages claim the {SINGULAR[kind]} {entry.name!r}: {_owner(other)} ({other.value}) and "
                f"{_owner(entry)} ({entry.value}); uninstall one"
            )
        found[entry.name] = entry
    return found


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"
