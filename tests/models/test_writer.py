from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from mergeopt.errors import ExportError
from mergeopt.models.checkpoint import Checkpoint, TensorSpec
from mergeopt.models.writer import TensorWriter
from tests.tiny_models import tiny_vit, write_folder

INDEX = "model.safetensors.index.json"


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def some_tensors() -> dict[str, torch.Tensor]:
    """Return tensors of all types and odd sizes, in no order."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.bool, torch.bfloat16, torch.int64, torch.uint8, torch.float16, torch.int32, torch.float64, torch.int8]
    shapes: list[tuple[int, ...]] = [(3, 5), (), (7,), (0,), (1, 1, 1)]
    return {
        f"{'zyxwvutsr'[i]}.é{j}": (100 * torch.randn(shape, generator=generator)).to(kind)
        for i, kind in enumerate(kinds)
        for j, shape in enumerate(shapes)
    }


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    """Written one by one and in any order, tensors give the very bytes that safetensors' own writer gives."""
    tensors = some_tensors()
    writer = TensorWriter(tmp_path, specs_of(tensors))
    for name in sorted(tensors, reverse=True):
        writer.write(name, tensors[name])
    writer.check()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model.safetensors"]


def test_shards_are_a_model_that_transformers_loads(tmp_path: Path) -> None:
    """Files of limited size with their index are read as the model they were made of; one tensor may be larger than the limit."""
    folder = write_folder(tiny_vit, tmp_path / "one", 0)
    tensors = load_file(folder / "model.safetensors")
    many = tmp_path / "many"
    many.mkdir()
    writer = TensorWriter(many, specs_of(tensors), shard=2000)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.check()
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in sorted(many.glob("*.safetensors"))]
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert len(sizes) > 5
    assert max(sizes) == largest > 2000
    assert Checkpoint(many).hash == Checkpoint(folder).hash
    index = json.loads((many / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    (many / "config.json").write_bytes((folder / "config.json").read_bytes())
    one, sharded = (AutoModelForImageClassification.from_pretrained(place).state_dict() for place in (folder, many))
    assert all(torch.equal(sharded[name], tensor) for name, tensor in one.items())


def test_what_was_not_written_is_found_out(tmp_path: Path) -> None:
    """A tensor that never came, one of another shape or type, and a byte that changed on the disk are told."""
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 2)}
    writer = TensorWriter(tmp_path, specs_of(tensors))
    with pytest.raises(ValueError, match="expected TensorSpec"):
        writer.write("a", tensors["a"].double())
    writer.write("a", tensors["a"])
    with pytest.raises(ExportError, match="1 of 2 tensors were not written, for instance b"):
        writer.check()
    writer.write("b", tensors["b"])
    writer.check()
    file = tmp_path / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ExportError, match="does not hold what was written"):
        writer.check()
