from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from mergeopt import registry
from mergeopt.errors import DataError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.task import DifferentiableTask, Task
from mergeopt_problems.regression_metrics import MeanSquaredError
from mergeopt_problems.text_regression import TextRegression
from tests.problems.tiny_text import TEXTS, Rows, bert, wordpiece, write

CPU = torch.device("cpu")
Make = Callable[..., TextRegression]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wordpiece(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Make:
    """Make the task on rows, with the tokenizer."""

    def made(rows: Rows | None = None, **options: Any) -> TextRegression:
        data = {
            "path": write(tmp_path, table() if rows is None else rows), "search": "val", "text_b": "text_b", **options.pop("data", {}),
        }  # fmt: skip
        task = registry.load("tasks", "text_regression")(data=data, **{"tokenizer": tokenizer, "batch": 3, **options})
        assert isinstance(task, TextRegression)
        return task

    return made


def table() -> Rows:
    return [{"text": text, "text_b": TEXTS[-i], "target": i / 3, "split": "val"} for i, text in enumerate(TEXTS)]


def test_loss_is_transformers_own(make: Make, tokenizer: Path) -> None:
    """The mean squared error is transformers' own loss of a regression model, and each record is that of its row."""
    task, model = make(), bert(BertForSequenceClassification, ["alike"])
    assert isinstance(task, Task)
    assert not isinstance(task, DifferentiableTask)
    task.check(model)
    wrap: Any = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    inputs = wrap(TEXTS, [TEXTS[-i] for i in range(len(TEXTS))], return_tensors="pt", padding=True)
    targets = torch.tensor([i / 3 for i in range(len(TEXTS))])
    with torch.no_grad():
        expected = model(**inputs, labels=targets)
    assert model.config.problem_type == "regression"
    score = TaskObjective("error", task, MeanSquaredError()).score(model, "search", CPU, {})
    assert score.value == pytest.approx(float(expected.loss), rel=1e-5)
    np.testing.assert_allclose(score.records["prediction"], expected.logits[:, 0].numpy(), rtol=1e-4)
    np.testing.assert_allclose(score.records["target"], targets.numpy())
    alone = make(batch=1).records(model, "search", CPU)
    np.testing.assert_allclose(alone["prediction"], score.records["prediction"], rtol=1e-4)


def test_one_of_several_logits(make: Make) -> None:
    """`classes` picks the logit that counts, by index or name; without it a model of several is refused."""
    model = bert(BertForSequenceClassification, ["alike", "valence"])
    by_name, by_index = make(classes="valence"), make(classes=[1])
    by_name.check(model)
    left, right, other = (task.records(model, "search", CPU)["prediction"] for task in (by_name, by_index, make(classes=[0])))
    assert np.array_equal(left, right)
    assert not np.array_equal(left, other)
    with pytest.raises(DataError, match=r"expected one logit per text, got logits \[2, 2\] .* pick one with `classes:`"):
        make().check(model)


def test_limit_and_hash(make: Make) -> None:
    """A limit is seeded, and the hash follows texts and targets."""
    first, again, other = (make(limit=4, seed=seed).items("search") for seed in (0, 0, 1))
    assert len(first) == 4
    assert first.hash == again.hash != other.hash
    rows = table()
    assert make([{**rows[0], "target": 0.25}, *rows[1:]]).items("search").hash != make().items("search").hash


@pytest.mark.parametrize("target", [None, "high", float("nan"), True])
def test_targets_that_are_no_numbers(make: Make, target: Any) -> None:
    """A target that is missing, text, not finite or a truth value is an error that says where."""
    with pytest.raises(DataError, match=r"row 0: expected a finite number in the column 'target', got "):
        make([{**row, "target": target} for row in table()])
    with pytest.raises(DataError, match=r"no column 'tagret' \(target\); did you mean 'target'"):
        make(data={"target": "tagret"})
