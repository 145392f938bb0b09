"""A base model and its experts, proven to fit together before anything is merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergeopt.errors import ConfigError, MismatchError, SourceError, nearest
from mergeopt.models.architecture import Architecture, HubArchitecture, ModuleArchitecture, TensorMap, tensor_map
from mergeopt.models.carry import Carry, carried_files
from mergeopt.models.checkpoint import Checkpoint, TensorSpec
from mergeopt.models.differences import configuration_differences, label_difference, tensor_differences
from mergeopt.models.heads import Head, SeparateHeads, separate_heads
from mergeopt.models.label_heads import label_heads

__all__ = ["ALL_HEADS", "HEADS", "IN_HEADS", "Coverage", "Pool"]

HEADS = ("shared", "separate", "by_label")
"""What may become of heads: merged like any tensor, kept apart, one per expert, or merged into one with the labels of all."""
ALL_HEADS = "all"
"""What is asked for to have every head."""
IN_HEADS = "in heads"
"""What coverage calls the tensors of heads that stay apart."""
ADVICE = (
    "only models of one architecture and configuration can be merged; where their heads alone differ, merge: {heads: separate} keeps them "
    "apart, and by_label makes them one"
)
LABEL_ADVICE = (
    "merge: {heads: by_label} makes one head of the labels of all, by their names, and heads: separate keeps them apart; where the classes "
    "are the same, correct id2label in config.json"
)
COUNTERS = re.compile(r"(^|\.)num_batches_tracked$")
RESERVED = ("base", "learned", "statistics")
"""Names of a recipe's other sources."""
STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")


@dataclass(frozen=True, slots=True)
class Coverage:
    """What becomes of every stored tensor, by name; nothing is dropped.

    Args:
        merged: tensors the operator makes.
        copied: tensors that are no weights (counters, masks), equal in all sources, with the reason.
        excluded: tensors kept as they are in the base because the user said so.
        tied: second copies of merged tensors, and of which.
        recalibrate: merged normalisation statistics, which are not the merged model's own.
        heads: tensors of heads that stay apart, by the expert whose they are; under `base` those of the base's own, which no model uses.
    """

    merged: tuple[str, ...]
    copied: Mapping[str, str]
    excluded: tuple[str, ...]
    tied: Mapping[str, str]
    recalibrate: tuple[str, ...]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of stored tensors accounted for."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of stored tensors by what becomes of them."""
        plain = {"merged": len(self.merged), "copied": len(self.copied), "excluded": len(self.excluded), "tied": len(self.tied)}
        return plain | ({IN_HEADS: sum(map(len, self.heads.values()))} if self.heads else {})


class Pool:
    """Base and experts; their order is the user's.

    Args:
        base: Hugging Face folder, safetensors file, or `hf://owner/name`.
        experts: the same by name, or a list (then named after the last part of their paths).
        exclude: regexes of stored tensor names left as they are in the base.
        module: for bare safetensors files, what builds the `torch.nn.Module` they are the weights of.
        carry: whose tokenizer, processor, chat template and generation settings to hand on, by kind, where sources disagree.
        heads: `shared`: heads are merged like any tensor, so all are alike; `separate`: every expert keeps its own, which may be of any
            shape and class of model, and what is merged is the rest, the body; `by_label`: the heads of experts of one class become one
            with the labels of all, merged row by row among the experts that know a label. In the latter two the base may lack a head.
        head_tensors: where heads are not shared, regexes of the names of their tensors; none for the tensors outside the base model.

    Raises:
        SourceError: a model cannot be read.
        MismatchError: the models do not fit together; the message lists every tensor with both shapes.
        ConfigError: no expert, names that repeat, a pattern that matches nothing, or no heads to keep apart.
    """

    def __init__(
        self,
        base: str | Path,
        experts: Mapping[str, str | Path] | Sequence[str | Path],
        *,
        exclude: Sequence[str] = (),
        module: Callable[[], torch.nn.Module] | None = None,
        carry: Mapping[str, str] | None = None,
        heads: str = "shared",
        head_tensors: Sequence[str] = (),
    ) -> None:
        _check_heads(heads, head_tensors)
        self.base = Checkpoint(base)
        self.experts = {name: Checkpoint(path) for name, path in _named(experts).items()}
        self.architecture = self._architecture(module)
        self.head_mode, self.head_tensors = heads, tuple(head_tensors)
        split = None if heads == "shared" else self._separated(module)
        self._separate = split if heads == "separate" else None
        self.labelled = label_heads(self.base, split) if split is not None and heads == "by_label" else None
        self._unused = () if split is None else split.unused
        if self.labelled is not None:
            self.architecture, self.base, self.experts = self.labelled.architecture, self.labelled.base, dict(self.labelled.experts)
        self.tensors: TensorMap = self._tensors()
        patterns = _patterns(exclude, "exclude")
        self.exclude = tuple(patterns)
        self.coverage = self._cover(patterns)
        self._check_labels()
        self.carry: Carry = carried_files({"base": self.base, **self.experts}, carry or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Stored names of the merged tensors, in the model's order."""
        return self.coverage.merged

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the user's order."""
        return tuple(self.experts)

    @property
    def heads(self) -> Mapping[str, Head]:
        """Heads that stay apart, by expert; none where they are shared."""
        return {} if self._separate is None else self._separate.heads

    def heads_described(self) -> dict[str, Any]:
        """Return how heads that are not shared were found, of which class and labels each is that stays apart, and which labels each
        expert knows of one head for all; JSON-able."""
        described = {key: head.described() for key, head in self.heads.items()}
        known = {} if self.labelled is None else {"known": {key: list(labels) for key, labels in self.labelled.known.items()}}
        return {"mode": self.head_mode, "tensors": list(self.head_tensors), "of": described, **known}

    def head_of(self, expert: str | None) -> str | None:
        """Return whose head a model that an expert is the measure of has; None where all have the same."""
        return expert if self.heads else None

    def heads_asked(self, head: str | None) -> tuple[str | None, ...]:
        """Return the heads that someone who asks for a model means: the one asked for, or the only one there is.

        Args:
            head: an expert's name, `all` for every one, None for the only one.

        Raises:
            ConfigError: there is no such head, or there are several and none was asked for.
        """
        known = list(self.heads)
        if not known:
            if head is not None:
                raise ConfigError(f"the head {head!r} was asked for, but these models share one head, which is merged; leave the head out")
            return (None,)
        if head == ALL_HEADS:
            for name in known:
                if Path(name).name != name:
                    raise ConfigError(
                        f"no folder can be called {name!r}, after the expert whose head it would have; write one head at a time"
                    )
            return tuple(known)
        if head is None and len(known) > 1:
            raise ConfigError(f"this merge has a head per expert; say whose to write: {', '.join(known)}, or {ALL_HEADS} (a folder each)")
        if head is not None and head not in known:
            raise ConfigError(f"there is no head {head!r}; {nearest(head, [*known, ALL_HEADS])}")
        return (known[0] if head is None else head,)

    def spec(self, name: str) -> TensorSpec:
        """Return shape and element type of a merged, copied or excluded tensor, as the base has it."""
        return self.base.spec(self.stored("base", name))

    def stored(self, source: str, name: str) -> str:
        """Return the name that a tensor is stored under in a source: the same in all, unless their classes differ."""
        return name if self._separate is None else self._separate.stored[source][name]

    def read_base(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read a tensor of the base in float32, [*shape].

        Raises:
            SourceError: it holds NaN or infinities.
        """
        return _finite(self.base.read(self.stored("base", name), device).to(torch.float32), name, f"the base ({self.base.path})")

    def stack(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read a tensor of all experts in float32, [K, *shape], in the user's order.

        Raises:
            SourceError: an expert's holds NaN or infinities.
        """
        stacked = torch.empty((len(self.experts), *self.spec(name).shape), dtype=torch.float32, device=device)
        for row, (key, expert) in zip(stacked, self.experts.items(), strict=True):
            row.copy_(expert.read(self.stored(key, name), device))
            _finite(row, name, f"expert {key!r} ({expert.path})")
        return stacked

    def copied(self, name: str) -> torch.Tensor:
        """Return a tensor that is no weight as every merge holds it: a counter is the largest of all sources."""
        if not self.coverage.copied[name].startswith("counter"):
            return self.base.read(self.stored("base", name))
        sources = {"base": self.base, **self.experts}
        return torch.stack([source.read(self.stored(key, name)) for key, source in sources.items()]).amax(0)

    def _architecture(self, module: Callable[[], torch.nn.Module] | None, source: Checkpoint | None = None) -> Architecture:
        of = source or self.base
        if module is not None:
            return ModuleArchitecture(module)
        if of.folder is None:
            raise SourceError(
                f"{of.path} is a bare safetensors file, so nothing says what model it belongs to; give Pool(module=...) what builds "
                "it, or name a Hugging Face folder"
            )
        return HubArchitecture(of.folder)

    def _tensors(self) -> TensorMap:
        if self._separate is not None:
            return self._separate.tensors
        tensors = tensor_map(self.architecture, self.base.names, f"the base ({self.base.path})")
        if self.labelled is None:
            self._check_experts(tensors)
        return tensors

    def _separated(self, module: Callable[[], torch.nn.Module] | None) -> SeparateHeads:
        if self.head_mode == "separate" and ALL_HEADS in self.experts:
            raise ConfigError(f"experts: with separate heads {ALL_HEADS!r} means every head; call the expert something else")
        differences = [
            line
            for key, expert in self.experts.items()
            for line in configuration_differences(self.architecture, key, expert, own_head=True)
        ]
        if differences:
            raise MismatchError("\n".join(["these models do not share a body:", *differences]))
        own = {key: self._architecture(module, expert) for key, expert in self.experts.items()}
        return separate_heads(self.base, self.architecture, self.experts, own, _patterns(self.head_tensors, "head_tensors"))

    def _check_experts(self, tensors: TensorMap) -> None:
        stored = [name for name in self.base.names if name not in tensors.ignored]
        problems: list[str] = []
        for key, expert in self.experts.items():
            problems += configuration_differences(self.architecture, key, expert)
            names = {name for name in expert.names if name in self.base.names or name not in tensors.ignored}
            problems += [
                f"  {name}: missing in expert {key!r}" for name in stored if name not in names and tensors.tied.get(name) not in names
            ]
            known = set(self.base.names)
            live = self.architecture.live_names(sorted(names - known), self.architecture.skeleton()) if names - known else {}
            problems += [f"  {name}: in expert {key!r} but not in the base" for name in sorted(live) if live[name] not in tensors.copies]
            for name in stored:
                problems += tensor_differences(name, self.base.spec(name), key, expert.spec(name)) if name in names else []
            copies = {name: tensors.copies[there] for name, there in live.items() if there in tensors.copies}
            problems += self._untied(key, expert, names, {**tensors.tied, **copies})
        if problems:
            raise MismatchError("\n".join(["these models do not fit together:", *problems, ADVICE]))

    def _check_labels(self) -> None:
        """Refuse to merge, row by row, heads whose rows stand for other classes."""
        merged = [self.tensors.live[name] for name in self.coverage.merged]
        difference = label_difference(self.architecture, self.experts, merged) if self.head_mode == "shared" else None
        if difference is not None:
            raise MismatchError(f"these models' heads do not fit together:\n{difference}\n{LABEL_ADVICE}")

    def _untied(self, key: str, expert: Checkpoint, names: set[str], tied: Mapping[str, str]) -> list[str]:
        problems = []
        for copy, original in tied.items():
            for label, checkpoint, there in (("the base", self.base, set(self.base.names)), (f"expert {key!r}", expert, names)):
                if copy in there and original in there and not torch.equal(checkpoint.read(copy), checkpoint.read(original)):
                    problems.append(f"  {copy}: tied to {original} in the architecture, but {label} holds different values for the two")
        return problems

    def _cover(self, patterns: Mapping[str, re.Pattern[str]]) -> Coverage:
        merged, excluded, copied = [], [], {}
        for name in self.tensors.live:
            if any(pattern.search(name) for pattern in patterns.values()):
                excluded.append(name)
            elif not self.spec(name).dtype.is_floating_point:
                copied[name] = self._copy_reason(name)
            else:
                merged.append(name)
        for text, pattern in patterns.items():
            if not any(pattern.search(name) for name in self.tensors.live):
                if any(pattern.search(name) for head in self.heads.values() for name in head.own):
                    raise ConfigError(f"exclude: the pattern {text!r} matches only heads, which are kept apart anyway; leave it out")
                raise ConfigError(
                    f"exclude: the pattern {text!r} matches no tensor; the tensors are named like {next(iter(self.tensors.live))}"
                )
        if not merged:
            raise ConfigError("exclude: the patterns leave nothing to merge")
        statistics = tuple(name for name in merged if STATISTICS.search(name))
        own = {key: head.own for key, head in self.heads.items()}
        heads = {"base": self._unused, **own} if self._unused or own else {}
        return Coverage(tuple(merged), copied, tuple(excluded), dict(self.tensors.tied), statistics, heads)

    def _copy_reason(self, name: str) -> str:
        if COUNTERS.search(name):
            return "counter: the largest of all sources"
        value = self.base.read(self.stored("base", name))
        for key, expert in self.experts.items():
            if not torch.equal(expert.read(self.stored(key, name)), value):
                raise MismatchError(
                    f"{name} is no weight ({value.dtype}) and differs between base and expert {key!r}; it can be neither merged nor copied"
                )
        return f"{value.dtype}, equal in all sources"


def _named(experts: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str | Path]:
    if isinstance(experts, str | Path):
        raise ConfigError(f"experts: expected a list, or a mapping of names to paths, got {str(experts)!r}; write [{str(experts)!r}]")
    if isinstance(experts, Mapping):
        named = dict(experts)
    else:
        named = {Path(str(path)).name.removesuffix(".safetensors"): path for path in experts}
        if len(named) < len(experts):
            raise ConfigError(f"experts: two of {[str(path) for path in experts]} end in the same name; give them names (name: path)")
    if not named:
        raise ConfigError("experts: expected one or more models, got none")
    for name in RESERVED:
        if name in named:
            raise ConfigError(f"experts: the name {name!r} is taken; call the expert something else")
    return named


def _check_heads(heads: str, head_tensors: Sequence[str]) -> None:
    if heads not in HEADS:
        raise ConfigError(f"heads: {nearest(str(heads), HEADS)}; got {heads!r}")
    if head_tensors and heads == "shared":
        raise ConfigError("head_tensors: heads are shared, so they are merged like any tensor; say heads: separate, or leave the key out")


def _patterns(given: Sequence[str], key: str) -> dict[str, re.Pattern[str]]:
    if isinstance(given, str):
        raise ConfigError(f"{key}: expected a list of regular expressions, got {given!r}; write [{given!r}]")
    try:
        return {text: re.compile(text) for text in given}
    except (re.error, TypeError) as error:
        raise ConfigError(f"{key}: no regular expression among {list(given)}: {error}") from error


def _finite(tensor: torch.Tensor, name: str, where: str) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise SourceError(f"{where} holds {bad} NaN or infinite of {tensor.numel()} values in {name}; a merge would spread them everywhere")
    return tensor
