"""From a live model to scores: every objective once, with the one guard around code that users wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mergeopt.errors import CandidateError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.task import Objective, Part, Records, Score

__all__ = ["guarded", "record_items", "score_model"]


def score_model(
    model_of: Callable[[Objective], torch.nn.Module], objectives: Sequence[Objective], part: Part, device: torch.device
) -> dict[str, Score]:
    """Measure every objective on a live model.

    Args:
        model_of: returns the model that an objective is measured on, in evaluation mode, on the device; where heads are shared it is the
            same for all.
        objectives: what to measure; those that share a task share one pass over its data.
        part: which data.
        device: where the model is.

    Raises:
        CandidateError: an objective raised, or gave a value that is not finite; the message names it.
    """
    memo: dict[Any, Records] = {}
    scores: dict[str, Score] = {}
    for objective in objectives:
        name, model = objective.info.name, model_of(objective)
        model.eval()  # a user's function may have left it in training mode
        with guarded(name):
            score = objective.score(model, part, device, memo)
        if not math.isfinite(score.value):
            raise CandidateError(f"objective {name!r} gave {score.value}, expected a finite number")
        scores[name] = score
    return scores


def record_items(
    model_of: Callable[[Objective], torch.nn.Module], passes: Sequence[TaskObjective], items: Sequence[Sequence[int]], device: torch.device
) -> list[Records]:
    """Return the records of some items of the search part, per pass over data, in the order given; no columns where no item is asked for.

    Args:
        model_of: as above.
        passes: one objective each; its task is run.
        items: per pass, indices.
        device: where the model is.

    Raises:
        CandidateError: a task raised; the message names an objective on it.
    """
    found: list[Records] = []
    for objective, wanted in zip(passes, items, strict=True):
        with guarded(objective.info.name):
            found.append(objective.task.records(model_of(objective).eval(), "search", device, wanted) if wanted else {})
    return found


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Turn whatever an objective raises into a `CandidateError` that names it."""
    try:
        yield
    except CandidateError:
        raise
    except Exception as error:
        raise CandidateError(f"objective {name!r} raised {type(error).__name__}: {error}") from error
