"""Candidates with the heads of their objectives' experts: scores, shared passes over the data, gradients, and strategies that learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification, ViTModel

from mergeopt.differentiable import Weights
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.pool import Pool
from mergeopt.problem import Proposal
from mergeopt.strategy import Budget
from mergeopt.study.learned_front import LearnedFront
from mergeopt.study.optimize import optimize
from mergeopt.study.weights import make_tensors
from mergeopt.task import Items, Metric, Objective, Part, Records
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy, CrossEntropy, Entropy, KlDivergence
from tests.tiny_models import tiny_vit, write_folder

CPU = torch.device("cpu")
LABELS = {"five": "abcde", "three": "xyz"}


class Counted(ImageTask):
    """A task that counts its passes over the data."""

    passes = 0

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        self.passes += 1
        return super().records(model, part, device, items)


def noise(count: int = 10) -> Counted:
    """Return pictures of noise with labels that both heads have."""
    generator = torch.Generator().manual_seed(7)
    pixels, labels = torch.randn((count, 1, 8, 8), generator=generator), torch.randint(0, 3, (count,), generator=generator)
    return Counted(name="noise", parts={"search": ImageItems(pixels, labels, settings={})}, batch=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A ViT without head, and classifiers into five and into three classes; tests do not write to them."""
    root = tmp_path_factory.mktemp("heads")
    base = write_folder(partial(tiny_vit, ViTModel), root / "base", 0)
    return base, {name: write_folder(partial(tiny_vit, labels=labels), root / name, len(name)) for name, labels in LABELS.items()}


@pytest.fixture
def problem(folders: tuple[Path, dict[str, Path]]) -> Callable[..., MergeProblem]:
    """Make a problem over the classifiers; without objectives, each is judged by its cross-entropy."""

    def make(*objectives: Objective, **options: Any) -> MergeProblem:
        judged = objectives or [TaskObjective(name, noise(), CrossEntropy(), expert=name) for name in LABELS]
        return MergeProblem(Pool(*folders, heads="separate"), "task_arithmetic", judged, device="cpu", **options)

    return make


def with_head(problem: MergeProblem, weights: dict[str, float], head: str) -> torch.nn.Module:
    """Return the expert's own model with a merged body, loaded apart from the evaluator."""
    tensors = dict(make_tensors(problem.pool, problem.decode(problem.coefficients.weighted(weights)), head=head))
    config = AutoConfig.from_pretrained(problem.pool.experts[head].path)
    model: torch.nn.Module = ViTForImageClassification.from_pretrained(None, config=config, state_dict=tensors)
    return model.eval()


@pytest.mark.parametrize("mode", ["separate", "by_label"])
@pytest.mark.parametrize("options", [{"prefixes": 1 << 26}, {"scoring": "layers"}], ids=str)
def test_shared_layers_are_computed_once_with_any_head(folders: tuple[Path, dict[str, Path]], mode: str, options: dict[str, Any]) -> None:
    """Candidates that differ in their last layers score the same bits whether layers are shared, all go layer by layer, or each alone."""

    def scores(**how: Any) -> list[dict[str, float]]:
        objectives = [TaskObjective(name, noise(), CrossEntropy(), expert=name) for name in LABELS]
        made = MergeProblem(Pool(*folders, heads=mode), "task_arithmetic", objectives, device="cpu", groups="layer", **how)
        genomes = np.repeat(made.info.space.sample(np.random.default_rng(0), 1), 4, axis=0)
        genomes[1:3, -1], genomes[3, -4] = (0.2, 0.9), 0.1
        found = list(made.evaluate([Proposal("x", genome) for genome in genomes], "search"))
        assert [evaluation.error for evaluation in found] == [None] * 4
        return [{name: score.value for name, score in evaluation.scores.items()} for evaluation in found]

    assert scores(**options) == scores()


@pytest.mark.parametrize("mode", ["separate", "by_label"])
def test_divergence_is_from_the_experts_own_head(folders: tuple[Path, dict[str, Path]], mode: str) -> None:
    """Wherever its head is, the expert by itself is exactly as far from itself as nothing, and no other candidate is."""
    objectives = [TaskObjective(name, noise(), KlDivergence(), expert=name) for name in LABELS]
    made = MergeProblem(Pool(*folders, heads=mode), "task_arithmetic", objectives, device="cpu")
    proposals = [Proposal(name, recipe=made.alone(name)) for name in LABELS]
    for proposal, evaluation in zip(proposals, made.evaluate(proposals, "search"), strict=True):
        assert evaluation.error is None
        assert {name: score.value == 0.0 for name, score in evaluation.scores.items()} == {name: name == proposal.name for name in LABELS}


def first_bias(model: torch.nn.Module, items: Items | None, device: torch.device) -> float:
    return float(model.get_parameter("classifier.bias")[0].detach())


def test_objectives_are_measured_with_their_experts_heads(problem: Callable[..., MergeProblem]) -> None:
    """Each objective, a function too, scores what the expert's model with the merged body scores by itself, bit for bit."""
    functions = [FunctionObjective(f"bias of {name}", first_bias, items=None, direction="minimize", expert=name) for name in LABELS]
    made = problem(*(TaskObjective(name, noise(), CrossEntropy(), expert=name) for name in LABELS), *functions)
    weights = {"five": 0.3, "three": 0.6}
    (evaluation,) = made.evaluate([Proposal("x", made.coefficients.weighted(weights))], "search")
    assert evaluation.error is None
    for name in LABELS:
        model = with_head(made, weights, name)
        assert evaluation.scores[name].value == CrossEntropy().aggregate(noise().records(model, "search", CPU))
        assert evaluation.scores[f"bias of {name}"].value == first_bias(model, None, CPU)


def test_passes_over_the_data_are_shared_within_a_head(problem: Callable[..., MergeProblem]) -> None:
    """Of three objectives on one task the two with the same expert share one pass, the third has its own; so do many candidates."""
    task = noise()
    kinds: list[tuple[str, Metric, str]] = [
        ("loss", CrossEntropy(), "five"),
        ("doubt", Entropy(), "five"),
        ("other", CrossEntropy(), "three"),
    ]
    made = problem(*(TaskObjective(name, task, metric, expert=expert) for name, metric, expert in kinds))
    genomes = made.info.space.sample(np.random.default_rng(0), 3)
    scores = [evaluation.scores for evaluation in made.evaluate([Proposal("x", genome) for genome in genomes], "search")]
    assert task.passes == 2 * 3
    for found in scores:
        assert found["loss"].records is found["doubt"].records
        assert found["loss"].value != found["other"].value


@pytest.mark.parametrize("name", list(LABELS))
@pytest.mark.parametrize("loss", ["cross_entropy", "entropy", "kl"])
def test_gradients_are_those_of_the_right_head(problem: Callable[..., MergeProblem], name: str, loss: str) -> None:
    """Losses and their gradients equal those that central differences of the expert's own model with the merged body give."""
    made = problem()
    gradients = made.gradients(None)
    coefficients = gradients.coefficients(weight=0.4)
    weights = Weights(coefficients)
    gradients.put(weights)
    found = gradients.loss(name, loss, range(10), weight=1.0)
    gradients.pull(weights)
    (leaf,) = coefficients.parameters()
    assert leaf.grad is not None
    teacher = AutoModelForImageClassification.from_pretrained(made.pool.experts[name].path).eval()

    def value(five: float, three: float) -> float:
        model = with_head(made, {"five": five, "three": three}, name)
        with torch.no_grad():
            own, labels = (noise().predict(model, "search", range(10), CPU), noise().items("search").labels)
            log, target = (x.double().log_softmax(1) for x in (own.logits, noise().predict(teacher, "search", range(10), CPU).logits))
        if loss == "cross_entropy":
            return float(torch.nn.functional.nll_loss(log, labels))
        return float(-(log.exp() * log).sum(1).mean() if loss == "entropy" else (target.exp() * (target - log)).sum(1).mean())

    assert found.value == pytest.approx(value(0.4, 0.4), rel=1e-5)
    step = 0.02
    moved = [value(0.4 + step, 0.4) - value(0.4 - step, 0.4), value(0.4, 0.4 + step) - value(0.4, 0.4 - step)]
    expected = np.asarray(moved) / (2 * step)
    np.testing.assert_allclose(leaf.grad.view(-1).numpy(), expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("strategy", ["adamerging", "pareto-set"])
def test_strategies_that_learn(problem: Callable[..., MergeProblem], tmp_path: Path, strategy: str) -> None:
    """Learning by gradient runs over experts with heads of their own, and what it found is written with either head as it was scored."""
    made = problem(groups="layer")
    run = optimize(made, strategy, budget=Budget(2, 3), seed=0, out=tmp_path / "run")
    assert run.gradient_steps == 3
    report = run.front.points[0].export(tmp_path / "model", head="three")
    assert report.exact
    assert list(report.scores) == ["three"]
    assert torch.equal(Checkpoint(tmp_path / "model").read("classifier.bias"), made.pool.experts["three"].read("classifier.bias"))
    if strategy == "pareto-set":
        learned = LearnedFront(next((tmp_path / "run/learned").iterdir()))
        learned.export([0.5, 0.5], tmp_path / "all", head="all")
        sample = learned.sample([0.5, 0.5])
        for name in LABELS:
            written = Checkpoint(tmp_path / "all" / name)
            assert all(torch.equal(written.read(tensor), value) for tensor, value in sample.items())
            assert set(written.names) - set(sample) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("strategy", ["adamerging", "pareto-set", "evolver-joint"])
def test_strategies_over_one_head_for_all_labels(folders: tuple[Path, dict[str, Path]], tmp_path: Path, strategy: str) -> None:
    """Heads merged by label are learned and evolved like any tensor; what was found is written as it was scored, with all eight labels."""
    objectives = [TaskObjective(name, noise(), CrossEntropy(), expert=name) for name in LABELS]
    made = MergeProblem(Pool(*folders, heads="by_label"), "task_arithmetic", objectives, device="cpu")
    run = optimize(made, strategy, budget=Budget(4, None if strategy == "evolver-joint" else 3), seed=0, out=tmp_path / "run")
    assert not [trial.error for trial in run.trials if not trial.ok]
    report = run.front.points[0].export(tmp_path / "model")
    assert report.exact
    assert list(report.scores) == list(LABELS)
    assert AutoConfig.from_pretrained(tmp_path / "model").id2label == dict(enumerate("abcdexyz"))


def test_an_expert_alone_is_that_expert(problem: Callable[..., MergeProblem]) -> None:
    """The baseline of an expert alone scores, by its own objective, what the expert itself does."""
    made = problem(*(TaskObjective(name, noise(30), Accuracy(), expert=name) for name in LABELS))
    alone = {proposal.name: proposal for proposal in made.baselines()}
    for name in LABELS:
        (evaluation,) = made.evaluate([alone[f"expert:{name}"]], "search")
        expert = AutoModelForImageClassification.from_pretrained(made.pool.experts[name].path).eval()
        assert evaluation.scores[name].value == Accuracy().aggregate(noise(30).records(expert, "search", CPU))
