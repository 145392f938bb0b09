"""A candidate as data: which sources, which operator, which arguments per group; enough to remake the model bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergeopt.errors import RecipeError
from mergeopt.lineage import Lineage

__all__ = [
    "LEARNED",
    "STATISTICS",
    "Argument",
    "Heads",
    "Learned",
    "Measured",
    "Recipe",
    "Source",
    "canonical_json",
    "content_hash",
    "groups_json",
    "ordered_json",
]

FORMAT = 1
LEARNED = "learned"
"""Name under which a recipe's learned set may be relocated."""
STATISTICS = "statistics"
"""Name under which the statistics of a recipe's experts may be relocated."""


def canonical_json(data: Any) -> str:
    """Return JSON with sorted keys and no spaces; floats round-trip exactly; NaN and infinities are refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def ordered_json(data: Any) -> str:
    """Return JSON that keeps the order of keys, which is the user's; NaN and infinities are refused."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def content_hash(data: Any) -> str:
    """Return the SHA-256 (hex) of JSON-able data, independent of key order."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint by name, place and content.

    Args:
        name: `base`, or the expert's name.
        path: folder, file or hub id; where it was found, not part of its identity.
        hash: content hash of its tensors.
    """

    name: str
    path: str
    hash: str


@dataclass(frozen=True, slots=True)
class Argument:
    """The values of one operator parameter.

    Args:
        groups: the grouping, as in a run file (`model`, `layer`, `{"blocks": 8}`, `tensor`, or a mapping of names to regexes).
        curve: number of control points along depth, None for one value per group.
        values: per knot (group or control point) a value, or a value per expert name.
        static: whether it was fixed for the whole search; rules may then do its work once (it selects the arithmetic, hence the bits).
    """

    groups: Any
    curve: int | None
    values: Mapping[str, Any]
    static: bool


@dataclass(frozen=True, slots=True)
class Learned:
    """A learned set, asked for one preference.

    Args:
        path: its folder; where it was found, not part of its identity.
        hash: content hash of the set.
        preference: share of each objective, non-negative, with sum one.
    """

    path: str
    hash: str
    preference: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Heads:
    """What becomes of heads that are not merged like any tensor.

    Args:
        mode: `separate`: every expert keeps its own; `by_label`: all become one, with the labels of all.
        tensors: regexes of the names of their tensors; none for the tensors outside the base model.
        written: the expert whose head the model has that this recipe makes; None where that is said later, as of a search's candidates.
        labels: by label, the labels of every expert in its own order, which say what the rows of its head stand for.
    """

    mode: str
    tensors: tuple[str, ...] = ()
    written: str | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        labels = {"labels": {name: list(own) for name, own in self.labels.items()}} if self.labels else {}
        return {"mode": self.mode, "tensors": list(self.tensors), "written": self.written, **labels}


@dataclass(frozen=True, slots=True)
class Measured:
    """Statistics of the experts on data, which the operator uses.

    Args:
        path: their folder; where it was found, not part of its identity.
        hash: content hash of the statistics.
    """

    path: str
    hash: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge, as data.

    Args:
        base: the model merged into.
        experts: the models merged, in the user's order.
        operator: registered name of the rule.
        operator_version: version of the rule; another version may give other bits.
        variant: of the rule.
        arguments: per parameter.
        exclude: regexes of tensors left as they are in the base.
        dtype: of the merged weights.
        carry: which source hands on tokenizer, processor, chat template and generation settings, by kind.
        lineage: how the merged models came to be of the experts, None where they are the experts themselves.
        learned: what is added to the merge, None for nothing.
        heads: what becomes of heads, None where they are merged like any tensor.
        statistics: what the operator knows of the experts besides their weights, None for nothing. With a lineage, they are those of the
            experts that the members began as.
    """

    base: Source
    experts: tuple[Source, ...]
    operator: str
    operator_version: int
    variant: str
    arguments: Mapping[str, Argument]
    exclude: tuple[str, ...] = ()
    dtype: str = "float32"
    carry: Mapping[str, str] = field(default_factory=dict)
    lineage: Lineage | None = None
    learned: Learned | None = None
    heads: Heads | None = None
    statistics: Measured | None = None

    @property
    def key(self) -> str:
        """Content hash of all that determines the weights; paths do not count."""
        data = self.to_json()
        for source in [data["base"], *data["experts"]]:
            del source["path"]
        if self.learned is not None:
            del data["learned"]["path"]
        if self.statistics is not None:
            del data["statistics"]["path"]
        del data["carry"]
        return content_hash(data)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data; `from_json` is the way back."""
        more: dict[str, Any] = {}
        if self.lineage is not None:
            more["lineage"] = self.lineage.to_json()
        if self.learned is not None:
            more["learned"] = {"path": self.learned.path, "hash": self.learned.hash, "preference": dict(self.learned.preference)}
        if self.heads is not None:
            more["heads"] = self.heads.to_json()
        if self.statistics is not None:
            more["statistics"] = {"path": self.statistics.path, "hash": self.statistics.hash}
        return {
            "format": FORMAT,
            "base": _source_json(self.base),
            "experts": [_source_json(source) for source in self.experts],
            "operator": {"name": self.operator, "version": self.operator_version, "variant": self.variant},
            "arguments": {
                name: {
                    "groups": groups_json(argument.groups),
                    "curve": argument.curve,
                    "static": argument.static,
                    "values": dict(argument.values),
                }
                for name, argument in self.arguments.items()
            },
            "exclude": list(self.exclude),
            "dtype": self.dtype,
            "carry": dict(self.carry),
            **more,
        }

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Read a recipe back.

        Raises:
            RecipeError: a key is missing or unknown, or has another type than a recipe's.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"expected a recipe (a JSON object), got {type(data).__name__}")
        if data.get("format") != FORMAT:
            raise RecipeError(f"expected a recipe of format {FORMAT}, got format {data.get('format')!r}")
        try:
            return cls(
                base=_source(data["base"]),
                experts=tuple(_source(source) for source in data["experts"]),
                operator=_text(data["operator"]["name"]),
                operator_version=int(data["operator"]["version"]),
                variant=_text(data["operator"]["variant"]),
                arguments={
                    _text(name): Argument(_groups(a["groups"]), a["curve"], dict(a["values"]), bool(a["static"]))
                    for name, a in data["arguments"].items()
                },
                exclude=tuple(_text(pattern) for pattern in data["exclude"]),
                dtype=_text(data["dtype"]),
                carry={_text(kind): _text(name) for kind, name in data["carry"].items()},
                lineage=_lineage(data),
                learned=_learned(data["learned"]) if "learned" in data else None,
                heads=_heads(data) if "heads" in data else None,
                statistics=_measured(data["statistics"]) if "statistics" in data else None,
            )
        except RecipeError:
            raise
        except KeyError as error:
            raise RecipeError(f"damaged recipe: the key {error} is missing") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RecipeError(f"damaged recipe: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: the file is missing, is no JSON, or is no recipe.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # no JSON, or not even text
            raise RecipeError(f"{path} is no JSON, and so no recipe: {error}") from error
        return cls.from_json(data)

    def relocated(self, places: Mapping[str, str]) -> Recipe:
        """Return the recipe with other paths for some sources, by name.

        Raises:
            RecipeError: a name is not a source of this recipe.
        """
        known = [self.base.name, *(source.name for source in self.experts), *([] if self.learned is None else [LEARNED])]
        known += [] if self.statistics is None else [STATISTICS]
        for name in places:
            if name not in known:
                raise RecipeError(f"the recipe has no source {name!r}; it has {', '.join(known)}")
        learned, measured = self.learned, self.statistics
        return replace(
            self,
            statistics=None if measured is None else replace(measured, path=places.get(STATISTICS, measured.path)),
            learned=None if learned is None else replace(learned, path=places.get(LEARNED, learned.path)),
            base=replace(self.base, path=places.get(self.base.name, self.base.path)),
            experts=tuple(replace(source, path=places.get(source.name, source.path)) for source in self.experts),
        )


def groups_json(groups: Any) -> Any:
    """Return a grouping as JSON that no sorting of keys can change: regexes are tried in order, so they become a list of pairs."""
    return [[name, pattern] for name, pattern in groups.items()] if isinstance(groups, Mapping) and "blocks" not in groups else groups


def _groups(data: Any) -> Any:
    return {_text(name): pattern for name, pattern in data} if isinstance(data, list) else data


def _lineage(data: Mapping[str, Any]) -> Lineage | None:
    if "lineage" not in data:
        return None
    lineage = Lineage.from_json(data["lineage"])
    experts = tuple(_text(source["name"]) for source in data["experts"])
    if lineage.members != experts:
        raise RecipeError(f"damaged recipe: its lineage is of {', '.join(lineage.members)}, its experts are {', '.join(experts)}")
    return lineage


def _learned(data: Any) -> Learned:
    preference = {_text(name): float(share) for name, share in data["preference"].items()}
    if not all(0.0 <= share <= 1.0 for share in preference.values()) or abs(sum(preference.values()) - 1.0) > 1e-6:
        raise RecipeError(f"damaged recipe: expected a preference of non-negative shares with sum one, got {preference}")
    return Learned(_text(data["path"]), _text(data["hash"]), preference)


def _heads(data: Mapping[str, Any]) -> Heads:
    given = data["heads"]
    written = None if given["written"] is None else _text(given["written"])
    experts = [_text(source["name"]) for source in data["experts"]]
    if written is not None and written not in experts:
        raise RecipeError(f"damaged recipe: it writes the head of {written!r}, its experts are {', '.join(experts)}")
    labels = {_text(name): tuple(_text(label) for label in own) for name, own in given.get("labels", {}).items()}
    return Heads(_text(given["mode"]), tuple(_text(pattern) for pattern in given["tensors"]), written, labels)


def _measured(data: Any) -> Measured:
    return Measured(_text(data["path"]), _text(data["hash"]))


def _source_json(source: Source) -> dict[str, Any]:
    return {"name": source.name, "path": source.path, "hash": source.hash}


def _source(data: Any) -> Source:
    return Source(_text(data["name"]), _text(data["path"]), _text(data["hash"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value
