"""What kind of model is made: builds it, and knows which stored tensor becomes which of its parameters and buffers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mergeopt.errors import MismatchError, SourceError
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.hollow import HollowCheckpoint

__all__ = ["Architecture", "HubArchitecture", "ModuleArchitecture", "TensorMap", "quiet_transformers", "take_generation_settings"]

IGNORED = re.compile(r"(^|\.)(position_ids|token_type_ids|rotary_emb\.inv_freq|masked_bias|attn\.bias)$")
"""Stored buffers of older versions that today's models compute themselves."""


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Which stored tensor becomes which tensor of the live model.

    Args:
        live: stored name -> name in the live model, in the live model's order; tied tensors appear once, under one name.
        tied: stored name -> the stored name it is a second copy of; their contents must be equal.
        copies: name in the live model that shares another's storage -> stored name of that other.
        ignored: stored names that the model computes itself.
        parameters: stored names of trainable parameters; what is left of `live` are buffers.
    """

    live: Mapping[str, str]
    tied: Mapping[str, str]
    copies: Mapping[str, str]
    ignored: tuple[str, ...]
    parameters: frozenset[str]


class Architecture(Protocol):
    """How to build the model, and how its stored tensors are named."""

    def skeleton(self) -> torch.nn.Module:
        """Return the model without storage (on the meta device)."""
        ...

    def load(self, base: Checkpoint | HollowCheckpoint, dtype: torch.dtype) -> torch.nn.Module:
        """Return the model in evaluation mode with the base's weights."""
        ...

    def live_names(self, stored: Sequence[str], skeleton: torch.nn.Module) -> dict[str, str]:
        """Return stored name -> name in the live model, for all stored names, known or not."""
        ...

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what a folder says of the model besides its weights, which are of this type."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """What identifies the architecture, JSON-able."""
        ...


class HubArchitecture:
    """A transformers model, as the `config.json` of a folder describes it. Remote code is never run.

    Args:
        folder: a Hugging Face model folder.
        labels: names of the classes in place of those that the folder names, None for those.

    Raises:
        SourceError: `config.json` is missing, damaged, or names no class of transformers.
    """

    def __init__(self, folder: Path, labels: Sequence[str] | None = None) -> None:
        self.folder, self.labels = folder, None if labels is None else tuple(labels)
        self.config_data = _read_config(folder)
        names = self.config_data.get("architectures")
        if not (isinstance(names, list) and names and isinstance(names[0], str)):
            raise SourceError(
                f"{folder / 'config.json'} does not say which class the model is: expected a key 'architectures', got {names!r}"
            )
        self.class_name: str = names[0]

    @property
    def description(self) -> Mapping[str, Any]:
        labels = {} if self.labels is None else {"labels": list(self.labels)}
        return {"class": self.class_name, "model_type": self.config_data.get("model_type"), **labels}

    @property
    def settings(self) -> Mapping[str, Any]:
        """The whole configuration, with the defaults of what the file leaves out."""
        found: dict[str, Any] = self._config().to_dict()
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in order; none where the configuration names none."""
        names: Mapping[int, str] = self.settings.get("id2label") or {}
        return tuple(str(names[index]) for index in sorted(names))

    def skeleton(self) -> torch.nn.Module:
        with torch.device("meta"), quiet_transformers():
            model: torch.nn.Module = self._model_class()(self._config())
        return model.eval()

    def load(self, base: Checkpoint | HollowCheckpoint, dtype: torch.dtype) -> torch.nn.Module:
        # The tensors that were checked are handed over: transformers would choose among a folder's files by rules of its own.
        tensors = {name: base.read(name) for name in base.names}
        with quiet_transformers():
            model = self._model_class().from_pretrained(None, config=self._config(), state_dict=tensors, dtype=dtype)
        live: torch.nn.Module = model.eval()
        take_generation_settings(live, self.folder)
        return live

    def live_names(self, stored: Sequence[str], skeleton: torch.nn.Module) -> dict[str, str]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(skeleton)  # type: ignore[arg-type]
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        state = skeleton.state_dict()
        prefix = getattr(skeleton, "base_model_prefix", None)
        names: dict[str, str] = {}
        for name in stored:
            renamed, converted = rename_source_key(name, renamings, converters, prefix, state)
            if converted is not None:
                raise MismatchError(
                    f"{self.class_name} stores {name!r} in another form than it computes with (split or fused on loading); such models "
                    "cannot be merged yet"
                )
            names[name] = renamed
        return names

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        model: Any = self.skeleton()
        model.config.dtype = str(dtype).removeprefix("torch.")
        model.config.architectures = [self.class_name]
        with quiet_transformers():
            model.config.save_pretrained(folder)
            if model.can_generate():
                take_generation_settings(model, self.folder)
                model.generation_config.save_pretrained(folder)

    def _model_class(self) -> Any:
        import transformers

        found = getattr(transformers, self.class_name, None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            version = transformers.__version__
            raise SourceError(f"{self.folder / 'config.json'} names the class {self.class_name!r}, unknown to transformers {version}")
        return found

    def _config(self) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"transformers cannot use {self.folder / 'config.json'}: {str(error).splitlines()[0]}") from error
        if self.labels is not None:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: index for index, label in enumerate(self.labels)}
        return config


def take_generation_settings(model: Any, folder: Path) -> None:
    """Have a model generate as the `generation_config.json` of a folder says; nothing happens where there is none, or to other models."""
    if getattr(model, "generation_config", None) is not None and (folder / "generation_config.json").is_file():
        with quiet_transformers():
            model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)


class ModuleArchitecture:
    """Any `torch.nn.Module`; its stored tensors have the names of its state dict.

    Args:
        build: returns a new module; called on the meta device too.
        name: what to call it in results, by default the class's name.
    """

    def __init__(self, build: Callable[[], torch.nn.Module], name: str | None = None) -> None:
        self.build = build
        self.name = name

    @property
    def description(self) -> Mapping[str, Any]:
        return {"class": self.name or type(self.skeleton()).__name__, "model_type": None}

    def skeleton(self) -> torch.nn.Module:
        with torch.device("meta"):
            return self.build().eval()

    def load(self, base: Checkpoint | HollowCheckpoint, dtype: torch.dtype) -> torch.nn.Module:
        model = self.build().to(dtype=dtype)
        own = model.state_dict()
        model.load_state_dict({name: base.read(name) for name in base.names if name in own}, strict=False)
        return model.eval()

    def live_names(self, stored: Sequence[str], skeleton: torch.nn.Module) -> dict[str, str]:
        return {name: name for name in stored}

    def write_config(self, folder: Path, dtype: torch.dtype) -> None:
        return  # a bare module is its code


def tensor_map(architecture: Architecture, stored: Sequence[str], source: str) -> TensorMap:
    """Return which stored tensor becomes which tensor of the live model.

    Args:
        architecture: of the model.
        stored: names of all tensors of a checkpoint.
        source: the checkpoint's name, for messages.

    Raises:
        MismatchError: the model needs a tensor that is not stored, or a stored one has no place in the model.
    """
    skeleton = architecture.skeleton()
    tensors = _persistent(skeleton)
    first_name: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_name.setdefault(id(tensor), name)
    renamed = architecture.live_names(stored, skeleton)
    by_tensor: dict[str, list[str]] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    for name in stored:
        found = tensors.get(renamed[name])
        if found is not None:
            by_tensor.setdefault(first_name[id(found)], []).append(name)
        else:
            (ignored if IGNORED.search(name) else unknown).append(name)
    needed = list(dict.fromkeys(first_name.values()))
    missing = [name for name in needed if name not in by_tensor]
    if unknown or missing:
        lines = [f"{source} does not fit its own architecture ({architecture.description['class']}):"]
        lines += [f"  missing: {name}" for name in missing] + [f"  no place for: {name}" for name in unknown]
        raise MismatchError("\n".join(lines))
    live: dict[str, str] = {}
    tied: dict[str, str] = {}
    for name in needed:
        chosen = next((stored_name for stored_name in by_tensor[name] if renamed[stored_name] == name), by_tensor[name][0])
        live[chosen] = name
        tied.update({other: chosen for other in by_tensor[name] if other != chosen})
    stored_as = {to: name for name, to in live.items()}
    copies = {name: stored_as[first_name[id(tensor)]] for name, tensor in tensors.items() if first_name[id(tensor)] != name}
    trainable = {name for name, _ in skeleton.named_parameters()}
    return TensorMap(live, tied, copies, tuple(ignored), frozenset(name for name, to in live.items() if to in trainable))


def _persistent(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors of the state dict by name, tied ones under every name, as the very objects the module holds."""
    kept = set(model.state_dict(keep_vars=True))
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in kept:
            tensors[name] = parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in kept:
            tensors[name] = buffer
    return tensors


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{folder} has no config.json, so it is no Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{file} should hold a JSON object, it holds {type(data).__name__}")
    return data


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and notices for the length of a block; what was set before comes back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
