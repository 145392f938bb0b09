"""Exports as transformers would write them, and of models that do not fit into memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from mergeopt.errors import CandidateError
from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.architecture import quiet_transformers
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.pool import Pool
from mergeopt.study.export import export_model
from tests.evaluation.conftest import size
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit, write_folder, write_folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("build", [tiny_vit, tiny_bert, tiny_gpt2, tiny_llama])
def test_an_export_is_what_transformers_would_save(build: Callable[[], PreTrainedModel], dtype: str, tmp_path: Path) -> None:
    """Weights and configurations, written without the model in memory, have the bytes that `save_pretrained` gives of the scored model."""
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    problem = MergeProblem(Pool(*write_folders(build, tmp_path)), "linear", [objective], dtype=dtype, device="cpu")
    recipe = problem.decode(np.array([0.3, 0.6]))
    export_model(problem.pool, recipe, tmp_path / "made")
    with quiet_transformers():
        problem.evaluator.model(recipe).save_pretrained(tmp_path / "expected")  # type: ignore[operator]
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "made" / file.name).read_bytes() == file.read_bytes(), file.name


def test_weights_beyond_float16_are_not_written(tmp_path: Path) -> None:
    """A merge that float32 holds and float16 does not is refused by the tensor's name, and leaves nothing behind."""
    objective = FunctionObjective("size", size, items=None, direction="minimize")
    base, experts = write_folders(tiny_vit, tmp_path)
    parameters = {"weight": {"low": 0.0, "high": 1e7}}
    problem = MergeProblem(Pool(base, experts), "task_arithmetic", [objective], parameters=parameters, dtype="float16", device="cpu")
    with pytest.raises(CandidateError, match=r"overflow float16 \(in vit"):
        export_model(problem.pool, problem.decode(np.array([1.0, 1.0])), tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "e0", "e1"]


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch, transformers
from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.recipe import Recipe
from mergeopt.study.export import export_model, open_pool
import mergeopt.cli.models, mergeopt.study.merge
from transformers import BertForSequenceClassification
from mergeopt import registry
from mergeopt.__main__ import main
from mergeopt.memory import room, status_bytes
registry.load("operators", sys.argv[3])
torch.zeros(1 << 20).add(1).sort()
resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + int(sys.argv[1]),) * 2)
model = int(sys.argv[2])
try:
    torch.empty(model, dtype=torch.uint8)
except RuntimeError as error:
    print(json.dumps({"too large": str(error), "bound": room(torch.device("cpu")).bound}), flush=True)
status = main(sys.argv[4:])
if status == 0:
    recipe, out = Recipe.load(Path(sys.argv[-1]) / "recipe.json"), sys.argv[-1] + "-scored"
    objective = FunctionObjective("size", lambda model, items, device: 0.0, items=None, direction="minimize", source="")
    report = export_model(open_pool(recipe), recipe, out, objectives=[objective], promised={"size": 1.0})
    print(json.dumps([report.scores, report.unscored]))
sys.exit(status)
"""
"""A `mergeopt` process whose memory may grow by the first argument, in bytes, once everything is imported."""


def large_bert() -> PreTrainedModel:
    """Return a BERT of 57 MB whose largest tensor has 0.6 MB."""
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, intermediate_size=384, num_hidden_layers=16, num_attention_heads=8, vocab_size=384)
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two experts of 57 MB."""
    root = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "a", "b")):
        write_folder(large_bert, root / name, seed)
    return root


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is allocated on Linux alone")
@pytest.mark.parametrize(("operator", "parameters"), [("linear", {"weight": [0.3, 0.5]}), ("ties", {"weight": [0.7, 1.2], "density": 0.3})])
def test_a_model_of_twice_the_memory_is_merged(operator: str, parameters: dict[str, object], large: Path, tmp_path: Path) -> None:
    """Where allocations may grow by half a model, a merge writes the whole of it, with the values of the rule for every tensor."""
    model = sum(Checkpoint(large / "base").spec(name).bytes for name in Checkpoint(large / "base").names)
    merge = {"base": str(large / "base"), "experts": [str(large / "a"), str(large / "b")]}
    (tmp_path / "merge.yaml").write_text(json.dumps({**merge, "merge": {"operator": operator, "parameters": parameters}}))
    arguments = [str(model // 2), str(model), operator, "merge", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout.splitlines()[0])
    assert first["bound"] == "RLIMIT_DATA"
    assert "can't allocate memory" in first["too large"]
    scores, unscored = json.loads(done.stdout.splitlines()[-1])
    assert scores == {}
    assert "RLIMIT_DATA" in unscored
    base, a, b = (load_file(large / name / "model.safetensors") for name in ("base", "a", "b"))
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert set(made) == set(base)
    for name, tensor in made.items():
        expected = RULES[operator](base[name].double(), torch.stack([a[name], b[name]]).double())
        assert float((tensor.double() - expected).norm()) <= 1e-6 * float(expected.norm()), name


def _linear(base: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    return (0.3 * experts[0] + 0.5 * experts[1]) / 0.8


def _ties(base: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Return the paper's rule with density 0.3, on float32 task vectors, since a rounding may decide what is trimmed."""
    tau = (experts.float() - base.float()).reshape(2, -1)
    kept = int(0.3 * tau.shape[1])
    trimmed = torch.zeros_like(tau)
    for row, out in zip(tau, trimmed, strict=True):
        largest = row.abs().sort(descending=True, stable=True).indices[:kept]
        out[largest] = row[largest]
    agree = torch.where(trimmed.sum(dim=0) >= 0, trimmed > 0, trimmed < 0)
    weighted = (torch.tensor([[0.7], [1.2]]) * trimmed * agree).double().sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    return base + weighted.view(base.shape)


RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"linear": _linear, "ties": _ties}
