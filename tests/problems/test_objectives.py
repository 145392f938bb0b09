from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.evaluation.user_functions import load_function
from mergeopt.task import Items, Objective, Records
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy, CrossEntropy

CPU = torch.device("cpu")


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Classifier(torch.nn.Module):
    """Counts its calls, so that sharing of records shows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 3)
        self.calls = 0
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> Output:
        self.calls += 1
        return Output(self.layer(pixel_values.flatten(1)))


def images(count: int) -> ImageItems:
    generator = torch.Generator().manual_seed(count)
    return ImageItems(torch.rand(count, 1, 2, 2, generator=generator), torch.arange(count) % 3, settings={})


@pytest.fixture
def task() -> ImageTask:
    return ImageTask(name="tiny", parts={"search": images(6), "report": images(9)})


def function_objective(returned: Any, items: ImageTask | None) -> FunctionObjective:
    return FunctionObjective("mine", lambda model, items, device: returned, items=items, direction="maximize")


def test_objectives_share_records(task: ImageTask) -> None:
    """Two metrics of one task run the model once, and give what the metrics give on its records."""
    model = Classifier()
    memo: dict[Any, Records] = {}
    accuracy, loss = TaskObjective("a", task, Accuracy()), TaskObjective("b", task, CrossEntropy())
    scores = [objective.score(model, "search", CPU, memo) for objective in (accuracy, loss)]
    assert model.calls == 1
    records = task.records(model, "search", CPU)
    assert scores[0].value == Accuracy().aggregate(records)
    assert scores[1].value == CrossEntropy().aggregate(records)
    assert scores[1].standard_error == CrossEntropy().standard_error(records)
    assert scores[0].items == 6
    assert accuracy.score(model, "report", CPU, memo).items == 9


def test_info(task: ImageTask) -> None:
    """An objective has the metric's direction unless told otherwise, and then no worst value."""
    plain = TaskObjective("a", task, Accuracy(), constraint=(0.5, None))
    assert isinstance(plain, Objective)
    assert (plain.info.direction, plain.info.worst, plain.info.constraint) == ("maximize", 0.0, (0.5, None))
    turned = TaskObjective("a", task, Accuracy(), direction="minimize")
    assert (turned.info.direction, turned.info.worst) == ("minimize", None)
    assert isinstance(function_objective(1, task), Objective)


def test_fingerprints(task: ImageTask) -> None:
    """Fingerprints are JSON and tell tasks, metrics and classes apart."""
    narrow = ImageTask(name="tiny", parts={"search": images(6), "report": images(9)}, classes=[0, 1, 2])
    shorter = ImageTask(name="tiny", parts={"search": images(5), "report": images(9)})
    objectives = [TaskObjective("a", t, Accuracy()) for t in (task, narrow, shorter)] + [TaskObjective("a", task, CrossEntropy())]
    assert len({json.dumps(objective.fingerprint, sort_keys=True) for objective in objectives}) == 4


def test_metric_without_its_column(task: ImageTask) -> None:
    """A metric that needs a column the task does not record is an error that names both."""

    class Bleu(Accuracy):
        name = "bleu"
        requires: Sequence[str] = ("text",)

    with pytest.raises(DataError, match="'bleu' needs the column 'text', which the task 'tiny' does not record; known: entropy, label"):
        TaskObjective("a", task, Bleu()).score(Classifier(), "search", CPU, {})


@pytest.mark.parametrize(
    "returned", [0.25, np.float32(0.25), torch.tensor(0.25), np.asarray(0.25), torch.tensor(0.25, dtype=torch.bfloat16)]
)
def test_function_of_one_number(task: ImageTask, returned: Any) -> None:
    """One number of any kind is the value, without a standard error."""
    score = function_objective(returned, task).score(Classifier(), "search", CPU, {})
    assert (score.value, score.standard_error, score.items, dict(score.records)) == (0.25, None, 6, {})


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_function_of_items(task: ImageTask, kind: Any) -> None:
    """One number per item makes their mean, its standard error and records."""
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    score = function_objective(kind(values), task).score(Classifier(), "search", CPU, {})
    assert score.value == pytest.approx(4 / 6)
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / 6**0.5)
    assert score.records["value"].tolist() == values


def test_function_gets_model_items_device(task: ImageTask) -> None:
    """A function gets the live model, the items of the part asked for and the device; without a task it gets None and has both parts."""
    seen: list[Any] = []

    def own_accuracy(model: torch.nn.Module, items: Items | None, device: torch.device) -> Any:
        seen.append((items, device))
        assert items is not None
        return [int(model(item["pixel_values"][None]).logits.argmax()) == item["label"] for item in items]  # type: ignore[attr-defined]

    objective = FunctionObjective("mine", own_accuracy, items=task, direction="maximize", worst=0.0)
    model = Classifier()
    objective.check(model)
    assert objective.score(model, "report", CPU, {}).value == TaskObjective("a", task, Accuracy()).score(model, "report", CPU, {}).value
    assert seen == [(task.items("report"), CPU)]
    free = FunctionObjective("norm", lambda model, items, device: float(items is None), items=None, direction="minimize")
    assert free.parts == ("search", "report")
    assert free.score(model, "search", CPU, {}).value == 1.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float("nan"), "got nan"),
        ([0.0, 1.0, float("inf"), 0.0, float("nan"), 0.0], r"got inf at item 2 \(2 of 6 are not finite\)"),
        ([1.0, 2.0], r"6 numbers \(one per item\), got shape \[2\]"),
        (np.zeros((6, 2)), r"got shape \[6, 2\]"),
        ([], r"got shape \[0\]"),
        (None, "got None"),
        ("0.5", "got a str: '0.5'"),
        ({"a": 1}, "got a dict"),
        ([[1.0], [1.0, 2.0]], "got a list"),
    ],
)
def test_function_that_returns_something_else(task: ImageTask, returned: Any, message: str) -> None:
    """Anything but finite numbers of the right count fails the candidate, by objective and by what came."""
    with pytest.raises(CandidateError, match="objective 'mine'.*" + message):
        function_objective(returned, task).score(Classifier(), "search", CPU, {})


def test_what_a_function_raises_is_its_own(task: ImageTask) -> None:
    """Exceptions of the user's function pass through, for the evaluator's one guard."""

    def broken(model: torch.nn.Module, items: Items | None, device: torch.device) -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        FunctionObjective("mine", broken, items=task, direction="maximize").score(Classifier(), "search", CPU, {})


def test_malformed_objectives(task: ImageTask) -> None:
    """Functions of other arguments, unknown directions and impossible bounds are refused at once."""
    with pytest.raises(ConfigError, match=r"cannot be called with \(model, items, device\)"):
        FunctionObjective("mine", lambda model: 1.0, items=None, direction="maximize")  # type: ignore[misc, arg-type]
    with pytest.raises(ConfigError, match="unknown direction 'maximise'; did you mean 'maximize'"):
        FunctionObjective("mine", lambda model, items, device: 1.0, items=None, direction="maximise")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"at least 0\.9 and at most 0\.1"):
        TaskObjective("a", task, Accuracy(), constraint=(0.9, 0.1))
    with pytest.raises(ConfigError, match="bounds nothing"):
        TaskObjective("a", task, Accuracy(), constraint=(None, None))


def test_load_function(tmp_path: Path) -> None:
    """A function is imported from a file by path, together with a neighbour of the file, and its fingerprint follows the file."""
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 0.5\n")
    file = tmp_path / "mine.py"
    text = "from neighbour_of_mine import VALUE\n\ndef half(model, items, device):\n    return VALUE\n"
    file.write_text(text)
    function = load_function("mine.py:half", tmp_path)
    assert load_function(f"{file}:half", Path("/")) is function
    objective = FunctionObjective("mine", function, items=None, direction="maximize")
    assert objective.score(Classifier(), "search", CPU, {}).value == 0.5
    file.write_text(text.replace("VALUE\n\n", "VALUE  # edited\n\n"))
    edited = FunctionObjective("mine", load_function("mine.py:half", tmp_path), items=None, direction="maximize")
    assert edited.fingerprint != objective.fingerprint
    assert FunctionObjective("mine", functools.partial(function), items=None, direction="maximize").fingerprint == edited.fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "expected 'path/to/file.py:name', got 'mine.py'"),
        ("other.py:half", "no such file: .*other.py"),
        ("mine.py:hafl", "defines no 'hafl'; did you mean 'half'"),
        ("mine.py:NUMBER", "'NUMBER' of .*mine.py is a int, not a function"),
        ("broken.py:half", "importing .*broken.py failed: KeyError: 'missing'"),
        ("syntax.py:half", "importing .*syntax.py failed: SyntaxError"),
    ],
)
def test_function_that_cannot_be_loaded(tmp_path: Path, spec: str, message: str) -> None:
    """Whatever keeps a function from being loaded is a message about the user's file."""
    (tmp_path / "mine.py").write_text("NUMBER = 3\n\ndef half(model, items, device):\n    return 0.5\n")
    (tmp_path / "broken.py").write_text("{}['missing']\n")
    (tmp_path / "syntax.py").write_text("def half(:\n")
    with pytest.raises(ConfigError, match=message):
        load_function(spec, tmp_path)
