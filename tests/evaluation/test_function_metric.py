"""Users' functions of records as metrics, from Python and from run files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mergeopt.config import RunFile, build_problem
from mergeopt.errors import CandidateError, ConfigError
from mergeopt.evaluation.function_metric import FunctionMetric, ItemFunctionMetric
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.out_of_memory import scored_at_once
from mergeopt.merge_problem import MergeProblem
from mergeopt.task import ItemMetric, Metric
from tests.tiny_models import tiny_gpt2, write_folders

RECORDS = {"output": np.array(["one", "three", ""]), "reference": np.array(["one", "thirty", "x"]), "loss": np.array([0.5, 1.0, 3.0])}
OWN = """
def overlap(output, reference):
    assert isinstance(output, list)
    return [len(set(a) & set(b)) / max(1, len(set(b))) for a, b in zip(output, reference)]


def longest(output, *, floor=0):
    return max(floor, *(len(text) for text in output))


def broken(output):
    raise ValueError("no such luck")


def unnamed(*columns):
    return 1.0


def hungry(output):
    import numpy

    return numpy.empty(1 << 55)


def hungry_in_torch(output):
    import torch

    return torch.empty(1 << 55)


def misspelt(outputs):
    return 1.0
"""


def lengths(output: list[str], scale: float = 2.0) -> list[float]:
    return [scale * len(text) for text in output]


def spread(loss: npt.NDArray[np.float64]) -> float:
    loss -= 1.0
    return 0.0


def test_a_function_gets_the_columns_that_it_names() -> None:
    """Texts come as a list, what has a default is left alone, and numbers per item are a mean with its standard error."""
    metric = FunctionMetric(lengths, direction="maximize")
    assert isinstance(metric, Metric)
    assert not isinstance(metric, ItemMetric)
    assert metric.requires == ["output"]
    assert metric.aggregate(RECORDS) == pytest.approx(16 / 3)
    assert metric.standard_error(RECORDS) == pytest.approx(np.std([6, 10, 0], ddof=1) / np.sqrt(3))
    raced = ItemFunctionMetric(lengths, direction="maximize")
    assert isinstance(raced, ItemMetric)
    assert raced.values(RECORDS).tolist() == [6.0, 10.0, 0.0]


def test_one_number_has_no_standard_error() -> None:
    """A function of all items together gives a number, cannot be called one per item, and what is no number fails the candidate."""
    metric = FunctionMetric(lambda loss: loss.max(), direction="minimize", source="max")
    assert metric.aggregate(RECORDS) == 3.0
    assert metric.standard_error(RECORDS) is None
    for wrong, said in (([1.0, 2.0], r"shape \[2\]"), (None, "got None"), (np.nan, "got nan"), ([1.0, np.inf, 2.0], "got inf at item 1")):
        with pytest.raises(CandidateError, match=said):
            FunctionMetric(lambda loss, wrong=wrong: wrong, direction="minimize").aggregate(RECORDS)
    with pytest.raises(CandidateError, match="expected one number per item, as `per_item: true` says, got one for all"):
        ItemFunctionMetric(lambda loss: 1.0, direction="minimize").values(RECORDS)


def test_records_cannot_be_written_to() -> None:
    """A function that changes what it was given raises, and what is stored stays what it was."""
    with pytest.raises(ValueError, match="read-only"):
        FunctionMetric(spread, direction="minimize").aggregate(RECORDS)
    assert RECORDS["loss"].tolist() == [0.5, 1.0, 3.0]


def problem(root: Path, **changes: Any) -> MergeProblem:
    """Return the problem of a run file with one objective, a metric of generated texts."""
    if not (root / "base").exists():
        write_folders(tiny_gpt2, root)
        (root / "own.py").write_text(OWN)
        rows = [{"prompt": "\x03\x04" + "\x05" * i, "reference": f"\x06\x07{i}", "split": "val"} for i in range(4)]
        (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    one = {
        "name": "own", "task": "generation", "metric": "own.py:overlap", "direction": "maximize", "tokenizer": "bytes", "max_new_tokens": 4,
        "data": {"path": "rows.jsonl", "search": "val"}, **changes,
    }  # fmt: skip
    given = {
        "base": "base",
        "experts": {"e0": "e0", "e1": "e1"},
        "objectives": [{k: v for k, v in one.items() if v is not None}],
        "device": "cpu",
    }
    made = build_problem(RunFile.parse(given), root)
    assert isinstance(made, MergeProblem)
    return made


def test_from_a_run_file(tmp_path: Path) -> None:
    """`metric: FILE.py:NAME` scores what was recorded, with its bounds; the file's content counts in the fingerprint."""
    found = problem(tmp_path, worst=0.0, per_item=True)
    assert (found.info.objectives[0].worst, found.info.objectives[0].decomposable) == (0.0, True)
    objective = found.objectives[0]
    assert isinstance(objective, TaskObjective)
    assert isinstance(objective.metric, ItemMetric)
    (base, *_) = found.evaluate(found.baselines(), "search")
    score = base.scores["own"]
    assert score.value == pytest.approx(objective.metric.values(score.records).mean())
    (base, *_) = problem(tmp_path, metric="own.py:longest", direction="minimize").evaluate(found.baselines(), "search")
    assert base.scores["own"].value == max(map(len, score.records["output"]))
    before = problem(tmp_path).info.fingerprint
    (tmp_path / "own.py").write_text(OWN.replace("max(1,", "max(2,"))
    assert problem(tmp_path).info.fingerprint != before


def test_metrics_that_raise_fail_the_candidate(tmp_path: Path) -> None:
    """A function that raises, or asks for what is not recorded, is a failed candidate with its reason."""
    for name, said in (
        ("broken", r"raised ValueError: no such luck \(own\.py:12\)"),
        ("misspelt", "needs the column 'outputs', .* did you mean 'output'"),
    ):
        own = problem(tmp_path, metric=f"own.py:{name}")
        (base, *_) = own.evaluate(own.baselines(), "search")
        assert re.search(said, str(base.error))


@pytest.mark.parametrize("name", ["hungry", "hungry_in_torch"])
def test_metrics_that_run_out_of_memory_fail_the_candidate_alone(tmp_path: Path, name: str) -> None:
    """A function gets all records at once, so its shortage is told, and as many items and candidates go on being scored at a time."""
    own = problem(tmp_path, metric=f"own.py:{name}")
    before = scored_at_once(own.objectives)
    for outcome in own.evaluate(own.baselines(), "search"):
        said = str(outcome.error)
        assert re.match(rf"objective 'own': there is not enough memory for the metric '.*{name}': .*allocate", said), said
    assert (own.reduced, scored_at_once(own.objectives)) == ({}, before)
    assert before["own"] > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "own.py:absent"}, "defines no 'absent'"),
        ({"metric": "own.py:unnamed"}, r"unnamed\(\*columns\) says not by name what it wants"),
        ({"direction": None}, "own: a metric that is a function needs a direction"),
        ({"per_item": "yes"}, "own: per_item: expected true or false, got 'yes'"),
        ({"worst": "low"}, "own: worst: expected a finite number, got 'low'"),
        ({"metric": "exact_match", "per_item": True}, "own: per_item is a key of a function, not of a registered metric"),
        ({"metric": "exact_match", "worst": 0.0}, "own: worst is a key of a function, not of a registered metric"),
    ],
)
def test_what_is_no_metric(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Functions that are not there or say not what they want, and keys that mean nothing, are errors that say so."""
    with pytest.raises(ConfigError, match=message):
        problem(tmp_path, **changes)
