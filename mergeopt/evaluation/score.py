"""From a live model to scores: every objective once, with the one guard around code that users wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from mergeopt.errors import CandidateError, MemoryShortage
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.out_of_memory import halve_batch
from mergeopt.evaluation.shortage import Shortage, attempt
from mergeopt.evaluation.user_functions import raised_at
from mergeopt.task import Objective, Part, Records, Score

__all__ = ["guarded", "record_items", "score_model"]

T = TypeVar("T")


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
        MemoryShortage: there was not enough memory even for one item at a time.
    """
    memo: dict[Any, Records] = {}
    scores: dict[str, Score] = {}
    for objective in objectives:
        name, model = objective.info.name, model_of(objective)
        model.eval()  # a user's function may have left it in training mode
        score = _measured(objective, partial(objective.score, model, part, device, memo))
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
        MemoryShortage: there was not enough memory even for one item at a time.
    """
    found: list[Records] = []
    for objective, wanted in zip(passes, items, strict=True):
        records = partial(objective.task.records, model_of(objective).eval(), "search", device, wanted)
        found.append(_measured(objective, records) if wanted else {})
    return found


def _measured(objective: Objective, work: Callable[[], T]) -> T:
    """Return what measuring an objective gives; where memory is short, fewer items are scored at a time, down to one."""
    while True:
        with guarded(objective.info.name):
            found = attempt(work)
        if not isinstance(found, Shortage):
            return found
        if not halve_batch(objective, found):
            raise MemoryShortage(f"objective {objective.info.name!r}: there is not enough memory to score it: {found.said}")


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Turn whatever an objective raises into a `CandidateError` that names it, and the line of the user's file."""
    try:
        yield
    except CandidateError:
        raise
    except Exception as error:
        raise CandidateError(f"objective {name!r} raised {type(error).__name__}: {error}{raised_at(error)}") from error
