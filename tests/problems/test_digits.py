from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mergeopt import registry
from mergeopt.errors import ConfigError, PluginError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeMaterials
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.task import Objective, Part, Records
from mergeopt_problems.digits import TASKS, digits, trained_digits
from mergeopt_problems.digits_training import Settings

CPU = torch.device("cpu")
QUICK = Settings(base_epochs=1, expert_epochs=1, batch=450)


def accuracies(path: str, materials: MergeMaterials, part: Part) -> dict[str, float]:
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    memo: dict[object, Records] = {}
    for objective in materials.objectives:
        objective.check(model)
    return {objective.info.name: objective.score(model, part, CPU, memo).value for objective in materials.objectives}


def test_experts_pull_apart(digits_materials: MergeMaterials) -> None:
    """Each expert beats the base and every other expert on its own task and falls below the base on the others."""
    for part in ("search", "report"):
        base = accuracies(digits_materials.base, digits_materials, part)
        assert all(0.7 < value < 0.92 for value in base.values())
        experts = {name: accuracies(path, digits_materials, part) for name, path in digits_materials.experts.items()}
        for name, own in experts.items():
            assert own[name] > max([0.83, base[name], *(other[name] for key, other in experts.items() if key != name)])
            assert all(0.4 < value < base[task] for task, value in own.items() if task != name)


def test_materials(digits_materials: MergeMaterials) -> None:
    """The problem is registered, in the order of its tasks, with objectives that keep the contract and measure disjoint parts."""
    assert registry.load("problems", "digits") is digits
    assert tuple(digits_materials.experts) == TASKS
    for objective in digits_materials.objectives:
        assert isinstance(objective, Objective)
        assert isinstance(objective, TaskObjective)
        assert objective.parts == ("search", "report")
        assert [len(objective.task.items(part)) for part in objective.parts] == [450, 447]
    fingerprints = [str(objective.fingerprint) for objective in digits_materials.objectives]
    assert len(set(fingerprints)) == 4


def test_folders_are_complete(digits_materials: MergeMaterials) -> None:
    """Each folder holds model and image processor, and the processor prepares raw pixels as the task does."""
    from sklearn.datasets import load_digits

    folder = digits_materials.experts["upright"]
    load: Any = AutoImageProcessor.from_pretrained
    processor = load(folder, backend="pil")
    images = load_digits().images[:, :, :, None]
    prepared = processor(images=list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    objective = digits_materials.objectives[0]
    assert isinstance(objective, TaskObjective)
    item = objective.task.items("search")[0]["pixel_values"]
    assert any(torch.allclose(item, one, atol=1e-6) for one in prepared)
    names = {name for path in [digits_materials.base, *digits_materials.experts.values()] for name in Checkpoint(path).names}
    assert names == set(Checkpoint(folder).names)


def test_second_call_trains_nothing(cache: Path) -> None:
    """A second call answers from the cache folder in well under a second; one task less shares the rest."""
    lines: list[str] = []
    first = trained_digits(tasks=["turned"], settings=QUICK, progress=lines.append)
    assert len(lines) == 2
    start = time.perf_counter()
    assert trained_digits(tasks=["turned"], settings=QUICK, progress=lines.append).base == first.base
    assert time.perf_counter() - start < 1
    assert len(lines) == 2
    assert Path(first.base).is_relative_to(cache)
    assert sorted(path.name for path in Path(first.base).parent.iterdir()) == ["base", "turned"]


def test_training_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training twice gives the same weights bit for bit, whatever the global random state, which it leaves alone."""
    hashes = []
    for seed in (1, 2):
        monkeypatch.setenv("MERGEOPT_CACHE", str(tmp_path / str(seed)))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made = trained_digits(tasks=["mirrored"], settings=QUICK)
        assert torch.equal(before, torch.get_rng_state())
        hashes.append([Checkpoint(made.base).hash, Checkpoint(made.experts["mirrored"]).hash])
    assert hashes[0] == hashes[1]


@pytest.mark.usefixtures("cache")
def test_settings_name_the_folder() -> None:
    """Another training is kept in another folder."""
    first = trained_digits(tasks=["turned"], settings=QUICK)
    second = trained_digits(tasks=["turned"], settings=Settings(base_epochs=1, expert_epochs=1, batch=450, expert_rate=2e-3))
    assert Path(first.base).parent != Path(second.base).parent


def test_processes_may_race(cache: Path) -> None:
    """Two processes that train at the same moment both get whole folders, and leave nothing else behind."""
    code = (
        "from mergeopt_problems.digits import trained_digits; from mergeopt_problems.digits_training import Settings\n"
        "from mergeopt.models.checkpoint import Checkpoint\n"
        "m = trained_digits(tasks=['turned'], settings=Settings(base_epochs=1, expert_epochs=1, batch=450))\n"
        "print(Checkpoint(m.experts['turned']).hash)"
    )
    racers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [racer.communicate(timeout=120)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    (folder,) = (cache / "digits").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["base", "turned"]


def test_what_cannot_be_asked() -> None:
    """Unknown, repeated or no tasks and unknown metrics are errors before any training."""
    with pytest.raises(ConfigError, match="did you mean 'turned'"):
        digits(tasks=["turnd"])
    with pytest.raises(ConfigError, match="twice"):
        digits(tasks=["turned", "turned"])
    with pytest.raises(ConfigError, match="known: upright"):
        digits(tasks=[])
    with pytest.raises(PluginError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        digits(metric="acuracy")
