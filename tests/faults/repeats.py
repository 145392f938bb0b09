"""What two runs must share to be the same search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeopt.study.run import Run

__all__ = ["everything"]


def everything(folder: Path) -> list[tuple[Any, ...]]:
    """Return all that a search determined of a run's trials, bit for bit, per-item records of both parts included."""
    run = Run.open(folder)
    return [
        (
            trial.number,
            trial.kind,
            trial.name,
            None if trial.genome is None else trial.genome.tobytes(),
            trial.recipe_json,
            trial.key,
            trial.status,
            trial.error,
            trial.duplicate_of,
            trial.charged,
            {part: {name: (s.value, s.standard_error, s.items) for name, s in scores.items()} for part, scores in trial.scores.items()},
            {
                (part, name): {column: (str(v.dtype), v.tobytes()) for column, v in run.records(trial.number, part, name).items()}
                for part, scores in trial.scores.items()
                for name in scores
            },
        )
        for trial in run.trials
    ]
