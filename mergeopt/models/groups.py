"""Which tensors share a value: maps tensor names to groups, and spreads control points along depth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergeopt.errors import ConfigError

__all__ = ["Grouping", "grouping", "layer_labels"]

NUMBERED = re.compile(r"^(?:(.*?)\.)?(\d+)\.")
MOST_POINTS = 100  # control points of a curve that any model may have
KINDS = "model, layer, tensor, {blocks: N}, or a mapping of group names to regexes"


@dataclass(frozen=True, slots=True, eq=False)
class Grouping:
    """How the values of one parameter spread over tensors.

    Args:
        spec: as in a run file: `model`, `layer`, `tensor`, `{"blocks": n}` or a mapping of names to regexes.
        curve: number of control points along depth, None where each group has a value of its own.
        knots: names of the free values, in order.
        weights: float64 [tensors, knots], rows sum to one; a tensor's value is its row times the knot values.
    """

    spec: Any
    curve: int | None
    knots: tuple[str, ...]
    weights: npt.NDArray[np.float64]

    @property
    def one_hot(self) -> bool:
        """Whether every tensor takes the value of exactly one knot."""
        return self.curve is None

    def spread(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the value of every tensor.

        Args:
            values: [..., knots] or [..., knots, experts] given as [knots, ...]; the knot axis comes first.
        """
        if self.one_hot:
            spread: npt.NDArray[np.float64] = values[self.weights.argmax(axis=1)]  # picks, so that a value is passed on exactly
            return spread
        return np.tensordot(self.weights, values, axes=(1, 0))


def grouping(spec: Any, names: Sequence[str], *, curve: int | None = None) -> Grouping:
    """Map tensors to groups.

    Args:
        spec: `model`, `layer`, `tensor`, `{"blocks": n}`, or a mapping of group names to regexes (the first found in a name counts).
        names: stored names of the merged tensors, in the model's order.
        curve: number of control points along depth (>= 2), interpolated linearly; only with `model`.

    Raises:
        ConfigError: an unknown spec, a regex that does not compile, a tensor in no group, or a group without tensors.
    """
    if curve is not None:
        return _curve(spec, names, curve)
    labels = _labels(spec, names)
    knots = tuple(dict.fromkeys(labels)) if not isinstance(spec, Mapping) or "blocks" in spec else tuple(spec)
    weights = np.zeros((len(names), len(knots)))
    weights[np.arange(len(names)), [knots.index(label) for label in labels]] = 1.0
    return Grouping(spec, None, knots, weights)


def layer_labels(names: Sequence[str]) -> list[str]:
    """Return for every tensor the layer it belongs to: `embeddings`, `layer.0` ..., `head`.

    A stack of layers is found by its numbering; a model with several stacks (encoder and decoder) has labels with the stack's full name.
    What comes before the first stack is `embeddings`, what comes after the last is `head`, what lies between belongs to the layer
    before it.

    Args:
        names: tensor names in the model's order.
    """
    found = [NUMBERED.match(name) for name in names]
    members: dict[str, set[int]] = {}
    for match in found:
        if match:
            members.setdefault(match[1] or "", set()).add(int(match[2]))
    deepest = max((len(numbers) for numbers in members.values()), default=0)
    stacks = [prefix for prefix, numbers in members.items() if len(numbers) > 1 and 2 * len(numbers) >= deepest]
    stacked = [f"{match[1] or ''}\0{match[2]}" if match and (match[1] or "") in stacks else None for match in found]
    numbered = [i for i, label in enumerate(stacked) if label is not None]
    labels: list[str] = []
    for i, label in enumerate(stacked):
        if label is not None:
            prefix, number = label.split("\0")
            labels.append(f"{prefix}.{number}" if len(stacks) > 1 else f"layer.{number}")
        elif not numbered or i < numbered[0]:
            labels.append("embeddings")
        elif i > numbered[-1]:
            labels.append("head")
        else:
            labels.append(labels[-1])
    return labels


def _labels(spec: Any, names: Sequence[str]) -> list[str]:
    if spec == "model":
        return ["model"] * len(names)
    if spec == "tensor":
        return list(names)
    if spec == "layer":
        return layer_labels(names)
    if isinstance(spec, Mapping) and set(spec) == {"blocks"} and not isinstance(spec["blocks"], str):
        return _blocks(spec["blocks"], names)
    if isinstance(spec, Mapping) and spec:
        return _by_regex(spec, names)
    raise ConfigError(f"groups: expected {KINDS}, got {spec!r}")


def _blocks(count: Any, names: Sequence[str]) -> list[str]:
    labels = layer_labels(names)
    layers = list(dict.fromkeys(labels))
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(layers):
        raise ConfigError(
            f"groups: expected 1 to {len(layers)} blocks (the model has that many layers, embeddings and head included), got {count!r}"
        )
    block = {layer: i * count // len(layers) for i, layer in enumerate(layers)}
    return [f"block.{block[label]}" for label in labels]


def _by_regex(spec: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    patterns: dict[str, re.Pattern[str]] = {}
    for group, pattern in spec.items():
        if not isinstance(group, str):
            raise ConfigError(f"groups: expected names that are text, got {group!r}; put it in quotes")
        try:
            patterns[group] = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"groups: the pattern of {group!r} is no regular expression: {pattern!r} ({error})") from error
    labels = [next((group for group, pattern in patterns.items() if pattern.search(name)), "") for name in names]
    left = [name for name, label in zip(names, labels, strict=True) if not label]
    if left:
        raise ConfigError(
            f"groups: {len(left)} of {len(names)} tensors are in no group, for instance {left[0]}; add a last group such as rest: '.*'"
        )
    empty = [group for group in spec if group not in labels]
    if empty:
        raise ConfigError(
            f"groups: no tensor falls into {', '.join(map(repr, empty))} (patterns are tried in order); tensors are named like {names[0]}"
        )
    return labels


def _curve(spec: Any, names: Sequence[str], curve: int) -> Grouping:
    if spec != "model":
        raise ConfigError(f"curve: values along depth are for the whole model, so groups must be 'model', got {spec!r}")
    labels = layer_labels(names)
    layers = list(dict.fromkeys(labels))
    if isinstance(curve, bool) or not isinstance(curve, int) or curve < 2:
        raise ConfigError(f"curve: expected two or more control points, got {curve!r}")
    if curve > max(MOST_POINTS, len(layers)):
        raise ConfigError(f"curve: {curve} control points are more than the model's {len(layers)} layers can tell apart; give fewer")
    inner = [layer for layer in layers if layer not in ("embeddings", "head")] or layers
    depth = {"embeddings": 0.0, "head": 1.0} | {layer: i / max(1, len(inner) - 1) for i, layer in enumerate(inner)}
    weights = np.zeros((len(names), curve))
    for row, label in enumerate(labels):
        position = depth[label] * (curve - 1)
        left = min(int(position), curve - 2)
        weights[row, left], weights[row, left + 1] = left + 1 - position, position - left
    return Grouping(spec, curve, tuple(f"depth.{i}" for i in range(curve)), weights)
