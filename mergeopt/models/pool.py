"""A base model and its experts, proven to fit together before anything is merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergeopt.errors import ConfigError, MismatchError, SourceError
from mergeopt.models.architecture import Architecture, HubArchitecture, ModuleArchitecture, TensorMap, tensor_map
from mergeopt.models.carry import Carry, carried_files
from mergeopt.models.checkpoint import Checkpoint

__all__ = ["Coverage", "Pool"]

COUNTERS = re.compile(r"(^|\.)num_batches_tracked$")
RESERVED = ("base", "learned")
"""Names of a recipe's other sources."""
STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
HARMLESS = re.compile(
    r"_name_or_path|transformers_version|dtype|label|dropout|_drop|drop_|initializer|use_cache|problem_type|task_specific|gradient|"
    r"finetuning|output_|return_dict|tokenizer_class|_token_id|architectures|is_decoder_cached|_commit_hash|_attn_implementation"
)
"""Keys of a configuration that may differ between models to be merged: they change training or bookkeeping, not what is computed."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What becomes of every stored tensor, by name; nothing is dropped.

    Args:
        merged: tensors the operator makes.
        copied: tensors that are no weights (counters, masks), equal in all sources, with the reason.
        excluded: tensors kept as they are in the base because the user said so.
        tied: second copies of merged tensors, and of which.
        recalibrate: merged normalisation statistics, which are not the merged model's own.
    """

    merged: tuple[str, ...]
    copied: Mapping[str, str]
    excluded: tuple[str, ...]
    tied: Mapping[str, str]
    recalibrate: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of stored tensors accounted for."""
        return len(self.merged) + len(self.copied) + len(self.excluded) + len(self.tied)


class Pool:
    """Base and experts; their order is the user's.

    Args:
        base: Hugging Face folder, safetensors file, or `hf://owner/name`.
        experts: the same by name, or a list (then named after the last part of their paths).
        exclude: regexes of stored tensor names left as they are in the base (heads, say).
        module: for bare safetensors files, what builds the `torch.nn.Module` they are the weights of.
        carry: whose tokenizer, processor, chat template and generation settings to hand on, by kind, where sources disagree.

    Raises:
        SourceError: a model cannot be read.
        MismatchError: the models do not fit together; the message lists every tensor with both shapes.
        ConfigError: no expert, names that repeat, or a pattern that excludes nothing.
    """

    def __init__(
        self,
        base: str | Path,
        experts: Mapping[str, str | Path] | Sequence[str | Path],
        *,
        exclude: Sequence[str] = (),
        module: Callable[[], torch.nn.Module] | None = None,
        carry: Mapping[str, str] | None = None,
    ) -> None:
        self.base = Checkpoint(base)
        self.experts = {name: Checkpoint(path) for name, path in _named(experts).items()}
        self.architecture = self._architecture(module)
        self.tensors: TensorMap = tensor_map(self.architecture, self.base.names, f"the base ({self.base.path})")
        self._check_experts()
        patterns = _patterns(exclude)
        self.exclude = tuple(patterns)
        self.coverage = self._cover(patterns)
        self.carry: Carry = carried_files({"base": self.base, **self.experts}, carry or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Stored names of the merged tensors, in the model's order."""
        return self.coverage.merged

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts, in the user's order."""
        return tuple(self.experts)

    def read_base(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read a tensor of the base in float32, [*shape].

        Raises:
            SourceError: it holds NaN or infinities.
        """
        return _finite(self.base.read(name, device).to(torch.float32), name, f"the base ({self.base.path})")

    def stack(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read a tensor of all experts in float32, [K, *shape], in the user's order.

        Raises:
            SourceError: an expert's holds NaN or infinities.
        """
        return torch.stack(
            [_finite(c.read(name, device).to(torch.float32), name, f"expert {key!r} ({c.path})") for key, c in self.experts.items()]
        )

    def _architecture(self, module: Callable[[], torch.nn.Module] | None) -> Architecture:
        if module is not None:
            return ModuleArchitecture(module)
        if self.base.folder is None:
            raise SourceError(
                f"{self.base.path} is a bare safetensors file, so nothing says what model it belongs to; give Pool(module=...) what builds "
                "it, or name a Hugging Face folder"
            )
        return HubArchitecture(self.base.folder)

    def _check_experts(self) -> None:
        stored = [name for name in self.base.names if name not in self.tensors.ignored]
        problems: list[str] = []
        for key, expert in self.experts.items():
            problems += _configuration_differences(self.architecture, key, expert)
            names = {name for name in expert.names if name in self.base.names or name not in self.tensors.ignored}
            problems += [
                f"  {name}: missing in expert {key!r}" for name in stored if name not in names and not self._tied_away(name, names)
            ]
            known = set(self.base.names)
            live = self.architecture.live_names(sorted(names - known), self.architecture.skeleton()) if names - known else {}
            problems += [
                f"  {name}: in expert {key!r} but not in the base" for name in sorted(live) if live[name] not in self.tensors.copies
            ]
            for name in stored:
                problems += _tensor_differences(name, self.base, key, expert) if name in names else []
            copies = {name: self.tensors.copies[there] for name, there in live.items() if there in self.tensors.copies}
            problems += self._untied(key, expert, names, {**self.tensors.tied, **copies})
        if problems:
            raise MismatchError(
                "\n".join(
                    ["these models do not fit together:", *problems, "only models of one architecture and configuration can be merged"]
                )
            )

    def _tied_away(self, name: str, names: set[str]) -> bool:
        return name in self.tensors.tied and self.tensors.tied[name] in names

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
            elif not self.base.spec(name).dtype.is_floating_point:
                copied[name] = self._copy_reason(name)
            else:
                merged.append(name)
        for text, pattern in patterns.items():
            if not any(pattern.search(name) for name in self.tensors.live):
                raise ConfigError(
                    f"exclude: the pattern {text!r} matches no tensor; the tensors are named like {next(iter(self.tensors.live))}"
                )
        if not merged:
            raise ConfigError("exclude: the patterns leave nothing to merge")
        statistics = tuple(name for name in merged if STATISTICS.search(name))
        return Coverage(tuple(merged), copied, tuple(excluded), dict(self.tensors.tied), statistics)

    def _copy_reason(self, name: str) -> str:
        if COUNTERS.search(name):
            return "counter: the largest of all sources"
        value = self.base.read(name)
        for key, expert in self.experts.items():
            if not torch.equal(expert.read(name), value):
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


def _patterns(exclude: Sequence[str]) -> dict[str, re.Pattern[str]]:
    if isinstance(exclude, str):
        raise ConfigError(f"exclude: expected a list of regular expressions, got {exclude!r}; write [{exclude!r}]")
    try:
        return {text: re.compile(text) for text in exclude}
    except (re.error, TypeError) as error:
        raise ConfigError(f"exclude: no regular expression among {list(exclude)}: {error}") from error


def _finite(tensor: torch.Tensor, name: str, where: str) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise SourceError(f"{where} holds {bad} NaN or infinite of {tensor.numel()} values in {name}; a merge would spread them everywhere")
    return tensor


def _tensor_differences(name: str, base: Checkpoint, key: str, expert: Checkpoint) -> list[str]:
    ours, theirs = base.spec(name), expert.spec(name)
    if ours.shape != theirs.shape:
        return [f"  {name}: shape {list(ours.shape)} in the base, {list(theirs.shape)} in expert {key!r}"]
    if ours.dtype != theirs.dtype and not (ours.dtype.is_floating_point and theirs.dtype.is_floating_point):
        return [f"  {name}: {ours.dtype} in the base, {theirs.dtype} in expert {key!r}"]
    return []


def _configuration_differences(architecture: Architecture, key: str, expert: Checkpoint) -> list[str]:
    if not isinstance(architecture, HubArchitecture) or expert.folder is None or not (expert.folder / "config.json").is_file():
        return []
    theirs = HubArchitecture(expert.folder).settings
    ours = {name: value for name, value in architecture.settings.items() if name in theirs}
    return [f"  config.json: {name} is {a!r} in the base, {b!r} in expert {key!r}" for name, a, b in _differences(ours, theirs)]


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
