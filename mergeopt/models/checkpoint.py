"""One model's named tensors on disk: safetensors only, lazy, read-only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from mergeopt.errors import SourceError

__all__ = ["Checkpoint", "TensorSpec"]

HUB_PREFIX = "hf://"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE = 1 << 24  # bytes hashed at a time
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

    @property
    def bytes(self) -> int:
        """Size."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: file, first byte, and what the file looked like when its header was read (size and time of last change)."""

    file: Path
    start: int
    stamp: tuple[int, int]


class Checkpoint:
    """The tensors of one model: a Hugging Face folder (one file or sharded), or a bare safetensors file.

    Tensors are read into memory of their own, one at a time, and no file stays open or mapped: a model may be larger than the memory.

    Args:
        path: the folder or file, or `hf://owner/name[@revision]` for a model of the hub (only then is anything fetched).

    Raises:
        SourceError: nothing is there, a file is damaged or lies about its contents, or weights exist only as pickle.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.place = _fetch(self.path) if self.path.startswith(HUB_PREFIX) else Path(path)
        self._files = _files(self.place, self.path)
        self._where: dict[str, _Place] = {}
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
        spec, place = self._specs[name], self._where[name]
        flat = torch.empty(spec.bytes, dtype=torch.uint8)
        with self._opened(name, place) as file:
            _fill(file, flat.numpy().data, name, place.file)
        return flat.view(spec.dtype).view(spec.shape).to(device)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all tensors; the same for a sharded and an unsharded copy."""
        digest = hashlib.sha256()
        for name in self.names:
            spec = self._specs[name]
            digest.update(json.dumps([name, str(spec.dtype), list(spec.shape)]).encode())
            for piece in self._pieces(name):
                digest.update(piece)
        return digest.hexdigest()

    def _pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces, each valid until the next."""
        left, place = self._specs[name].bytes, self._where[name]
        buffer = memoryview(bytearray(min(left, PIECE)))
        with self._opened(name, place) as file:
            while left:
                piece = buffer[: min(left, PIECE)]
                _fill(file, piece, name, place.file)
                left -= len(piece)
                yield piece

    def _opened(self, name: str, place: _Place) -> BinaryIO:
        """Return the file of a tensor, at its first byte, if it is what it was."""
        try:
            file = open(place.file, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
            found = os.fstat(file.fileno())
            file.seek(place.start)
        except OSError as error:
            raise SourceError(f"cannot read the tensor {name!r} of {place.file}: {error}") from error
        if (found.st_size, found.st_mtime_ns) != place.stamp:
            file.close()
            raise SourceError(f"cannot read the tensor {name!r} of {place.file}: the file has changed since it was opened; start again")
        return file

    def _read_header(self, file: Path) -> None:
        try:
            # As arrays: for torch the whole file would be mapped in a way that counts as memory of this process.
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    part = handle.get_slice(name)
                    if name in self._specs:
                        raise SourceError(
                            f"the tensor {name!r} stands in two files of {self.path}: {self._where[name].file.name} and {file.name}"
                        )
                    self._specs[name] = TensorSpec(tuple(part.get_shape()), _dtype(part.get_dtype(), name, file))
            self._where |= _places(file)
        except SafetensorError as error:
            raise SourceError(f"{file} is no whole safetensors file ({error}); copy or download it again") from error
        except OSError as error:
            raise SourceError(f"cannot open {file}: {error}") from error


def _places(file: Path) -> dict[str, _Place]:
    """Return where the tensors of a file lie whose header has been found to be whole."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
        found = os.fstat(opened.fileno())
    stamp = (found.st_size, found.st_mtime_ns)
    return {name: _Place(file, 8 + length + at["data_offsets"][0], stamp) for name, at in header.items() if name != "__metadata__"}


def _fill(file: BinaryIO, buffer: memoryview, name: str, path: Path) -> None:
    """Fill a buffer from a file; raise `SourceError` where the file ends before."""
    done = 0
    try:
        while done < len(buffer):
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not count:
                raise SourceError(f"cannot read the tensor {name!r} of {path}: the file ends before it does; copy or download it again")
            done += count
    except OSError as error:
        raise SourceError(f"cannot read the tensor {name!r} of {path}: {error}") from error


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
