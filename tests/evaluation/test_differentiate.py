"""Gradients of losses: held against autograd through a model that is merged in one graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergeopt.differentiable import Weights
from mergeopt.errors import CandidateError, ConfigError
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.learned import Factors, LearnedSet
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import Param
from mergeopt.operators.function import OperatorFactory, merge_operator
from mergeopt.study.weights import make_tensors
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy
from tests.evaluation.conftest import size

Make = Callable[..., MergeProblem]
TARGET = "vit.encoder.layer.1.intermediate.dense.weight"


def images(count: int = 12) -> ImageTask:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn((count, 1, 8, 8), generator=generator)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return ImageTask(name="noise", parts={"search": ImageItems(pixels, labels, settings={})}, batch=4)


@pytest.fixture
def learning(vit_folders: tuple[Path, dict[str, Path]]) -> Make:
    """Make a problem over the tiny ViTs whose objectives classify noise."""

    def make(operator: Any = "task_arithmetic", **options: Any) -> MergeProblem:
        objectives = [TaskObjective(name, images(), Accuracy(), expert=name) for name in ("e0", "e1")]
        return MergeProblem(Pool(*vit_folders), operator, objectives, device="cpu", **options)

    return make


def bent() -> OperatorFactory:
    """Return a rule that is neither linear nor elementwise."""

    @merge_operator(
        "bent", weight=Param.real(0.5, search=(0.0, 1.0), per_expert=True, differentiable=True), power=Param.real(1.0, differentiable=True)
    )
    def merge(deltas: torch.Tensor, *, weight: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = torch.tensordot(weight, deltas, dims=1)
        return mixed * (1.0 + power * mixed.square().mean())

    return merge


def dense(problem: MergeProblem, operator: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Merge all tensors in one float64 graph, written down independently: weight [layers or 1, K]."""
    base = load_file(Path(problem.pool.base.path) / "model.safetensors")
    experts = [load_file(Path(expert.path) / "model.safetensors") for expert in problem.pool.experts.values()]
    labels = [segment.layer for segment in problem.layout.segments]
    order = list(dict.fromkeys(labels))
    merged = {}
    for segment in problem.layout.segments:
        w = weight[order.index(segment.layer) if len(weight) > 1 else 0]
        deltas = torch.stack([e[segment.name].double() - base[segment.name].double() for e in experts])
        mixed = torch.tensordot(w, deltas, dims=1)
        mixed = mixed * (1.0 + mixed.square().mean()) if operator == "bent" else mixed
        merged[segment.live] = base[segment.name].double() + mixed
    return merged


def expected(problem: MergeProblem, operator: str, start: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
    """Return cross-entropy on all items and its gradient in the weights, by autograd in float64."""
    weight = torch.tensor(start, requires_grad=True)
    model = problem.pool.architecture.load(problem.pool.base, torch.float64)
    items = images().items("search")
    output = torch.func.functional_call(model, dense(problem, operator, weight), kwargs={"pixel_values": items.pixels.double()})
    loss = torch.nn.functional.cross_entropy(output.logits, items.labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    return float(loss.detach()), gradient.numpy()


@pytest.mark.parametrize("groups", ["model", "layer"])
@pytest.mark.parametrize("operator", ["task_arithmetic", "bent"])
def test_gradients_are_those_of_one_graph(learning: Make, operator: str, groups: str) -> None:
    """Loss and gradient, gathered over two batches, equal autograd through a dense float64 merge."""
    problem = learning(bent() if operator == "bent" else operator, groups=groups, parameters={"weight": {"low": 0.0, "high": 1.0}})
    gradients = problem.gradients(None)
    coefficients = gradients.coefficients()
    (leaf,) = coefficients.parameters()
    with torch.no_grad():
        leaf.copy_(torch.linspace(0.1, 0.9, leaf.numel(), dtype=torch.float64).view(leaf.shape))
    weights = Weights(coefficients)
    gradients.put(weights)
    losses = [gradients.loss("e0", "cross_entropy", batch, weight=0.5).value for batch in (range(6), range(6, 12))]
    gradients.pull(weights)
    value, gradient = expected(problem, operator, leaf.detach().numpy())
    assert np.mean(losses) == pytest.approx(value, rel=1e-5)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-3, atol=1e-6 * np.abs(gradient).max())


def learned_set(problem: MergeProblem, rank: int = 2) -> LearnedSet:
    generator = torch.Generator().manual_seed(5)
    rows, columns = problem.gradients(None).shapes[TARGET]
    parts = [0.3 * torch.randn(shape, generator=generator) for shape in ((rows, rank), (columns, rank), (2, rank, rank))]
    return LearnedSet(("e0", "e1"), {TARGET: Factors(*(part.requires_grad_(True) for part in parts))})


def test_gradients_reach_a_learned_set(learning: Make) -> None:
    """The loss falls along the gradient of a learned set's factors as fast as the gradient says."""
    problem = learning(parameters={"weight": 0.3, "scale": {"low": 0.5, "high": 1.5}})
    gradients, learned = problem.gradients(None), learned_set(problem)
    weights = Weights(gradients.coefficients(), learned, learned.check_preference([0.3, 0.7]))

    def loss(weight: float | None = None) -> float:
        gradients.put(weights)
        return gradients.loss("e1", "cross_entropy", range(12), weight=weight).value

    loss(1.0)
    gradients.pull(weights)
    for parameter in learned.parameters():
        assert parameter.grad is not None
        direction, step = parameter.grad / parameter.grad.norm(), 1e-2
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss()
            parameter.sub_(2 * step * direction)
            below = loss()
            parameter.add_(step * direction)
        assert (above - below) / (2 * step) == pytest.approx(float(parameter.grad.norm()), rel=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_put_is_what_the_recipe_makes(learning: Make, tmp_path: Path, dtype: str) -> None:
    """The weights learned with, those of the recipe in an arena, and those made tensor by tensor are equal bit for bit."""
    problem = learning(groups="layer", parameters={"weight": {"low": 0.0, "high": 1.0}}, dtype=dtype)
    gradients = problem.gradients(tmp_path)
    coefficients = gradients.coefficients(weight=0.37)
    learned = learned_set(problem).finished(problem.gradients(None).recipe(Weights(coefficients)).to_json(), {})
    weights = Weights(coefficients, learned, learned.check_preference({"e1": 2.0, "e0": 1.0}))
    gradients.put(weights)
    put = problem.evaluator.arena.rows[0].clone()
    gradients.keep(learned)
    recipe = gradients.recipe(weights)
    problem.evaluator.model(recipe)
    assert torch.equal(problem.evaluator.arena.rows[0], put)
    fresh = learning(groups="layer")
    streamed = dict(make_tensors(fresh.pool, recipe))
    assert all(torch.equal(streamed[s.name].reshape(-1), put[s.start : s.end]) for s in problem.layout.segments)


def test_losses_by_name(learning: Make, problem: Make) -> None:
    """What an objective can give follows from its task, its expert and its own loss; anything else is refused by name."""
    gradients = learning().gradients(None)
    assert gradients.losses("e0") == ("cross_entropy", "entropy", "kl", "distance")
    plain = problem().gradients(None)
    assert plain.losses("size") == ()
    plain.put(Weights(plain.coefficients()))
    with pytest.raises(ConfigError, match="no loss 'entropy'"):
        plain.loss("size", "entropy", [])


def test_kl_is_zero_at_the_expert_and_entropy_is_its_own(learning: Make) -> None:
    """KL to the objective's expert vanishes where the model is that expert, and computing it leaves the model that was put."""
    gradients = learning("linear").gradients(None)
    coefficients = gradients.coefficients()
    with torch.no_grad():
        coefficients.parameters()[0].copy_(torch.tensor([[1.0, 0.0]]))
    gradients.put(Weights(coefficients))
    assert gradients.loss("e0", "kl", range(12)).value == pytest.approx(0.0, abs=1e-6)
    assert gradients.loss("e1", "kl", range(12)).value > 1e-3
    assert gradients.loss("e0", "distance", []).value == 0.0
    assert 0.0 < gradients.loss("e0", "entropy", range(12)).value < float(np.log(5))


def test_the_distance_has_its_gradient(learning: Make) -> None:
    """Of sum_k w_k tau_k the squared distance to a scaled expert is a quadratic in w, and so is its gradient."""
    problem = learning(parameters={"weight": {"low": 0.0, "high": 1.0}})
    gradients = problem.gradients(None)
    coefficients = gradients.coefficients(weight=0.25)
    weights = Weights(coefficients)
    gradients.put(weights)
    value = gradients.loss("e1", "distance", [], weight=1.0, target_scale=1.5).value
    gradients.pull(weights)
    taus = []
    for name in gradients.shapes:
        base, experts = gradients.tensors(name)
        taus.append((experts - base).double().reshape(2, -1))
    tau = torch.cat(taus, dim=1)
    rest = 0.25 * tau[0] + (0.25 - 1.5) * tau[1]
    assert value == pytest.approx(float(rest.square().sum()), rel=1e-5)
    (leaf,) = coefficients.parameters()
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad[0].numpy(), (2.0 * tau @ rest).numpy(), rtol=1e-4)


def test_scoring_after_a_step_is_as_before(learning: Make) -> None:
    """A gradient step leaves nothing on the live model: no parameter requires gradients, and scores are the same."""
    problem = learning()
    before = [e.scores["e0"].value for e in problem.evaluate(problem.baselines(), "search")]
    gradients = problem.gradients(None)
    weights = Weights(gradients.coefficients())
    gradients.put(weights)
    gradients.loss("e0", "cross_entropy", range(4), weight=1.0)
    gradients.pull(weights)
    assert not any(p.requires_grad or p.grad is not None for p in problem.evaluator.arena.model.parameters())
    assert [e.scores["e0"].value for e in problem.evaluate(problem.baselines(), "search")] == before


@pytest.mark.parametrize(
    ("operator", "parameters", "message"),
    [
        ("ties", {"weight": 1.0, "density": {"low": 0.1, "high": 0.9}}, "'density' has no useful gradient"),
        ("task_arithmetic", {"weight": {"low": 0.0, "high": 1.0, "tie": True}}, "plain range"),
    ],
)
def test_what_cannot_be_learned_is_refused(learning: Make, operator: str, parameters: dict[str, Any], message: str) -> None:
    """Parameters without a useful gradient, and searches that a gradient step would not keep, are refused by name."""
    with pytest.raises(ConfigError, match=message):
        learning(operator, parameters=parameters).gradients(None).coefficients()


def test_a_function_brings_its_own_loss(vit_folders: tuple[Path, dict[str, Path]]) -> None:
    """A plain function of the live model is a loss like any other, and its gradient reaches the coefficients."""

    def loss(model: torch.nn.Module, items: object, device: torch.device) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in model.parameters()]).sum()

    objective = FunctionObjective("size", size, items=None, direction="minimize", differentiable=loss)
    gradients = MergeProblem(Pool(*vit_folders), "task_arithmetic", [objective], device="cpu").gradients(None)
    assert gradients.losses("size") == ("own",)
    weights = Weights(gradients.coefficients(weight=0.0))
    gradients.put(weights)
    assert gradients.loss("size", "own", [], weight=1.0).value > 0.0
    gradients.pull(weights)
    (leaf,) = weights.coefficients.parameters()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().min()) > 0.0


def test_a_loss_without_a_gradient_is_refused(vit_folders: tuple[Path, dict[str, Path]]) -> None:
    """A loss that does not depend on the weights is named before anything is learned from it; so is one that raises."""

    def still(model: torch.nn.Module, items: object, device: torch.device) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([p.square().sum() for p in model.parameters()]).sum()

    def broken(model: torch.nn.Module, items: object, device: torch.device) -> torch.Tensor:
        raise RuntimeError("boom")

    for loss, error, message in ((still, ConfigError, "does not depend on the model's weights"), (broken, CandidateError, "boom")):
        objective = FunctionObjective("size", size, items=None, direction="minimize", differentiable=loss)
        gradients = MergeProblem(Pool(*vit_folders), "task_arithmetic", [objective], device="cpu").gradients(None)
        gradients.put(Weights(gradients.coefficients()))
        with pytest.raises(error, match=f"objective 'size'.*{message}"):
            gradients.loss("size", "own", [], weight=1.0)
