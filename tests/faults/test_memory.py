"""Memory that runs out while candidates are made and scored: real limits, and code that really allocates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from mergeopt.strategy import Status
from mergeopt.study.run import Run
from tests.faults.commands import Commands, refused, write
from tests.faults.repeats import everything
from tests.tiny_models import write_folders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is allocated on Linux alone")

ITEMS = 1600
ROOM = 180 << 20
"""By how much the memory of a command may grow: more than it takes to score a few hundred of the pictures at once, less than for all."""
OWN = """
import torch


def bias(model, items, device):
    return float(model.classifier.bias.sum())


def hungry(model, items, device):
    bias = float(model.classifier.bias.detach().double().sum())
    if int(abs(bias) * 1e6) % 2:
        torch.empty(1 << 30)
    return bias


def hungry_in_numpy(model, items, device):
    import numpy as np

    bias = float(model.classifier.bias.detach().double().sum())
    if int(abs(bias) * 1e6) % 2:
        np.empty(1 << 30)
    return bias
"""


def vit() -> PreTrainedModel:
    """Return a ViT whose activations outweigh its weights."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=1024,
        id2label=dict(enumerate("abcde")),
    )
    return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, `own.py` and a data set of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    write_folders(vit, folder)
    (folder / "own.py").write_text(OWN)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, 256, dtype=np.uint8).tobytes() for _ in range(ITEMS)]
    table = {"image": rows, "label": rng.integers(0, 5, ITEMS).tolist(), "split": ["val"] * ITEMS}
    Dataset.from_dict(table).to_parquet(str(folder / "noise.parquet"))
    return folder


def run_file(folder: Path, pictures: Path, *, batch: int, **changes: Any) -> Path:
    """Write a search over the pictures that scores so many at a time."""
    objective = {
        "name": "noise",
        "task": "image_classification",
        "data": {"path": str(pictures / "noise.parquet"), "search": "val", "split_column": "split", "shape": [16, 16]},
        "preprocess": {"mean": 0.5, "std": 0.5},
        "metric": "cross_entropy",
        "batch": batch,
    }
    sources = {"base": str(pictures / "base"), "experts": {name: str(pictures / name) for name in ("e0", "e1")}}
    return write(folder, **{"problem": None, **sources, "objectives": [objective], "strategy": "random", "budget": 5, **changes})


def test_fewer_items_are_scored_at_a_time_where_memory_is_short(mergeopt: Commands, pictures: Path, tmp_path: Path) -> None:
    """A search whose batches do not fit halves them and says so; from then on, and resumed where memory is plenty, it has the bits of a
    search with the smaller batch."""
    run_file(tmp_path / "short", pictures, batch=ITEMS)
    done = mergeopt(tmp_path / "short", "run", "run.yaml", "--budget", 3, memory=ROOM)
    assert done.status == 0, done.err
    short = Run.open(tmp_path / "short" / "run")
    assert all(trial.ok for trial in short.trials)
    begins = [reduced["from_trial"] for reduced in short.header["reduced"]]
    batches = [reduced["items"]["noise"] for reduced in short.header["reduced"]]
    assert begins[0] == 0
    assert begins[-1] < len(short.trials) - 1
    assert set(batches) <= {ITEMS // 2**n for n in range(1, 8)}
    told = zip(begins, batches, strict=True)
    said = [f"memory was short: from trial {begin} on, noise is scored {batch} items at a time" for begin, batch in told]
    assert list(short.warnings) == said
    assert mergeopt(tmp_path / "short", "run", "run.yaml", "--resume").status == 0
    assert Run.open(tmp_path / "short" / "run").header["reduced"] == short.header["reduced"]
    run_file(tmp_path / "small", pictures, batch=batches[-1])
    assert mergeopt(tmp_path / "small", "run", "run.yaml").status == 0
    assert Run.open(tmp_path / "small" / "run").header.get("reduced") is None
    pairs = list(zip(everything(tmp_path / "short" / "run"), everything(tmp_path / "small" / "run"), strict=True))
    assert [one[:3] for one, _ in pairs] == [other[:3] for _, other in pairs]
    assert [one[6:] for one, _ in pairs[begins[-1] :]] == [other[6:] for _, other in pairs[begins[-1] :]]


@pytest.mark.parametrize("function", ["hungry", "hungry_in_numpy"])
def test_what_never_fits_fails_its_trial(mergeopt: Commands, pictures: Path, tmp_path: Path, function: str) -> None:
    """An objective that allocates more than there is for some candidates fails those alone, in the allocator's words."""
    objective = {"name": "own", "function": str(pictures / f"own.py:{function}"), "direction": "minimize"}
    run_file(tmp_path, pictures, batch=100, objectives=[objective], budget=12)
    done = mergeopt(tmp_path, "run", "run.yaml", memory=ROOM)
    assert done.status == 0, done.err
    run = Run.open(tmp_path / "run")
    failed = [trial for trial in run.trials if not trial.ok]
    assert run.evaluations == 12
    assert 0 < len(failed) < 12
    assert {trial.status for trial in failed} == {Status.FAILED}
    said = "can't allocate memory" if function == "hungry" else "Unable to allocate 8.00 GiB"
    for trial in failed:
        assert (trial.error or "").startswith("objective 'own': there is not enough memory to score it: ")
        assert said in (trial.error or "")
    assert run.header["reduced"][-1]["candidates"] == 1
    assert "Traceback" not in done.err


def test_a_merge_that_never_fits_fails_its_trial(mergeopt: Commands, pictures: Path, tmp_path: Path) -> None:
    """An operator that allocates more than there is for some candidates fails those alone, and what it left is not taken for weights."""
    (tmp_path / "rule.py").write_text(
        "import torch\n"
        "from mergeopt import Param, merge_operator\n\n\n"
        "@merge_operator('hungry', share=Param.real(0.5, low=0.0, high=1.0, search=(0.0, 1.0)))\n"
        "def hungry(deltas, *, share):\n"
        "    if share > 0.5:\n"
        "        torch.empty(1 << 30)\n"
        "    return share * deltas.sum(dim=0)\n"
    )
    merge = {"operator": "rule.py:hungry"}
    bias = {"name": "own", "function": str(pictures / "own.py:bias"), "direction": "minimize"}
    run_file(tmp_path, pictures, batch=100, objectives=[bias], merge=merge, budget=12)
    done = mergeopt(tmp_path, "run", "run.yaml", memory=ROOM)
    assert done.status == 0, done.err
    assert mergeopt(tmp_path, "run", "run.yaml", "--out", "plenty", memory=12 << 30).status == 0
    run, plenty = Run.open(tmp_path / "run"), Run.open(tmp_path / "plenty")
    failed = [trial.number for trial in run.trials if not trial.ok]
    assert 0 < len(failed) < 12
    assert all("can't allocate memory" in (run.trials[number].error or "") for number in failed)
    assert all(trial.ok for trial in plenty.trials)
    for one, other in zip(run.trials, plenty.trials, strict=True):
        assert not one.ok or one.scores["search"]["own"].value == other.scores["search"]["own"].value


def test_torch_says_so_in_these_words() -> None:
    """What torch's allocator raises on this machine is told as a shortage of memory, and other errors are not."""
    from mergeopt.evaluation.shortage import Shortage, attempt, is_out_of_memory

    found = attempt(lambda: torch.empty(1 << 55))
    assert isinstance(found, Shortage)
    assert "allocate" in found.said
    assert isinstance(attempt(lambda: np.empty(1 << 55)), Shortage)
    assert attempt(lambda: 3) == 3
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attempt(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_a_disk_without_room_for_the_stack_is_told(mergeopt: Commands, pictures: Path, tmp_path: Path) -> None:
    """Base and experts that are to be kept in a file, on a disk that does not hold it, end the command with what can be done."""
    run_file(tmp_path, pictures, batch=100, memory={"stack": "file", "folder": "stacks"})
    done = mergeopt(tmp_path, "run", "run.yaml", limit=1_000_000)
    refused(done, "of base and experts as they are merged to", "File too large", "name another folder with memory: {folder: ...}")
    assert mergeopt(tmp_path, "run", "run.yaml", "--out", "mapped").status == 0
    assert list((tmp_path / "stacks").iterdir()) == []
    run_file(tmp_path / "plain", pictures, batch=100)
    assert mergeopt(tmp_path / "plain", "run", "run.yaml").status == 0
    assert everything(tmp_path / "mapped") == everything(tmp_path / "plain" / "run")


def test_memory_that_ends_a_command_is_told(mergeopt: Commands, pictures: Path, tmp_path: Path) -> None:
    """Where there is not even enough to begin, the command ends with status 1 and one line, without a traceback."""
    run_file(tmp_path, pictures, batch=100)
    done = mergeopt(tmp_path, "run", "run.yaml", memory=2 << 20)
    assert done.status == 1, done
    assert "mergeopt: memory ran out" in done.err
    assert "Traceback" not in done.err
