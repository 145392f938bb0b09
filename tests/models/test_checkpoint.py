from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeopt.errors import SourceError
from mergeopt.models.checkpoint import Checkpoint
from tests.tiny_models import tiny_vit, write_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def craft(file: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write a safetensors file by hand: length, header, bytes."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_folder(tiny_vit, tmp_path / "single", 0)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = write_folder(tiny_vit, tmp_path / "sharded", 0, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_sharded_copy_is_the_same_checkpoint(single: Path, sharded: Path) -> None:
    """One file and many shards of the same weights give equal names, specs, tensors and hash."""
    one, many = Checkpoint(single), Checkpoint(sharded)
    assert one.names == many.names == tuple(sorted(one.names))
    assert all(one.spec(name) == many.spec(name) for name in one.names)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names)
    assert one.hash == many.hash


def test_what_is_read_is_what_safetensors_reads(single: Path) -> None:
    """Names, shapes, types and values are those of safetensors' own reader, for a folder and for its bare file."""
    expected = load_file(single / WEIGHTS)
    for checkpoint in (Checkpoint(single), Checkpoint(single / WEIGHTS)):
        assert set(checkpoint.names) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.spec(name).shape == tuple(tensor.shape)
            assert checkpoint.spec(name).dtype == tensor.dtype
            assert checkpoint.spec(name).elements == tensor.numel()
            assert torch.equal(checkpoint.read(name), tensor)
    assert Checkpoint(single).folder == single
    assert Checkpoint(single / WEIGHTS).folder is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
def test_one_bit_changes_the_hash(tmp_path: Path, dtype: torch.dtype) -> None:
    """Flipping a single bit of the weights, of any element type, gives another hash; writing the same again does not."""
    tensors = {"a": torch.ones(3, 5).to(dtype), "scalar": torch.ones(()).to(dtype), "none": torch.ones(0, 2).to(dtype)}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    before = Checkpoint(file).hash
    save_file(tensors, file)
    assert Checkpoint(file).hash == before
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert Checkpoint(file).hash != before


def test_names_and_shapes_enter_the_hash(tmp_path: Path) -> None:
    """The same bytes under another name or in another shape are another model."""
    numbers = torch.arange(6.0)
    hashes = set()
    for i, (name, shape) in enumerate([("a", (6,)), ("b", (6,)), ("a", (2, 3)), ("a", (3, 2))]):
        save_file({name: numbers.view(shape).clone()}, tmp_path / f"{i}.safetensors")
        hashes.add(Checkpoint(tmp_path / f"{i}.safetensors").hash)
    assert len(hashes) == 4


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(single: Path, keep: int) -> None:
    """A file that ends in its length, its header or its data is named and refused when it is opened."""
    file = single / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model\.safetensors is no whole safetensors file .*download it again"):
        Checkpoint(single)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": entry("F32", [2], 8, 16)}, bytes(8), id="starts past its data"),
        pytest.param({"a": entry("F32", [2], 0, 4)}, bytes(4), id="too few bytes for its shape"),
        pytest.param({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, bytes(8), id="two tensors on the same bytes"),
        pytest.param({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, bytes(20), id="a hole between tensors"),
        pytest.param({"a": entry("F32", [2], 0, 8)}, bytes(12), id="bytes that belong to nothing"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), id="no offsets at all"),
        pytest.param({"a": entry("F32", [2**62, 4], 0, 8)}, bytes(8), id="a shape that overflows"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    """Offsets that do not fit the data or the shapes are refused when the file is opened."""
    file = craft(tmp_path / "lying.safetensors", header, data)
    with pytest.raises(SourceError, match=r"lying\.safetensors is no whole safetensors file"):
        Checkpoint(file)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    """A length field of exabytes is refused, not allocated."""
    file = tmp_path / "long.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(SourceError, match="no whole safetensors file"):
        Checkpoint(file)


@pytest.mark.parametrize(("code", "width"), [("F8_E4M3", 1), ("U16", 2), ("U32", 4)])
def test_types_that_cannot_be_merged_are_refused(tmp_path: Path, code: str, width: int) -> None:
    """A tensor of an element type outside the table is refused by name with what to do."""
    file = craft(tmp_path / "q.safetensors", {"w": entry(code, [8], 0, 8 * width)}, bytes(8 * width))
    with pytest.raises(SourceError, match=rf"'w' of .*q\.safetensors has the type {code}, .*dequantize"):
        Checkpoint(file)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """When the index names a shard that is not there, the message names it."""
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SourceError, match=rf"names the shard {shard.name}, which is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("where", ["../single/model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_cannot_leave_its_folder(single: Path, sharded: Path, where: str) -> None:
    """A shard outside the folder is refused, whether it exists or not."""
    index = sharded / INDEX
    data = json.loads(index.read_text())
    name = next(iter(data["weight_map"]))
    data["weight_map"][name] = where
    index.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="a shard outside its folder"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}", '{"weight_map": {"a": ["b"]}}'])
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    """An index that is no index is refused by name."""
    (sharded / INDEX).write_text(text)
    with pytest.raises(SourceError, match=r"index\.json"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    """The same name in two shards is ambiguous and refused."""
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(2)}, second)
    with pytest.raises(SourceError, match=rf"'{name}' stands in two files"):
        Checkpoint(sharded)


def test_pickles_are_refused(tmp_path: Path) -> None:
    """A folder whose weights exist only as a pickle, and a .bin file, are refused without being opened."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    for place in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(SourceError, match=r"as a pickle \(pytorch_model\.bin\), which can run code and is refused"):
            Checkpoint(place)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """A folder without weights says what it looked for and what is there."""
    with pytest.raises(SourceError, match=r"holds no model\.safetensors and no .*; it holds nothing"):
        Checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(SourceError, match=r"it holds README\.md"):
        Checkpoint(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    """A whole safetensors file that holds nothing is refused."""
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="holds no tensors"):
        Checkpoint(tmp_path / "none.safetensors")


def test_a_missing_folder_hints_at_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing path that reads like a hub id says how to ask for the hub; one that does not, says nothing of it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"no such folder or file: owner/name .*for a model of the hub write hf://owner/name"):
        Checkpoint("owner/name")
    for plain in ("models", "./models/base", str(tmp_path / "missing")):
        with pytest.raises(SourceError, match="no such folder or file") as caught:
            Checkpoint(plain)
        assert "hf://" not in str(caught.value)


def test_a_hub_id_without_network_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id that is not cached, offline, is a SourceError that names it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for named in ("hf://owner/name", "hf://owner/name@v1", "hf://not a valid id"):
        with pytest.raises(SourceError, match=rf"cannot fetch {named} from the hub"):
            Checkpoint(named)


def test_a_file_that_vanishes_is_named(single: Path) -> None:
    """Reading a tensor of a file that has gone since it was opened is a SourceError naming both."""
    checkpoint = Checkpoint(single)
    (single / WEIGHTS).unlink()
    with pytest.raises(SourceError, match=rf"cannot read the tensor '{checkpoint.names[0]}' of .*model\.safetensors"):
        checkpoint.read(checkpoint.names[0])


def test_a_file_that_changed_since_is_refused(single: Path) -> None:
    """A tensor is never read from a file that is not the one whose header was read."""
    checkpoint, file = Checkpoint(single), single / WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor + 1 for name, tensor in tensors.items()} | {"more": torch.zeros(3)}, file)
    with pytest.raises(SourceError, match="has changed since it was opened"):
        checkpoint.read(checkpoint.names[0])
    with pytest.raises(SourceError, match="has changed since it was opened"):
        _ = checkpoint.hash


def test_what_is_read_is_memory_of_its_own(single: Path) -> None:
    """A tensor that was read stays what it was when its file is written over, and can be written to without the file noticing."""
    checkpoint, file = Checkpoint(single), single / WEIGHTS
    before, name = file.read_bytes(), checkpoint.names[0]
    tensor = checkpoint.read(name)
    kept = tensor.clone()
    tensor += 1
    assert file.read_bytes() == before
    file.write_bytes(bytes(len(before)))
    assert torch.equal(tensor, kept + 1)
