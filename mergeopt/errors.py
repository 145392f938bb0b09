"""Every error mergeopt raises on purpose.

MergeoptError
├── UserError              something the caller can correct; the command line exits with status 2
│   ├── ConfigError        a run file, merge file or argument says something that cannot be done
│   ├── SourceError        a checkpoint or model folder cannot be read, or must not be
│   ├── MismatchError      models that were to be merged do not fit together
│   ├── DataError          a task's data cannot be read or does not fit the model
│   ├── RecipeError        a recipe is damaged, or its sources are not the ones it names
│   ├── PluginError        a strategy, problem, task or operator is unknown or cannot be loaded
│   └── StoreError         a run folder belongs to another run, or cannot be read or written
└── Failure                the work itself went wrong; the command line exits with status 1
    ├── CandidateError     one candidate could not be made or scored: a FAILED trial, never the end of a run
    │   └── MemoryShortage there was not enough memory for it, however small the pieces
    ├── StrategyError      a strategy broke the ask/tell contract
    └── ExportError        a written model does not score what the store says

A message says what was expected, what came, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CandidateError",
    "ConfigError",
    "DataError",
    "ExportError",
    "Failure",
    "MemoryShortage",
    "MergeoptError",
    "MismatchError",
    "PluginError",
    "RecipeError",
    "SourceError",
    "StoreError",
    "StrategyError",
    "UserError",
    "nearest",
]


class MergeoptError(Exception):
    """The root of all errors of this package."""


class UserError(MergeoptError, ValueError):
    """Something the caller can correct."""


class ConfigError(UserError):
    """A run file, merge file or argument says something that cannot be done."""


class SourceError(UserError):
    """A checkpoint or model folder cannot be read, or must not be."""


class MismatchError(UserError):
    """Models that were to be merged do not fit together."""


class DataError(UserError):
    """A task's data cannot be read or does not fit the model."""


class RecipeError(UserError):
    """A recipe is damaged, or its sources are not the ones it names."""


class PluginError(UserError):
    """A strategy, problem, task or operator is unknown or cannot be loaded."""


class StoreError(UserError):
    """A run folder belongs to another run, or cannot be read or written."""


class Failure(MergeoptError, RuntimeError):
    """The work itself went wrong."""


class CandidateError(Failure):
    """One candidate could not be made or scored."""


class MemoryShortage(CandidateError):
    """There was not enough memory to make or score a candidate."""


class StrategyError(Failure):
    """A strategy broke the ask/tell contract."""


class ExportError(Failure):
    """A written model does not score what the store says."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the nearest known one, and all of them.

    Args:
        word: what was given.
        known: what would have been accepted.
    """
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(options) if options else 'none'}"
