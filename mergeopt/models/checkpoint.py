"""One model's named tensors on disk: safetensors only, lazy, read-only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mergeopt.errors import SourceError

__all__ = ["Checkpoint", "TensorSpec"]

HUB_PREFIX = "hf://"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


class Checkpoint:
    """The tensors of one model: a Hugging Face folder (one file or sharded), or a bare safetensors file.

    Args:
        path: the folder or file, or `hf://owner/name[@revision]` for a model of the hub (only then is anything fetched).

    Raises:
        SourceError: nothing is there, a file is damaged or lies about its contents, or weights exist only as pickle.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.place = _fetch(self.path) if self.path.startswith(HUB_PREFIX) else Path(path)
        self._files = _files(self.place, self.path)
        self._where: dict[str, Path] = {}
        self._specs: dict[str, TensorSpec] = {}
        for file in self._files:
            self._read_header(file)
        if not self._specs:
            raise SourceError(f"{self.path} holds no tensors")

    @property
    def folder(self) -> Path | None:
        """The Hugging Face folder, None for a bare file."""
        return self.place if self.place.is_dir() else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._specs))

    def spec(self, name: str) -> TensorSpec:
        """Return shape and element type of a tensor."""
        return self._specs[name]

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one tensor, in its own element type.

        Raises:
            SourceError: the file has changed or gone since it was opened.
        """
        file = self._where[name]
        try:
            with safe_open(file, framework="pt", device=str(device)) as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"cannot read the tensor {name!r} of {file}: {error}") from error
        return tensor

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all tensors; the same for a sharded and an unsharded copy."""
        digest = hashlib.sha256()
        for name in self.names:
            spec = self._specs[name]
            digest.update(json.dumps([name, str(spec.dtype), list(spec.shape)]).encode())
            digest.update(self.read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    part = handle.get_slice(name)
                    if name in self._specs:
                        raise SourceError(
                            f"the tensor {name!r} stands in two files of {self.path}: {self._where[name].name} and {file.name}"
                        )
                    self._specs[name] = TensorSpec(tuple(part.get_shape()), _dtype(part.get_dtype(), name, file))
                    self._where[name] = file
        except SafetensorError as error:
            raise SourceError(f"{file} is no whole safetensors file ({error}); copy or download it again") from error
        except OSError as error:
            raise SourceError(f"cannot open {file}: {error}") from error


def _files(place: Path, named: str) -> list[Path]:
    if place.is_file():
        if place.suffix in PICKLED:
            raise SourceError(_pickle_message(named, place.name))
        return [place]
    if not place.is_dir():
        hint = f"; for a model of the hub write {HUB_PREFIX}{named}" if named.count("/") == 1 and not named.startswith((".", "/")) else ""
        raise SourceError(f"no such folder or file: {named} (expected a Hugging Face model folder or a .safetensors file){hint}")
    if (place / INDEX).is_file():
        return _shards(place)
    if (place / SINGLE).is_file():
        return [place / SINGLE]
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickled = sorted(file.name for file in place.iterdir() if file.suffix in PICKLED)
    if pickled and not found:
        raise SourceError(_pickle_message(named, pickled[0]))
    raise SourceError(
        f"{named} holds no {SINGLE} and no {INDEX}; it holds {', '.join(sorted(f.name for f in place.iterdir())[:8]) or 'nothing'}"
    )


def _shards(place: Path) -> list[Path]:
    index = place / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is no shard index: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise SourceError(f"{index} names a shard outside its folder: {name!r}")
        if not (place / name).is_file():
            raise SourceError(f"{index} names the shard {name}, which is missing; download it again")
    return [place / name for name in names]


def _dtype(code: str, name: str, file: Path) -> torch.dtype:
    if code not in DTYPES:
        raise SourceError(
            f"the tensor {name!r} of {file} has the type {code}, which cannot be merged (quantized?); dequantize the model first"
        )
    return DTYPES[code]


def _pickle_message(named: str, file: str) -> str:
    return f"{named} holds its weights as a pickle ({file}), which can run code and is refused; save the model as safetensors first"


def _fetch(named: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    identifier, _, revision = named.removeprefix(HUB_PREFIX).partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(identifier, revision=revision or None, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"cannot fetch {named} from the hub and it is not cached here: {reason}") from error
