"""What keeps two models from being merged: settings and tensors that differ, a line each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mergeopt.models.architecture import Architecture, HubArchitecture
from mergeopt.models.checkpoint import Checkpoint, TensorSpec

__all__ = ["UNNAMED", "configuration_differences", "label_difference", "tensor_differences"]

HARMLESS = re.compile(
    r"_name_or_path|transformers_version|dtype|label|dropout|_drop|drop_|initializer|use_cache|problem_type|task_specific|gradient|"
    r"finetuning|output_|return_dict|tokenizer_class|_token_id|architectures|is_decoder_cached|_commit_hash|_attn_implementation"
)
"""Keys of a configuration that may differ between models to be merged: they change training or bookkeeping, not what is computed."""
UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls labels that nobody named."""
OF_HEADS = re.compile(r"^(classifier|summary|pooler|num_choices)")
"""Keys that only a head computes with."""


def configuration_differences(
    architecture: Architecture, key: str, expert: Checkpoint, *, own_head: bool = False, reference: str = "the base"
) -> list[str]:
    """Return what an expert's configuration says otherwise than the base's, as far as it counts.

    Args:
        architecture: the base's.
        key: the expert's name.
        expert: its files.
        own_head: whether it keeps a head of its own, whose settings then may differ.
        reference: whose the architecture is, where it is not the base's.

    Raises:
        SourceError: its folder has no `config.json` that can be read.
    """
    if not isinstance(architecture, HubArchitecture) or expert.folder is None:
        return []
    theirs = HubArchitecture(expert.folder).settings
    ours = {name: value for name, value in architecture.settings.items() if name in theirs and not (own_head and OF_HEADS.search(name))}
    return [f"  config.json: {name} is {a!r} in {reference}, {b!r} in expert {key!r}" for name, a, b in _differences(ours, theirs)]


def label_difference(architecture: Architecture, experts: Mapping[str, Checkpoint], merged: Collection[str]) -> str | None:
    """Return the first class that two models of one head both name, differently; None where there is none, or nothing depends on it.

    Args:
        architecture: the base's.
        experts: by name, all of the base's shapes.
        merged: names in the live model of the tensors that are merged; without one that has a row for each class, names are bookkeeping.
    """
    if not isinstance(architecture, HubArchitecture):
        return None
    named = {"the base": architecture.classes}
    named |= {f"expert {key!r}": HubArchitecture(one.folder).classes for key, one in experts.items() if one.folder is not None}
    known: dict[int, tuple[str, str]] = {}
    for source, classes in named.items():
        for index, name in enumerate(classes):
            if UNNAMED.fullmatch(name):
                continue
            first, other = known.setdefault(index, (source, name))
            if other.casefold() != name.casefold():
                rows = _rows_of_classes(architecture)
                return f"  config.json: class {index} is {other!r} in {first}, {name!r} in {source}" if rows & set(merged) else None
    return None


def _rows_of_classes(architecture: HubArchitecture) -> set[str]:
    """Return the names in the live model of the tensors that have another shape when there is one class more."""
    wider = HubArchitecture(architecture.folder, (*architecture.classes, ""))
    ours, theirs = ({name: tensor.shape for name, tensor in a.skeleton().state_dict().items()} for a in (architecture, wider))
    return {name for name, shape in ours.items() if theirs[name] != shape}


def tensor_differences(name: str, ours: TensorSpec, key: str, theirs: TensorSpec) -> list[str]:
    """Return how an expert's tensor differs from the base's in shape or kind of element."""
    if ours.shape != theirs.shape:
        return [f"  {name}: shape {list(ours.shape)} in the base, {list(theirs.shape)} in expert {key!r}"]
    if ours.dtype != theirs.dtype and not (ours.dtype.is_floating_point and theirs.dtype.is_floating_point):
        return [f"  {name}: {ours.dtype} in the base, {theirs.dtype} in expert {key!r}"]
    return []


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs as (dotted key, our value, their value), without what is harmless; one side's missing keys are None."""
    for name in ours if not prefix else {**ours, **theirs}:
        a, b = ours.get(name), theirs.get(name)
        if HARMLESS.search(name) or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", a, b
