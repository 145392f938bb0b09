"""Models and data that cannot be used: a message that names them, status 2, and nothing written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from tests.faults.commands import Commands, listing, refused, write

WEIGHTS = "model.safetensors"
HEAD = "classifier.weight"
NORMALISED = {"mean": 0.3, "std": 0.35}


def data_file(path: Path, **splits: int) -> None:
    """Write a data file with so many 8x8 pictures per split."""
    rng = np.random.default_rng(0)
    rows = [(split, rng.integers(0, 255, 64, dtype=np.uint8).tobytes(), i % 10) for split, n in splits.items() for i in range(n)]
    table = {"split": [r[0] for r in rows], "pixels": [r[1] for r in rows], "label": [r[2] for r in rows]}
    Dataset.from_dict(table).to_parquet(str(path))


def objective(**data: Any) -> dict[str, Any]:
    """Return an objective on a data file of 8x8 pictures."""
    source = {"path": "data.parquet", "image": "pixels", "shape": [8, 8], "search": "val", **data}
    return {"name": "own", "task": "image_classification", "data": source, "preprocess": NORMALISED}


def truncate(file: Path) -> None:
    """Keep half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lie(file: Path) -> None:
    """Make the header of a safetensors file point beyond its end."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header[HEAD]["data_offsets"] = [offset + 10**6 for offset in header[HEAD]["data_offsets"]]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def overlap(file: Path) -> None:
    """Make two tensors of a safetensors file share their bytes."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    twins = next((a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"])
    header[twins[0]]["data_offsets"] = header[twins[1]]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def endless_header(file: Path) -> None:
    """Claim a header of 2^60 bytes."""
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def pickle(file: Path) -> None:
    """Keep the weights as a pickle only."""
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def put(value: float) -> Callable[[Path], None]:
    """Return what puts a value into a tensor."""

    def change(file: Path) -> None:
        tensors = load_file(file)
        tensors[HEAD].view(-1)[3] = value
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def widen(file: Path) -> None:
    """Give the head one class more."""
    tensors = load_file(file)
    tensors[HEAD] = torch.cat([tensors[HEAD], tensors[HEAD][:1]])
    save_file(tensors, file, metadata={"format": "pt"})


def lose(file: Path) -> None:
    """Leave a tensor out."""
    tensors = load_file(file)
    del tensors[HEAD]
    save_file(tensors, file, metadata={"format": "pt"})


def remove(file: Path) -> None:
    """Delete a file."""
    file.unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "is no whole safetensors file"),
    (lie, "is no whole safetensors file"),
    (overlap, "is no whole safetensors file"),
    (endless_header, "is no whole safetensors file"),
    (pickle, "holds its weights as a pickle (pytorch_model.bin), which can run code and is refused"),
    (put(float("nan")), "NaN or infinite"),
    (put(float("inf")), "NaN or infinite"),
    (widen, f"{HEAD}: shape [10, 64] in the base, [11, 64] in expert 'turned'"),
    (lose, f"{HEAD}: missing in expert 'turned'"),
    (remove, "holds no model.safetensors"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[getattr(d, "__name__", "") + said[:10] for d, said in DAMAGES])
def test_a_damaged_model_is_refused_by_run_and_merge(
    mergeopt: Commands, tmp_path: Path, models: Path, damage: Callable[[Path], None], said: str
) -> None:
    """Weights that are cut off, lie, are pickled, not finite or of another shape are refused by name, and nothing is written."""
    damage(models / "turned" / WEIGHTS)
    sources: dict[str, Any] = {"problem": None, "base": "models/base", "experts": {"upright": "models/upright", "turned": "models/turned"}}
    data_file(tmp_path / "data.parquet", val=20)
    write(tmp_path, **sources, merge={"operator": "task_arithmetic"}).rename(tmp_path / "merge.yaml")
    write(tmp_path, **sources, objectives=[objective()])
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "run", "run.yaml"), said, "turned")
    refused(mergeopt(tmp_path, "merge", "merge.yaml", "--out", "merged"), said, "turned")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("models/absent", "no such folder or file: models/absent (expected a Hugging Face model folder or a .safetensors file)"),
        ("owner/name", "for a model of the hub write hf://owner/name"),
        ("hf://owner/name", "cannot fetch hf://owner/name from the hub and it is not cached here"),
        ("hf://not a name", "cannot fetch hf://not a name"),
        ("models/base/model.safetensors", "is a bare safetensors file, so nothing says what model it belongs to"),
        ("models/base/config.json", "is no whole safetensors file"),
        ("models", "holds no model.safetensors"),
    ],
)
def test_a_base_that_is_not_there_is_refused(mergeopt: Commands, tmp_path: Path, models: Path, base: str, said: str) -> None:
    """A missing folder, a hub id without a network and a file that is no model folder are refused by name."""
    write(tmp_path, problem=None, base=base, experts=["models/upright", "models/turned"], objectives=[objective()])
    data_file(tmp_path / "data.parquet", val=20)
    before = listing(tmp_path)
    refused(mergeopt(tmp_path, "run", "run.yaml"), said)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, None),
        ({"search": "test"}, "data.parquet has no split 'test'; did you mean 'rest'? known: rest, val"),
        ({"report": "val"}, "search and report are both 'val'"),
        ({"path": "absent.parquet"}, "no such file or folder: absent.parquet"),
        ({"path": "empty.parquet"}, "val"),
        ({"image": "pixel"}, "has no column 'pixel' (image); did you mean 'pixels'?"),
        ({"serch": "val"}, "data: unknown key 'serch'; did you mean 'search'?"),
        ({"shape": [9, 9]}, "data.parquet, split 'val', row 0"),
        ({"search": None}, "data: the key 'search' is missing"),
    ],
)
def test_data_that_cannot_be_used_is_refused(mergeopt: Commands, tmp_path: Path, data: dict[str, Any], said: str | None) -> None:
    """A missing or an empty split, a missing file or column, and one split for both parts are refused; the same file runs without."""
    data_file(tmp_path / "data.parquet", val=20, rest=20)
    data_file(tmp_path / "empty.parquet", rest=20)
    write(tmp_path, objectives=["upright", objective(**data)], budget=2, strategy="random")
    before = listing(tmp_path)
    done = mergeopt(tmp_path, "run", "run.yaml")
    if said is None:
        assert done.status == 0, done.err
        return
    refused(done, said)
    assert listing(tmp_path) == before


def test_an_empty_split_of_a_folder_is_refused(mergeopt: Commands, tmp_path: Path) -> None:
    """A split whose file has no rows is refused by the name of the file."""
    data_file(tmp_path / "some.parquet", val=4)
    Dataset.from_dict({"pixels": [], "label": []}).to_parquet(str(tmp_path / "none.parquet"))
    data = {"path": {"val": "none.parquet", "test": "some.parquet"}, "search": "val", "image": "pixels", "shape": [8, 8]}
    write(tmp_path, objectives=["upright", objective(**data)])
    refused(mergeopt(tmp_path, "run", "run.yaml"), "none.parquet holds no rows")
    assert not (tmp_path / "run").exists()
