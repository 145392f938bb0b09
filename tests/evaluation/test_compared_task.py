"""KL divergence from an expert, against scipy's and against the expert itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mergeopt.batched_task import BatchedTask, JudgedTask
from mergeopt.errors import ConfigError
from mergeopt.evaluation import expert_logits
from mergeopt.evaluation.compared_task import ComparedTask
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.racing import Racing
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.study.optimize import optimize
from mergeopt.task import DifferentiableTask, ItemMetric, Part
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy, KlDivergence
from tests.problems.batched import KINDS, Asked, text_regression

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=[kind for kind in KINDS if kind is not text_regression], ids=lambda kind: kind.__name__)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Asked:
    make: Callable[[Path], Asked] = request.param
    return make(tmp_path)


_SIZES: list[tuple[Part, int]] = [("search", 10), ("report", 5)]


def pictures() -> ImageTask:
    generator = torch.Generator().manual_seed(0)
    parts: dict[Part, ImageItems] = {
        name: ImageItems(torch.randn((n, 1, 8, 8), generator=generator), torch.arange(n) % 3, settings={}) for name, n in _SIZES
    }
    return ImageTask(name="pictures", parts=parts, batch=4)


def objective(expert: str = "e0", task: ImageTask | None = None) -> TaskObjective:
    return TaskObjective(f"kl:{expert}", task or pictures(), KlDivergence(), expert=expert)


def test_divergence_is_scipys(asked: Asked) -> None:
    """Of every kind of task the column is the mean over an item's predictions of scipy's KL, whatever items are asked for with it."""
    task, expert = asked.task, asked.model
    assert isinstance(task, JudgedTask)
    model = copy.deepcopy(expert)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    compared = ComparedTask(task, "e", lambda name: {"e": expert}[name])
    assert isinstance(compared, BatchedTask)
    assert isinstance(compared, DifferentiableTask)
    records = compared.records(model, "search", CPU)
    for item in range(len(task.items("search"))):
        with torch.no_grad():
            p, q = (torch.softmax(one(**_alone(task, one, item)).logits.double(), dim=-1) for one in (expert, model))
            # which of them count: numbers in place of logits, whose one class the task hands back
            kept = task.predictions(
                model, "search", np.array([item]), torch.arange(p[0].numel() // p.shape[-1]).reshape(p.shape[:-1])[..., None]
            )
        rows = kept.logits[:, 0].long()
        nats = stats.entropy(p.flatten(0, -2)[rows].numpy(), q.flatten(0, -2)[rows].numpy(), axis=-1)
        assert records["kl"][item] == pytest.approx(nats.mean(), rel=1e-3, abs=1e-6)
    assert (records["kl"] > 0).all()
    plain = task.records(model, "search", CPU)
    assert {name: records[name].tolist() for name in plain} == {name: column.tolist() for name, column in plain.items()}
    some = compared.records(model, "search", CPU, [4, 0, 3])
    np.testing.assert_allclose(some["kl"], records["kl"][[4, 0, 3]], rtol=1e-3, atol=1e-7)
    assert compared.records(expert, "search", CPU)["kl"].tolist() == [0.0] * len(records["kl"])


def _alone(task: BatchedTask, model: torch.nn.Module, item: int) -> dict[str, torch.Tensor]:
    (batch,) = task.batches(model, "search", [item])
    return dict(batch.inputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_is_its_own_measure(vit_folders: tuple[Path, dict[str, Path]], dtype: str) -> None:
    """Scored by a problem, the expert's own divergence is exactly 0 on both parts and that of all other models is not."""
    problem = MergeProblem(Pool(*vit_folders), "linear", [objective()], device="cpu", dtype=dtype)
    assert problem.info.objectives[0].decomposable
    for part in ("search", "report"):
        proposals = problem.baselines()
        values = {p.name: e.scores["kl:e0"].value for p, e in zip(proposals, problem.evaluate(proposals, part), strict=True)}
        assert values.pop("expert:e0") == 0.0
        assert min(values.values()) > 1e-5


def test_logits_that_are_too_many_to_keep(vit_folders: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert whose logits take too much memory is asked again with every batch, and the values are the same bits."""
    found = []
    for most in (expert_logits.MOST_LOGITS, 17):
        monkeypatch.setattr(expert_logits, "MOST_LOGITS", most)
        problem = MergeProblem(Pool(*vit_folders), "linear", [objective(), objective("e1")], device="cpu")
        found.append([e.scores["kl:e0"].records["kl"].tolist() for _ in "ab" for e in problem.evaluate(problem.baselines(), "search")])
    assert found[0] == found[1]


def test_problems_do_not_share_experts(vit_folders: tuple[Path, dict[str, Path]]) -> None:
    """One objective given to two problems compares in each with that problem's own expert of the name."""
    base, experts = vit_folders
    shared = objective()
    pools = (experts, {"e0": experts["e1"], "e1": experts["e0"]})
    problems = [MergeProblem(Pool(base, own), "linear", [shared], device="cpu") for own in pools]
    for problem in (*problems, problems[0]):
        (alone,) = problem.evaluate([p for p in problem.baselines() if p.name == "expert:e0"], "search")
        assert alone.scores["kl:e0"].value == 0.0


def test_a_run_by_divergence_is_exported(vit_folders: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """A search by divergence and accuracy runs, and what is exported scores after reloading what the store says."""
    objectives = [objective(), TaskObjective("accuracy", pictures(), Accuracy())]
    problem = MergeProblem(Pool(*vit_folders), "linear", objectives, device="cpu")
    run = optimize(problem, "random", budget=3, out=tmp_path / "run")
    report = run.point(run.front.points[0].trial).export(tmp_path / "model")
    assert report.exact


def test_races_by_divergence(vit_folders: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """Candidates that a race lets finish have the divergences that they have without one, but for rounding."""
    runs = []
    for racing in (None, Racing(first=4)):
        problem = MergeProblem(Pool(*vit_folders), "linear", [objective()], device="cpu", groups="layer")
        runs.append(optimize(problem, "random", budget=12, out=tmp_path / f"{racing is None}", racing=racing))
    assert any(trial.censored is not None for trial in runs[1].trials)
    plain, raced = ({trial.key: trial.values() for trial in run.trials if trial.ok} for run in runs)
    for key, values in raced.items():
        assert values == pytest.approx(plain[key], rel=1e-5, abs=1e-9)
    assert runs[0].front.points[0].values == pytest.approx(runs[1].front.points[0].values, rel=1e-5)


def test_what_cannot_be_compared(vit_folders: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """Without an expert, with one that is not there, and on a task that predicts no classes, the metric is refused by name."""
    assert isinstance(KlDivergence(), ItemMetric)
    with pytest.raises(
        ConfigError, match=r"objective 'a': the metric 'kl' compares with an expert's predictions; say whose with `expert: NAME`"
    ):
        TaskObjective("a", pictures(), KlDivergence())
    with pytest.raises(ConfigError, match="objective 'a': the metric 'kl' compares predictions, and the task 'text_regression' makes none"):
        TaskObjective("a", text_regression(tmp_path).task, KlDivergence(), expert="e0")
    with pytest.raises(ConfigError, match="no expert is called 'e7'"):
        MergeProblem(Pool(*vit_folders), "linear", [objective("e7")], device="cpu")
