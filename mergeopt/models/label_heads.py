"""One head for the labels of all experts: rows that stand for a label are merged among the experts that know it, by the labels' names.

A head that began at random has nothing in common with the base's, so the base's head is taken to be the average of the experts' (of a
label, of those that know it), and an expert that does not know a label is taken to say what that average says. Whatever the operator and
its weights, a label that one expert knows then keeps that expert's row, an expert alone keeps all of its own, and what is merged is what
experts that share a label say differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from mergeopt.errors import ConfigError, MismatchError, SourceError
from mergeopt.models.architecture import HubArchitecture
from mergeopt.models.checkpoint import Checkpoint, TensorSpec
from mergeopt.models.differences import UNNAMED, configuration_differences
from mergeopt.models.heads import Head, SeparateHeads

__all__ = ["LabelHeads", "LabelledCheckpoint", "label_heads"]


@dataclass(frozen=True, slots=True)
class LabelHeads:
    """Models with one head for all labels.

    Args:
        architecture: of the model that is made: the experts' class, with all labels.
        base: as a model of that architecture.
        experts: the same, by name.
        labels: of all experts, in the order in which they first occur.
        known: labels by expert, in its own order.
    """

    architecture: HubArchitecture
    base: LabelledCheckpoint
    experts: Mapping[str, LabelledCheckpoint]
    labels: tuple[str, ...]
    known: Mapping[str, tuple[str, ...]]

    def places(self, expert: str) -> list[int]:
        """Return where an expert's labels are among all, in its own order."""
        return [self.labels.index(label) for label in self.known[expert]]


@dataclass(frozen=True, slots=True)
class _Part:
    """What an expert has of a tensor of the head: its name there, and the rows of the whole that it knows, None for all of it."""

    expert: str
    checkpoint: Checkpoint
    stored: str
    rows: tuple[int, ...] | None

    def put(self, whole: torch.Tensor, *, add: bool = False) -> None:
        """Write it into the whole tensor, or add it to what is there."""
        own = self.checkpoint.read(self.stored).to(whole)
        if not bool(torch.isfinite(own).all()):
            raise SourceError(f"expert {self.expert!r} ({self.checkpoint.path}) holds NaN or infinite values in {self.stored}")
        place = slice(None) if self.rows is None else list(self.rows)
        whole[place] = whole[place] + own if add else own


@dataclass(frozen=True, slots=True)
class _HeadTensor:
    """A tensor of the head with rows for all labels, and what each expert has of it."""

    shape: tuple[int, ...]
    parts: Mapping[str, _Part]

    def read(self, expert: str | None) -> torch.Tensor:
        """Return the average of those that know, [*shape] float32; an expert's own in place of what it knows."""
        total, count = torch.zeros(self.shape, dtype=torch.float64), torch.zeros(self.shape, dtype=torch.float64)
        for part in self.parts.values():
            part.put(total, add=True)
            place = slice(None) if part.rows is None else list(part.rows)
            count[place] += 1.0
        whole = (total / count).to(torch.float32)
        if expert is not None:
            self.parts[expert].put(whole)
        return whole


class LabelledCheckpoint(Checkpoint):
    """A model as one with the head for all labels; its files, place and content hash are what they are.

    Args:
        source: the model as it is.
        stored: name of a tensor of the body -> its name in the source.
        head: tensors of the head by name.
        expert: whose it is; None for the base.
    """

    def __init__(self, source: Checkpoint, stored: Mapping[str, str], head: Mapping[str, _HeadTensor], expert: str | None) -> None:
        self.path, self.place = source.path, source.place
        self._source, self._stored, self._head, self._expert = source, stored, head, expert

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted([*self._stored, *self._head]))

    def spec(self, name: str) -> TensorSpec:
        """Return shape and element type of a tensor; those of the head are averages, hence float32."""
        return TensorSpec(self._head[name].shape, torch.float32) if name in self._head else self._source.spec(self._stored[name])

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor.

        Raises:
            SourceError: a file has changed or gone since it was opened, or an expert's head is not finite.
        """
        return self._head[name].read(self._expert).to(device) if name in self._head else self._source.read(self._stored[name], device)

    @cached_property
    def hash(self) -> str:
        """Content hash of the model as it is."""
        return self._source.hash


def label_heads(base: Checkpoint, split: SeparateHeads) -> LabelHeads:
    """Give all models one head with the labels of all experts.

    Args:
        base: its own head, if it has one, is not used.
        split: body and heads.

    Raises:
        ConfigError: an expert does not name its labels, or no tensor has a row for each.
        MismatchError: the experts are of different classes, or their heads differ in more than the rows that stand for labels.
    """
    known = {key: _labels(key, head) for key, head in split.heads.items()}
    labels = tuple(dict.fromkeys(label for own in known.values() for label in own))
    first = next(iter(split.heads.values()))
    _check_classes(split.heads)
    if first.checkpoint.folder is None:
        raise ConfigError(f"heads: by_label needs experts that are Hugging Face folders, got {first.checkpoint.path}")
    architecture = HubArchitecture(first.checkpoint.folder, labels)
    rows = {key: tuple(map(labels.index, own)) for key, own in known.items()}
    head = _head_tensors(architecture, HubArchitecture(first.checkpoint.folder, (*labels, "")), split.heads, rows)
    sources = {None: base} | {key: own.checkpoint for key, own in split.heads.items()}
    made = {key: LabelledCheckpoint(source, split.stored[key or "base"], head, key) for key, source in sources.items()}
    experts = {key: checkpoint for key, checkpoint in made.items() if key is not None}
    return LabelHeads(architecture, made[None], experts, labels, known)


def _labels(expert: str, head: Head) -> tuple[str, ...]:
    labels = head.labels
    if not labels or any(UNNAMED.fullmatch(label) for label in labels):
        raise ConfigError(
            f"heads: by_label goes by the names of labels, and expert {expert!r} ({head.checkpoint.path}) does not name its own "
            f"({', '.join(labels[:3]) or 'none'}); set id2label in its config.json"
        )
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ConfigError(f"heads: by_label: expert {expert!r} has two labels called {twice[0]!r}; correct id2label in its config.json")
    return labels


def _check_classes(heads: Mapping[str, Head]) -> None:
    (first, reference), *others = heads.items()
    problems = []
    for key, head in others:
        ours, theirs = reference.architecture.description, head.architecture.description
        if ours != theirs:
            problems.append(f"  expert {key!r} is of class {theirs['class']}, expert {first!r} of {ours['class']}")
        problems += configuration_differences(reference.architecture, key, head.checkpoint, reference=f"expert {first!r}")
        if set(head.places.values()) != set(reference.places.values()):
            problems.append(f"  the heads of {first!r} and {key!r} hold other tensors: {', '.join(reference.own)}; {', '.join(head.own)}")
    if problems:
        raise MismatchError("\n".join(["these heads do not fit together:", *problems, "keep them apart with heads: separate"]))


def _head_tensors(
    architecture: HubArchitecture, wider: HubArchitecture, heads: Mapping[str, Head], rows: Mapping[str, tuple[int, ...]]
) -> dict[str, _HeadTensor]:
    """Return the tensors of the head by name; those that a model with one more label has in another shape have a row for each label."""
    shapes, more = ({name: tuple(tensor.shape) for name, tensor in a.skeleton().state_dict().items()} for a in (architecture, wider))
    reference = next(iter(heads.values()))
    tensors: dict[str, _HeadTensor] = {}
    problems: list[str] = []
    for stored, live in reference.places.items():
        shape = shapes[live]
        by_label = more[live] != shape
        parts: dict[str, _Part] = {}
        for key, head in heads.items():
            name = next(own for own, place in head.places.items() if place == live)
            parts[key] = _Part(key, head.checkpoint, name, rows[key] if by_label else None)
            expected = (len(rows[key]), *shape[1:]) if by_label else shape
            if head.checkpoint.spec(name).shape != expected:
                problems.append(
                    f"  {name}: expected shape {list(expected)} in expert {key!r}, got {list(head.checkpoint.spec(name).shape)}"
                )
        tensors[stored] = _HeadTensor(shape, parts)
    if problems:
        raise MismatchError("\n".join(["these heads do not fit together:", *problems, "keep them apart with heads: separate"]))
    if not any(part.rows is not None for tensor in tensors.values() for part in tensor.parts.values()):
        raise ConfigError(f"heads: by_label: no tensor of {', '.join(reference.own)} has a row for each label; leave `heads` out")
    return tensors
