"""Base and experts in a file instead of in memory: the same bits, nothing left behind, and searches that memory alone would not allow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.stack_file import StackFile
from mergeopt.memory import Frugality
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import Proposal
from tests.lineages import random_lineage
from tests.tiny_models import write_folders

Make = Callable[..., MergeProblem]
RULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"groups": "layer"},
    "ties": {"parameters": {"weight": {"low": 0.0, "high": 1.0}, "density": {"low": 0.1, "high": 0.9}}},
    "dare_ties": {"parameters": {"weight": {"low": 0.0, "high": 1.0}, "density": 0.4}},
    "slerp": {},
}


def scores(problem: MergeProblem) -> list[float]:
    genomes = np.random.default_rng(0).random((5, problem.info.space.dim))
    proposals = [*problem.baselines(), *(Proposal("x", genome) for genome in genomes)]
    outcomes = list(problem.evaluate(proposals, "search"))
    assert [outcome.error for outcome in outcomes] == [None] * len(proposals)
    return [outcome.scores["size"].value for outcome in outcomes]


@pytest.mark.parametrize("operator", RULES)
def test_a_file_gives_the_bits_that_memory_gives(problem: Make, tmp_path: Path, operator: str) -> None:
    """Every rule makes the same candidates of a mapped file; the file has no name, so that nothing is ever left of it."""
    options = RULES[operator]
    mapped = problem(operator, frugality=Frugality(stack="file", folder=tmp_path / "stacks"), **options)
    assert scores(mapped) == scores(problem(operator, **options))
    assert "prepared" not in mapped.memory()
    assert list((tmp_path / "stacks").iterdir()) == []


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties"])
def test_members_evolve_in_a_file(problem: Make, tmp_path: Path, operator: str) -> None:
    """A population in a file has the bits of one in memory, whether its rule works on the members themselves or prepares them."""
    lineage = random_lineage(np.random.default_rng(3), 6, newest=True)
    folders = problem().pool
    experts = dict(zip(("e0", "e1", "e2"), [folders.experts["e0"].path, folders.experts["e1"].path, folders.base.path], strict=True))
    found = []
    for frugality in (Frugality(stack="memory"), Frugality(stack="file", folder=tmp_path)):
        made = problem(operator, frugality=frugality)
        made = MergeProblem(type(made.pool)(folders.base.path, experts), operator, made.objectives, device="cpu", frugality=frugality)
        members = made.members()
        proposals = [Proposal("x", recipe=members.merged(lineage)), Proposal("y", recipe=members.alone(1, lineage))]
        found.append([outcome.scores["size"].value for outcome in made.evaluate(proposals, "search")])
    assert found[0] == found[1]


def test_rows_are_seen_as_they_are_written(tmp_path: Path) -> None:
    """The view to read shows at once what the view to write got; a disk too small, and no folder, are told by what can be done."""
    file = StackFile(2, 100, tmp_path / "new")
    reader, writer = file.reader, file.writer
    assert bool((reader == 0).all())
    writer[1, 3:5] = 7.0
    assert reader[1].tolist() == [0.0] * 3 + [7.0] * 2 + [0.0] * 95
    with pytest.raises(StoreError, match=r"free space, or name another folder with memory: \{folder: \.\.\.\}"):
        StackFile(1 << 20, 1 << 30, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the"):
        StackFile(2, 100, tmp_path / "file" / "below")


def test_a_file_is_for_cpus(problem: Make) -> None:
    """A card cannot compute from a mapped file, and what it can do instead is said."""
    if not torch.cuda.is_available():
        pytest.skip("there is no card")
    made = problem()
    with pytest.raises(ConfigError, match="use scoring: layers"):
        MergeProblem(made.pool, "linear", made.objectives, device="cuda", frugality=Frugality(stack="file"))


LIMITED = """
import json, resource, sys
import numpy as np, torch
from transformers import BertForSequenceClassification
from mergeopt.merge_problem import MergeProblem
from mergeopt.memory import status_bytes
from mergeopt.problem import Proposal
from tests.evaluation.test_stack_file import bias_problem
torch.zeros(1 << 20).add(1)
base, experts, room = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if room:
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + room,) * 2)
problem = bias_problem(base, experts)
proposals = [*problem.baselines(), *(Proposal("x", genome) for genome in np.random.default_rng(0).random((6, problem.info.space.dim)))]
found = [outcome.scores["size"].value for outcome in problem.evaluate(proposals, "search")]
print(json.dumps([found, problem.evaluator.arena.candidates, problem.fit.folder is not None, sum(problem.memory().values())]))
"""


def bert() -> PreTrainedModel:
    """Return a BERT of 43 MB whose largest tensor has 0.6 MB."""
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, intermediate_size=384, num_hidden_layers=12, num_attention_heads=8, vocab_size=384)
    )


def bias_problem(base: str, experts: dict[str, str]) -> MergeProblem:
    """Return a search whose one objective looks at all weights without copying them."""
    from mergeopt.evaluation.objectives import FunctionObjective
    from mergeopt.models.pool import Pool

    def size(model: torch.nn.Module, items: Any, device: torch.device) -> float:
        return float(sum(float(tensor.float().sum()) for tensor in model.parameters()))

    objective = FunctionObjective("size", size, items=None, direction="minimize", source="")
    objective._trusted = True  # what it would be after its first call, which copies the model
    return MergeProblem(Pool(base, experts), "task_arithmetic", [objective], device="cpu", threads=1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what is allocated on Linux alone")
def test_a_search_goes_on_where_base_and_experts_do_not_fit(tmp_path: Path) -> None:
    """With room for two candidates, less than for base and experts, a search keeps these in a file, and scores what it scores elsewhere."""
    base, experts = write_folders(bert, tmp_path)
    named = json.dumps({name: str(path) for name, path in experts.items()})
    results = []
    for megabytes in (0, 180):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(base), named, str(megabytes << 20)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (plenty, eight, inside, needed), (short, few, mapped, less) = results
    assert short == plenty
    assert (eight, inside) == (8, False)
    assert 1 <= few < 8
    assert mapped
    assert less < 180 << 20 < needed
