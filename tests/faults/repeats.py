"""What two runs must share to be the same search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergeopt.recipe import ordered_json
from mergeopt.study.run import Run

__all__ = ["everything", "front"]


def everything(folder: Path) -> list[tuple[Any, ...]]:
    """Return all that a search determined of a run's trials, bit for bit, per-item records of both parts included."""
    run = Run.open(folder)
    return [
        (
            trial.number,
            trial.kind,
            trial.name,
            None if trial.genome is None else trial.genome.tobytes(),
            None if trial.recipe_json is None else ordered_json(_anywhere(json.loads(trial.recipe_json))),
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


def front(folder: Path) -> dict[str, Any]:
    """Return a run's front as JSON-able data, bit for bit."""
    data = Run.open(folder).front_json()
    for point in data["points"]:
        _anywhere(point["recipe"])
    return data


def _anywhere(recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a recipe whose learned set and statistics are named by their folders alone: the place before that is the run's own folder."""
    for key in ("learned", "statistics"):
        if recipe is not None and key in recipe:
            recipe[key]["path"] = Path(recipe[key]["path"]).name
    return recipe
