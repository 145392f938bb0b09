"""Experts measured before a merge: on whose data, kept where, and what operators make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification, BertModel

from mergeopt.differentiable import Weights
from mergeopt.errors import CandidateError, ConfigError, DataError, RecipeError
from mergeopt.evaluation.activation_grams import linear_layers
from mergeopt.evaluation.diagonal_fisher import diagonal_fisher
from mergeopt.evaluation.measure import Measuring
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.evaluation.prefix import identity
from mergeopt.lineage import Lineage, Step
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.pool import Pool
from mergeopt.problem import Proposal
from mergeopt.recipe import Recipe
from mergeopt.statistics import ExpertStatistics
from mergeopt.study.optimize import optimize
from mergeopt.study.weights import make_tensors
from mergeopt.task import Objective
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.metrics import Accuracy
from mergeopt_problems.text_classification import TextClassification
from tests.problems.tiny_text import TEXTS, bert, wordpiece, write
from tests.tiny_models import write_folder

CPU = torch.device("cpu")
OPERATORS = ["fisher", "regmean"]
Folders = tuple[Path, dict[str, Path]]
Make = Callable[..., MergeProblem]


def images(seed: int, count: int = 12) -> ImageTask:
    """Noise, lighter or darker by its seed, so that layers see different inputs."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn((count, 1, 8, 8), generator=generator) * (1 + seed) + seed
    labels = torch.randint(0, 5, (count,), generator=generator)
    return ImageTask(name="noise", parts={"search": ImageItems(pixels, labels, settings={})}, batch=4)


def objectives(*experts: str | None) -> list[Objective]:
    return [TaskObjective(f"o{place}", images(place), Accuracy(), expert=expert) for place, expert in enumerate(experts)]


@pytest.fixture
def make(vit_folders: Folders, tmp_path: Path) -> Make:
    """Make a problem over the tiny ViTs whose two objectives name an expert each; what is measured is kept in the test's folder."""

    def made(operator: str, given: Sequence[Objective] | None = None, **options: Any) -> MergeProblem:
        problem = MergeProblem(Pool(*vit_folders), operator, given or objectives("e0", "e1"), device="cpu", **options)
        problem.statistics.keep(tmp_path / "statistics")
        return problem

    return made


def keep(seen: dict[str, torch.Tensor], name: str, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    seen[name] = given[0].detach()


def row_of(problem: MergeProblem, recipe: Recipe) -> torch.Tensor:
    problem.evaluator.model(recipe)
    return problem.evaluator.arena.rows[0].clone()


def weighted(problem: MergeProblem, *weights: float) -> Recipe:
    return problem.decode(problem.coefficients.weighted(dict(zip(problem.pool.expert_names, weights, strict=True))))


def statistics_of(recipe: Recipe) -> ExpertStatistics:
    assert recipe.statistics is not None
    return ExpertStatistics(recipe.statistics.path)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_expert_alone_is_that_expert(make: Make, operator: str) -> None:
    """Weight on one expert alone makes its stored weights bit for bit."""
    problem = make(operator)
    for k, expert in enumerate(problem.pool.expert_names):
        weights = [0.0, 0.0]
        weights[k] = 0.7
        assert torch.equal(row_of(problem, weighted(problem, *weights)), row_of(problem, problem.alone(expert)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_candidates_are_made_alike_everywhere(make: Make, operator: str) -> None:
    """Alone in the arena, tensor by tensor, and from the recipe as JSON, a candidate has the same bits; another mixture has others."""
    problem = make(operator)
    recipe = weighted(problem, 0.3, 0.8)
    row = row_of(problem, recipe)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    tensors = dict(make_tensors(problem.pool, again))
    for segment in problem.layout.segments:
        assert torch.equal(tensors[segment.name], row[segment.start : segment.end].view(segment.shape)), segment.name
    assert not torch.equal(row_of(problem, weighted(problem, 0.5, 0.5)), row)
    (evaluation,) = problem.evaluate([Proposal("x", recipe=again)], "search")
    assert evaluation.error is None


def test_each_expert_is_measured_on_its_own_data(make: Make) -> None:
    """The stored information of an expert is that of its checkpoint, on the items of the objectives that name it, and on no others."""
    given = [*objectives("e1", "e0"), FunctionObjective("f", lambda m, i, d: 0.0, items=None, direction="minimize", expert="e1")]
    problem = make("fisher", given, measuring=Measuring(items=5, seed=3))
    found = statistics_of(weighted(problem, 1.0, 1.0))
    for place, (expert, seed) in enumerate({"e0": 1, "e1": 0}.items()):
        model = problem.pool.architecture.load(problem.pool.experts[expert], torch.float32).requires_grad_(False)
        chosen = sorted(np.random.default_rng(3).permutation(12)[:5].tolist())
        named = {name: model.get_parameter(live) for name, live in problem.pool.tensors.live.items()}
        task = images(seed)
        expected = dict(zip(named, diagonal_fisher(model, list(named.values()), [(task, i) for i in chosen], CPU), strict=True))
        norm = sum(float(tensor.double().square().sum()) for tensor in expected.values()) ** 0.5
        assert found.norms[place] == pytest.approx(norm, rel=1e-4)
        for name, tensor in expected.items():
            measured = found.of(name).fisher
            assert measured is not None
            torch.testing.assert_close(measured[place], tensor, rtol=1e-3, atol=1e-5 * float(tensor.max()))


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_regmean_comes_nearer_to_the_experts_outputs(make: Make, alpha: float) -> None:
    """On the very inputs that were measured, merged linear layers lie nearer to the experts' outputs than averaged ones, layer by layer."""
    problem = make("regmean", parameters={"alpha": alpha})
    merged = dict(make_tensors(problem.pool, problem.decode(np.empty(0))))
    average = {name: problem.pool.stack(name).mean(dim=0) for name in problem.pool.names}
    errors = {"merged": 0.0, "average": 0.0}
    worse = 0
    for place, expert in enumerate(problem.pool.expert_names):
        model = problem.pool.architecture.load(problem.pool.experts[expert], torch.float32)
        layers = linear_layers(model, {name: model.get_parameter(live) for name, live in problem.pool.tensors.live.items()})
        assert len(layers) == 13
        seen: dict[str, torch.Tensor] = {}
        for layer in layers:
            layer.module.register_forward_pre_hook(partial(keep, seen, layer.name))
        with torch.no_grad():
            model(images(place).items("search").pixels)
        for layer in layers:
            wanted = problem.pool.stack(layer.name)[place]
            per_layer = {}
            for kind, weights in (("merged", merged), ("average", average)):
                per_layer[kind] = float(F.linear(seen[layer.name], weights[layer.name] - wanted).square().mean())
                errors[kind] += per_layer[kind]
            worse += per_layer["merged"] > per_layer["average"]
    assert errors["merged"] < (0.95 if alpha < 1 else 0.75) * errors["average"]
    assert worse < 13  # an expert's own error may grow where the other's shrinks by more


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_those_of_finite_differences(make: Make, operator: str) -> None:
    """The gradient that reaches searched parameters through the whole model is the slope of the loss."""
    problem = make(operator, groups="layer")
    gradients = problem.gradients(None)
    coefficients = gradients.coefficients()
    leaves = coefficients.parameters()
    rng = np.random.default_rng(0)
    start = [torch.from_numpy(rng.uniform(0.2, 0.8, leaf.shape)) for leaf in leaves]
    along = [torch.zeros_like(leaf) for leaf in leaves]

    def loss(step: float, weight: float | None = None) -> float:
        with torch.no_grad():
            for leaf, at, direction in zip(leaves, start, along, strict=True):
                leaf.copy_(at + step * direction)
        gradients.put(Weights(coefficients))
        return gradients.loss("o1", "cross_entropy", range(12), weight=weight).value

    loss(0.0, 1.0)
    gradients.pull(Weights(coefficients))
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    assert len(found) == len(leaves)
    length = sum(float(gradient.square().sum()) for gradient in found) ** 0.5
    for at, gradient in zip(along, found, strict=True):
        at.copy_(gradient / length)  # uphill, where the slope is the gradient's length
    assert length == pytest.approx((loss(0.05) - loss(-0.05)) / 0.1, rel=0.03)
    along[0].copy_(torch.roll(along[0], 1, 0))
    sideways = sum(float((gradient * direction).sum()) for gradient, direction in zip(found, along, strict=True))
    assert sideways == pytest.approx((loss(0.05) - loss(-0.05)) / 0.1, rel=0.05, abs=0.02 * length)


def test_what_was_measured_is_found_again(make: Make, tmp_path: Path) -> None:
    """The same experts, data and settings take what is kept; another seed, other items, other labels or data are measured anew."""
    first = weighted(make("fisher"), 0.5, 0.5)
    stamp = {file: file.stat().st_mtime_ns for file in (tmp_path / "statistics").rglob("*")}
    again = weighted(make("fisher"), 0.5, 0.5)
    assert again == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "statistics").rglob("*")} == stamp
    others = [
        weighted(make("fisher", measuring=Measuring(items=7)), 0.5, 0.5),
        weighted(make("fisher", measuring=Measuring(items=7, seed=1)), 0.5, 0.5),
        weighted(make("fisher", measuring=Measuring(labels="data")), 0.5, 0.5),
        weighted(make("fisher", objectives("e1", "e0")), 0.5, 0.5),
        weighted(make("fisher", measuring=Measuring(tasks={"e0": [images(4)], "e1": [images(5)]})), 0.5, 0.5),
    ]
    assert len({statistics_of(recipe).hash for recipe in (first, *others)}) == 6
    assert len({recipe.key for recipe in (first, *others)}) == 6


def test_other_statistics_make_another_model(make: Make) -> None:
    """Recipes that are equal but for their statistics are scored each, also side by side and with memory of earlier models."""
    problem, other = make("fisher", prefixes=1 << 24), make("fisher", measuring=Measuring(seed=1, items=3))
    recipes = [weighted(problem, 0.4, 0.6), weighted(other, 0.4, 0.6)]
    assert recipes[0] == replace(recipes[1], statistics=recipes[0].statistics)
    values = [problem.evaluator.values(problem.operator, recipe) for recipe in recipes]
    assert identity(recipes[0], values[0], 10).all_tensors != identity(recipes[1], values[1], 10).all_tensors
    first, second = problem.evaluate([Proposal("x", recipe=recipe) for recipe in recipes], "search")
    (alone,) = other.evaluate([Proposal("x", recipe=recipes[1])], "search")
    losses = [evaluation.scores["o1"].records["loss"] for evaluation in (first, second, alone)]
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-6)
    assert float(np.abs(losses[0] - losses[1]).max()) > 1e-5


def test_recipes_of_other_statistics_have_no_genome(make: Make) -> None:
    """A recipe over statistics that were measured otherwise, or are gone, is no point of this search; one of the same is."""
    problem, other = make("fisher"), make("fisher", measuring=Measuring(items=3))
    recipe = weighted(problem, 0.4, 0.6)
    assert problem.decode(problem.encode(recipe)) == recipe
    with pytest.raises(ConfigError, match=r"its statistics \w+\.\.\. \(.*\) were measured otherwise: items is 3, here 256"):
        problem.encode(weighted(other, 0.4, 0.6))
    assert recipe.statistics is not None
    with pytest.raises(RecipeError, match="cannot read the statistics"):
        problem.encode(replace(recipe, statistics=replace(recipe.statistics, path="gone")))


def test_settings_are_part_of_the_problem(make: Make) -> None:
    """Problems that measure differently have different fingerprints; nothing is measured to know them, or for operators without need."""
    made = [make("fisher"), make("fisher", measuring=Measuring(items=7)), make("fisher", objectives("e1", "e0")), make("regmean")]
    assert len({problem.info.fingerprint for problem in made}) == 4
    assert make("linear").info.fingerprint == make("linear", measuring=Measuring(items=7)).info.fingerprint
    recipe = weighted(make("linear"), 0.5, 0.5)
    assert recipe.statistics is None
    assert "statistics" not in recipe.to_json()


@pytest.mark.parametrize("operator", OPERATORS)
def test_members_that_evolved_take_the_experts_statistics(make: Make, operator: str) -> None:
    """A recipe with a lineage merges the members with what was measured of the experts they began as, in memory and tensor by tensor."""
    problem = make(operator)
    lineage = Lineage(("e0", "e1")).child(Step(0, ((1, 0),), scale=0.5, rate=0.9, seed=3))
    recipe = problem.members().merged(lineage)
    assert recipe.statistics == problem.merged().statistics
    row = row_of(problem, recipe)
    assert not torch.equal(row, row_of(problem, problem.merged()))
    tensors = dict(make_tensors(problem.pool, recipe))
    for segment in problem.layout.segments:
        assert torch.equal(tensors[segment.name], row[segment.start : segment.end].view(segment.shape)), segment.name


def test_a_run_says_that_statistics_grow_stale(make: Make, tmp_path: Path) -> None:
    """A run that evolves members before it merges them stores a warning, and its recipes hold lineage and statistics; others do not."""
    problem = make("fisher")
    run = optimize(problem, "evolver-joint", budget=3, out=tmp_path / "evolved")
    assert [warning for warning in run.warnings if "it grows stale as they change" in warning] != []
    evolved = [trial.recipe for trial in run.trials if trial.recipe is not None and trial.recipe.lineage is not None]
    assert evolved
    assert all(recipe.statistics == problem.merged().statistics for recipe in evolved)
    plain = optimize(make("fisher"), "random", budget=2, out=tmp_path / "plain")
    assert not any("stale" in warning for warning in plain.warnings)


@pytest.mark.parametrize("operator", OPERATORS)
def test_experts_with_heads_of_their_own_are_measured_with_them(operator: str, tmp_path: Path) -> None:
    """Where heads are separate, each expert is measured through its own head, and an expert alone is that expert's body."""
    labels = {"e0": ["a", "b", "c"], "e1": ["x", "y"]}
    base = write_folder(partial(bert, BertModel, []), tmp_path / "base", 0)
    experts = {
        name: write_folder(partial(bert, BertForSequenceClassification, own), tmp_path / name, place)
        for place, (name, own) in enumerate(labels.items(), 1)
    }
    given: list[Objective] = []
    for name, own in labels.items():
        rows = [{"text": text, "label": k % len(own), "split": "val"} for k, text in enumerate(TEXTS)]
        source = {"path": write(tmp_path, rows, f"{name}.jsonl"), "search": "val"}
        task = TextClassification(data=source, tokenizer=wordpiece(tmp_path / "tokenizer"))
        given.append(TaskObjective(name, task, Accuracy(), expert=name))
    problem = MergeProblem(Pool(base, experts, heads="separate"), operator, given, device="cpu")
    problem.statistics.keep(tmp_path / "statistics")
    assert torch.equal(row_of(problem, weighted(problem, 0.0, 1.0)), row_of(problem, problem.alone("e1")))
    (evaluation,) = problem.evaluate([Proposal("x", recipe=weighted(problem, 0.5, 0.5))], "search")
    assert evaluation.error is None
    assert sorted(evaluation.scores) == ["e0", "e1"]


def test_memory_counts_gram_matrices(make: Make) -> None:
    """What is predicted for Gram matrices is what their files hold, but for weights that turn out to share one."""
    problem = make("regmean")
    found = statistics_of(weighted(problem, 0.5, 0.5))
    grams = {name: found.of(name).gram for name in problem.pool.names}
    held = sum(gram.numel() * 4 for gram in grams.values() if gram is not None)
    assert problem.memory()["statistics"] == held
    shared = {id(gram): gram.numel() * 4 for gram in grams.values() if gram is not None}
    assert sum(shared.values()) < held
    assert "statistics" not in make("fisher").memory()


def regression() -> Objective:
    return FunctionObjective("f", lambda model, items, device: 0.0, items=None, direction="minimize", expert="e1")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (objectives("e0", None), r"no objective with a task says `expert: e1`; add that line"),
        ([*objectives("e0"), regression()], r"no objective with a task says `expert: e1`"),
    ],
)
def test_an_expert_without_data_is_refused(make: Make, given: list[Objective], message: str) -> None:
    """Every expert needs an objective with data that names it; the message says which has none and what to do."""
    with pytest.raises(ConfigError, match=message):
        make("regmean", given)
    make("linear", given)


class Counted:
    """A task without class probabilities."""

    name = "counted"

    def __init__(self) -> None:
        inner = images(0)
        self.items, self.parts, self.check, self.records = inner.items, inner.parts, inner.check, inner.records


def test_fisher_needs_class_probabilities(make: Make) -> None:
    """A task that classifies nothing has no Fisher information, which is said; its inputs can be multiplied all the same."""
    given = [TaskObjective(name, Counted(), Accuracy(), expert=name) for name in ("e0", "e1")]
    with pytest.raises(
        ConfigError, match="needs the class probabilities that expert 'e0' predicts, which the task 'counted' does not give"
    ):
        make("fisher", given)
    name = "vit.encoder.layer.1.intermediate.dense.weight"
    found, other = (statistics_of(weighted(make("regmean", which), 0.5, 0.5)).of(name).gram for which in (given, objectives("e0", "e1")))
    assert found is not None
    assert other is not None
    torch.testing.assert_close(found[0], other[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], other[1])


def test_what_is_not_finite_is_named(vit_folders: Folders, tmp_path: Path) -> None:
    """Gradients that overflow float16 are refused with the expert's name, and nothing is kept."""
    problem = MergeProblem(Pool(*vit_folders), "fisher", objectives("e0", "e1"), device="cpu", dtype="float16")
    problem.statistics.keep(tmp_path / "statistics")
    for task in (one.task for one in problem.objectives if isinstance(one, TaskObjective)):
        task.items("search").pixels.mul_(6e4)  # type: ignore[attr-defined]
    with pytest.raises((DataError, CandidateError), match="not finite"):
        problem.decode(np.full(2, 0.5))
    assert list((tmp_path / "statistics").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"), [({"items": 0}, "items: expected"), ({"seed": -1}, "seed: "), ({"labels": "x"}, "labels: ")]
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    """Numbers out of range and unknown labels are refused by name."""
    with pytest.raises(ConfigError, match=f"merge: statistics: {message}"):
        Measuring(**options)


def test_recipes_without_the_right_statistics_are_refused(make: Make) -> None:
    """A recipe that names none, another kind, or statistics that lie no more where it says cannot be made; each is said."""
    problem = make("regmean")
    recipe = weighted(problem, 0.5, 0.5)
    with pytest.raises(RecipeError, match="names no statistics of its experts, which operator 'regmean' works on"):
        problem.evaluator.model(replace(recipe, statistics=None))
    with pytest.raises(RecipeError, match=r"works on the statistic 'gram', .* holds fisher"):
        dict(make_tensors(problem.pool, replace(recipe, statistics=weighted(make("fisher"), 0.5, 0.5).statistics)))
    assert recipe.statistics is not None
    with pytest.raises(RecipeError, match="if they lie elsewhere by now, a recipe is made with --map statistics=PATH"):
        dict(make_tensors(problem.pool, recipe.relocated({"statistics": "/nowhere"})))
    swapped = replace(recipe, experts=recipe.experts[::-1])
    with pytest.raises(RecipeError, match="holds statistics of other experts than e1, e0"):
        dict(make_tensors(problem.pool, swapped))
