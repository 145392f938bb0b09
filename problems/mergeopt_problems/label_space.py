"""Which of a model's logits a task is judged on, and what the model calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.errors import ConfigError, DataError, nearest

__all__ = ["Classes", "check_classes", "class_indices", "class_names", "classes_by_name", "own_logits"]

Classes = str | Sequence[int] | None
"""Indices of logits, a regex that their names in the model's `id2label` must match in full (`mnist:.*`), or None for all logits."""


def check_classes(classes: Classes) -> None:
    """Raise `ConfigError` when `classes` is neither distinct indices, nor a regex, nor None."""
    if classes is None:
        return
    if isinstance(classes, str):
        try:
            re.compile(classes)
        except re.error as error:
            raise ConfigError(f"classes: {classes!r} is no regular expression: {error}") from error
        return
    whole = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in classes)
    if not classes or not whole or len(set(classes)) != len(classes):
        raise ConfigError(f"classes: expected distinct indices of logits from 0, or a regex over label names, got {classes!r}")


def class_indices(task: str, classes: Classes, model: torch.nn.Module) -> list[int] | None:
    """Return the indices of a task's own logits, None for all.

    Args:
        task: its name, for messages.
        classes: as the task was told.
        model: whose logits.

    Raises:
        DataError: an index is past the logits, or the regex matches no name.
    """
    names = _names(model)
    if not isinstance(classes, str):
        count = getattr(getattr(model, "config", None), "num_labels", None)
        if classes is not None and count is not None and max(classes) >= count:
            raise DataError(f"task {task!r}: classes names the logit {max(classes)}, but the model has {count}")
        return None if classes is None else list(classes)
    found = [index for index, name in sorted(names.items()) if re.fullmatch(classes, name)]
    if not found:
        some = ", ".join(name for _, name in sorted(names.items())[:5])
        raise DataError(f"task {task!r}: classes {classes!r} matches none of the model's {len(names)} label names ({some}, ...)")
    return found


def class_names(task: str, classes: Classes, model: torch.nn.Module) -> list[str]:
    """Return what the model's `id2label` calls a task's own logits, in their order.

    A regex with a group names a logit by what its first group matches: `politics:(.*)` calls the logit `politics:B-PER` by `B-PER`.

    Raises:
        DataError: a logit has no name, or two have the same.
    """
    names = _names(model)
    indices = class_indices(task, classes, model)
    own = sorted(names) if indices is None else indices
    missing = [index for index in own if index not in names]
    if missing or not own:
        which = f"the logit {missing[0]}" if missing else "its logits"
        raise DataError(f"task {task!r}: its labels are names, but the model's id2label does not name {which}")
    found = [_short(classes, names[index]) for index in own]
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise DataError(f"task {task!r}: two of the logits it is judged on are called {twice!r}; pick one set of them with `classes:`")
    return found


def classes_by_name(task: str, wanted: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the place of each label name of the data among a task's own logits.

    Args:
        task: its name, for messages.
        wanted: label names of the data.
        known: `class_names`.

    Raises:
        DataError: a label has no logit.
    """
    place = {name: index for index, name in enumerate(known)}
    for name in wanted:
        if name not in place:
            raise DataError(
                f"task {task!r}: the data has the label {name!r}, for which the model has no logit; {nearest(name, place)}. "
                "Correct the data, the model's id2label, or `classes:`"
            )
    return np.asarray([place[name] for name in wanted], dtype=np.int64)


def own_logits(indices: Sequence[int] | None, logits: torch.Tensor) -> torch.Tensor:
    """Return a task's own logits [..., own] of a model's [..., all], float32."""
    own = logits if indices is None else logits[..., list(indices)]
    return own.to(torch.float32)


def _names(model: torch.nn.Module) -> dict[int, str]:
    found: Mapping[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    return {int(index): str(name) for index, name in found.items()}


def _short(classes: Classes, name: str) -> str:
    found = re.fullmatch(classes, name) if isinstance(classes, str) else None
    return found[1] if found is not None and found.re.groups and found[1] is not None else name
