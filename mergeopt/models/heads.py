"""Heads that stay apart: which tensors experts of different tasks share, and which each keeps for itself.

The body is what all models have in common: the tensors inside their base model (`base_model_prefix` of transformers, `bert.` say), as far
as the architecture of every source has them. All else is head. Experts may be of different classes (a sequence and a token classifier), and
the base of yet another, or without any head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from mergeopt.errors import ConfigError, MismatchError
from mergeopt.models.architecture import IGNORED, Architecture, HubArchitecture, TensorMap, tensor_map
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.differences import tensor_differences

__all__ = ["Head", "SeparateHeads", "separate_heads"]

Patterns = Mapping[str, re.Pattern[str]]


@dataclass(frozen=True, slots=True)
class Head:
    """One expert's head, and the model that it completes.

    Args:
        checkpoint: the expert's.
        architecture: of the expert: its own class and configuration.
        live: name of a shared tensor -> name in the expert's live model.
        places: stored name of a tensor that is not shared -> name in the expert's live model.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    live: Mapping[str, str]
    places: Mapping[str, str]

    @property
    def own(self) -> tuple[str, ...]:
        """Stored names of the expert's tensors that are not shared."""
        return tuple(self.places)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its classes, in order; none where its configuration names none."""
        return self.architecture.classes if isinstance(self.architecture, HubArchitecture) else ()

    def described(self) -> dict[str, Any]:
        """Return what tells it apart besides its tensors, JSON-able."""
        return {**self.architecture.description, "labels": list(self.labels), "tensors": list(self.own)}


@dataclass(frozen=True, slots=True)
class SeparateHeads:
    """How models with heads of their own share a body.

    Args:
        tensors: the shared tensors, named as the first expert stores them, and their places in its live model.
        stored: source (`base`, or an expert) -> name of a shared tensor -> name it is stored under there.
        heads: by expert, in the user's order.
        unused: stored names of the base's tensors that no expert shares: its own head.
    """

    tensors: TensorMap
    stored: Mapping[str, Mapping[str, str]]
    heads: Mapping[str, Head]
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _View:
    """An expert's tensors by the names of a live model with a head; the base model's prefix, and what its own names lack of it."""

    names: Mapping[str, str]
    tensors: TensorMap
    prefix: str
    bare: str

    def live(self, name: str) -> str:
        return name.removeprefix(self.bare)


def separate_heads(
    base: Checkpoint, architecture: Architecture, experts: Mapping[str, Checkpoint], own: Mapping[str, Architecture], patterns: Patterns
) -> SeparateHeads:
    """Tell body and heads apart.

    Args:
        base: its head, if it has one, is not used.
        architecture: of the base.
        experts: by name, in the user's order.
        own: architecture of each expert.
        patterns: what the names of head tensors are found by, by their texts; none for the tensors outside the base model.

    Raises:
        MismatchError: a shared tensor is missing in a source, or has another shape there.
        ConfigError: nothing is a head, or nothing is shared.
    """
    views = {key: _view(own[key], expert, f"expert {key!r} ({expert.path})") for key, expert in experts.items()}
    first = next(iter(views))
    _check_patterns(patterns, views[first], [key for view in views.values() for key in view.names])
    of_base = _names_of_base(base, architecture)
    body, problems = _shared(views, of_base, architecture, patterns)
    for key, view in views.items():
        for name in body:
            problems += tensor_differences(views[first].names[name], base.spec(of_base[name]), key, experts[key].spec(view.names[name]))
        problems += _untied(key, experts[key], view.tensors)
    if problems:
        raise MismatchError("\n".join(["these models do not share a body:", *problems, "only models of one architecture can be merged"]))
    stored_as = {name: views[first].names[name] for name in body}
    heads = {key: _head(experts[key], own[key], view, stored_as) for key, view in views.items()}
    _check_split(body, heads, views[first].prefix)
    named = {"base": of_base, **{key: view.names for key, view in views.items()}}
    stored = {source: {stored_as[name]: names[name] for name in body} for source, names in named.items()}
    used = set(stored["base"].values())
    unused = tuple(name for name in base.names if name not in used and not IGNORED.search(name))
    parameters = frozenset(stored_as.values()) & views[first].tensors.parameters
    return SeparateHeads(TensorMap(heads[first].live, {}, {}, (), parameters), stored, heads, unused)


def _view(architecture: Architecture, checkpoint: Checkpoint, source: str) -> _View:
    tensors = tensor_map(architecture, checkpoint.names, source)
    skeleton = architecture.skeleton()
    bare = _bare_prefix(skeleton)
    names = {f"{bare}{live}": name for name, live in tensors.live.items()}
    return _View(names, tensors, str(getattr(skeleton, "base_model_prefix", "")), bare)


def _names_of_base(base: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Return the base's stored names by the names of a live model with a head; it may lack a head, or hold what it does not use."""
    skeleton = architecture.skeleton()
    prefix = _bare_prefix(skeleton)
    return {f"{prefix}{live}": stored for stored, live in architecture.live_names(base.names, skeleton).items()}


def _bare_prefix(skeleton: torch.nn.Module) -> str:
    """Return what the names of a base model without head lack in front; nothing where there is a head."""
    prefix = getattr(skeleton, "base_model_prefix", "")
    return f"{prefix}." if prefix and not hasattr(skeleton, prefix) else ""


def _check_split(body: Sequence[str], heads: Mapping[str, Head], prefix: str) -> None:
    if not body:
        raise ConfigError("head_tensors: the patterns leave nothing to merge")
    if not any(head.own for head in heads.values()):
        raise ConfigError(
            f"heads: the experts have no tensors outside their base model ({prefix}.*), so there are no heads to keep apart; leave `heads` "
            "out, or say which tensors are heads with `head_tensors`"
        )


def _check_patterns(patterns: Patterns, first: _View, names: Sequence[str]) -> None:
    if not patterns and not first.prefix:
        raise ConfigError("heads: nothing says which tensors of this model are its head; name them with `head_tensors`, regexes")
    for text, pattern in patterns.items():
        if not any(pattern.search(name) for name in names):
            raise ConfigError(f"head_tensors: the pattern {text!r} matches no tensor; the experts' are named like {', '.join(names[-2:])}")


def _shared(
    views: Mapping[str, _View], of_base: Mapping[str, str], architecture: Architecture, patterns: Patterns
) -> tuple[list[str], list[str]]:
    """Return the names of the body's tensors, in the model's order, and what is wrong with them.

    Inside the base model, a tensor that a source's architecture does not have (BERT's pooler, say) is nobody's to share.
    """
    first = next(iter(views.values()))

    def is_head(name: str) -> bool:
        return any(p.search(name) for p in patterns.values()) if patterns else not name.startswith(f"{first.prefix}.")

    wanted = dict.fromkeys(name for name in chain.from_iterable(view.names for view in views.values()) if not is_head(name))
    skeleton = architecture.skeleton()
    known = {f"{_bare_prefix(skeleton)}{name}" for name in skeleton.state_dict()}
    body, problems = [], []
    for name in wanted:
        lacking = [f"expert {key!r}" for key, view in views.items() if name not in view.names]
        without_base = name not in of_base
        damaged = without_base and name in known
        if damaged or (patterns and (lacking or without_base)):
            where = [*(["the base"] if without_base else []), *lacking]
            hint = "" if damaged else "; if it belongs to a head, add it to `head_tensors`"
            problems.append(f"  {name}: missing in {', '.join(where)}{hint}")
        elif not lacking and not without_base:
            body.append(name)
    return body, problems


def _head(checkpoint: Checkpoint, architecture: Architecture, view: _View, stored_as: Mapping[str, str]) -> Head:
    shared = {view.names[name] for name in stored_as}
    own = {name: place for name, place in view.tensors.live.items() if name not in shared}
    return Head(checkpoint, architecture, {stored: view.live(name) for name, stored in stored_as.items()}, own)


def _untied(key: str, expert: Checkpoint, tensors: TensorMap) -> Iterator[str]:
    for copy, original in tensors.tied.items():
        if not torch.equal(expert.read(copy), expert.read(original)):
            yield f"  {copy}: tied to {original} in the architecture, but expert {key!r} holds different values for the two"
