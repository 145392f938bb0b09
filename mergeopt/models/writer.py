"""Writes a model's tensors one at a time, as the safetensors files of a Hugging Face folder: none of the model need be in memory."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mergeopt.errors import ExportError
from mergeopt.models.checkpoint import DTYPES, INDEX, SINGLE, TensorSpec

__all__ = ["TensorWriter"]

SHARD = 5_000_000_000  # bytes per file, as the hub advises
PIECE = 1 << 24  # bytes read back at a time
CODES = {dtype: code for code, dtype in DTYPES.items()}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""In which types lie in a file, as safetensors itself orders them: widest first, so that every tensor is aligned."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is written: file, first byte, and what it must be."""

    file: Path
    start: int
    spec: TensorSpec


class TensorWriter:
    """Safetensors files whose headers are written first, and then their tensors in any order.

    Space for all of it is taken at once, so that a disk too small is found out before the work.

    Args:
        folder: to write into; it must exist.
        specs: shape and type of all tensors by name; files take them in this order.
        shard: most bytes of tensors per file; a larger tensor has a file of its own.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], *, shard: int = SHARD) -> None:
        self._places: dict[str, _Place] = {}
        self._sums: dict[str, int] = {}
        shards = _shards(specs, shard)
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else SINGLE.replace(".", f"-{number:05}-of-{len(shards):05}.", 1)
            self._begin(folder / file, {name: specs[name] for name in names})
        if len(shards) > 1:
            total = sum(spec.bytes for spec in specs.values())
            where = {name: self._places[name].file.name for name in specs}
            content = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
            (folder / INDEX).write_text(content + "\n", encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Args:
            name: one of the specs'.
            tensor: of its shape and type, on any device.
        """
        place = self._places[name]
        if TensorSpec(tuple(tensor.shape), tensor.dtype) != place.spec:
            raise ValueError(f"{name}: expected {place.spec}, got {tuple(tensor.shape)}, {tensor.dtype}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        with place.file.open("r+b", buffering=0) as file:
            file.seek(place.start)
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        self._sums[name] = zlib.crc32(data)

    def check(self) -> None:
        """Read everything back.

        Raises:
            ExportError: a tensor was never written, or the disk holds something else than what was.
            OSError: a file cannot be read.
        """
        missing = [name for name in self._places if name not in self._sums]
        if missing:
            raise ExportError(
                f"{len(missing)} of {len(self._places)} tensors were not written, for instance {missing[0]}; nothing was kept"
            )
        for name, place in self._places.items():
            with place.file.open("rb", buffering=0) as file:
                file.seek(place.start)
                if _sum(file, place.spec.bytes) != self._sums[name]:
                    raise ExportError(f"{place.file.name} does not hold what was written ({name}): the disk is damaged; nothing was kept")

    def _begin(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(specs, key=lambda name: (ORDER.index(CODES[specs[name].dtype]), name)):
            spec = specs[name]
            header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end, end + spec.bytes]}
            end += spec.bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.flush()
            _reserve(opened, 8 + len(text) + end)
        for name, spec in specs.items():
            self._places[name] = _Place(file, 8 + len(text) + header[name]["data_offsets"][0], spec)


def _shards(specs: Mapping[str, TensorSpec], most: int) -> list[list[str]]:
    """Return the names that share a file, in order."""
    shards: list[list[str]] = [[]]
    room = most
    for name, spec in specs.items():
        if spec.bytes > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= spec.bytes
    return shards


def _reserve(file: BinaryIO, size: int) -> None:
    """Make a file so large, taking the space on disk where the system can."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        os.truncate(file.fileno(), size)


def _sum(file: Any, size: int) -> int:
    total, buffer = 0, memoryview(bytearray(min(size, PIECE)))
    while size:
        count = file.readinto(buffer[: min(size, PIECE)])
        if not count:
            break
        total, size = zlib.crc32(buffer[:count], total), size - count
    return total
