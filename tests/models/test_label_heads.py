from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mergeopt.errors import ConfigError, MismatchError, RecipeError, SourceError
from mergeopt.evaluation.objectives import FunctionObjective
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.pool import Pool
from mergeopt.problem import Proposal
from mergeopt.study.export import export_model
from mergeopt.study.merge import merge_recipe
from mergeopt.task import Items
from tests.tiny_models import edit_config, edit_weights, tiny_bert, write_folder

CPU = torch.device("cpu")
TOKENS = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
MOODS, SIDES = ("joy", "fear", "anger"), ("anger", "calm", "joy", "pride")
LABELS = ["joy", "fear", "anger", "calm", "pride"]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a model's folder under a name, its weights different for every name."""

    def written(name: str, build: Callable[..., PreTrainedModel] = tiny_bert, *arguments: Any, **changes: Any) -> Path:
        return write_folder(partial(build, *arguments, **changes), tmp_path / name, sum(map(ord, name)))

    return written


@pytest.fixture
def pool(write: Write) -> Pool:
    """A base without head, and two classifiers that share two labels, in another order."""
    experts = {"moods": write("moods", tiny_bert, BertForSequenceClassification, MOODS)}
    experts["sides"] = write("sides", tiny_bert, BertForSequenceClassification, SIDES)
    return Pool(write("base", tiny_bert, BertModel), experts, heads="by_label")


def own_rows(pool: Pool, expert: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the row of each label in an expert's file."""
    return dict(zip(names, Checkpoint(pool.experts[expert].path).read("classifier.weight"), strict=True))


def logits(model: torch.nn.Module, items: Items | None, device: torch.device) -> float:
    found: float = model(TOKENS).logits.double().square().sum().item()
    return found


def problem(pool: Pool, operator: str = "task_arithmetic", **options: Any) -> MergeProblem:
    return MergeProblem(pool, operator, [FunctionObjective("f", logits, items=None, direction="minimize")], device="cpu", **options)


def test_one_head_has_the_labels_of_all(pool: Pool) -> None:
    """The model that is made names all labels once, in the order of their first occurrence, and every tensor of it is merged."""
    assert pool.architecture.skeleton().config.id2label == dict(enumerate(LABELS))  # type: ignore[union-attr]
    assert pool.spec("classifier.weight").shape == (5, 16)
    assert sorted(pool.names) == list(Checkpoint(pool.experts["moods"].path).names)
    assert pool.experts["sides"].hash == Checkpoint(pool.experts["sides"].path).hash
    assert pool.labelled is not None
    assert pool.labelled.places("sides") == [2, 3, 0, 4]


def test_rows_are_averaged_over_those_that_know_them(pool: Pool) -> None:
    """The base's head is the mean of the experts that know a label; an expert says of a label that it does not know what that mean says."""
    moods, sides = own_rows(pool, "moods", MOODS), own_rows(pool, "sides", SIDES)
    base, stack = pool.read_base("classifier.weight"), pool.stack("classifier.weight")
    for index, label in enumerate(LABELS):
        knowing = [rows[label] for rows in (moods, sides) if label in rows]
        torch.testing.assert_close(base[index], torch.stack(knowing).mean(0))
        for place, rows in enumerate((moods, sides)):
            assert torch.equal(stack[place, index], rows.get(label, base[index]))


@pytest.mark.parametrize(
    ("operator", "options"), [("task_arithmetic", {}), ("linear", {}), ("ties", {"density": 1.0}), ("dare_linear", {"density": 0.5})]
)
def test_a_label_that_one_expert_knows_keeps_its_row(pool: Pool, operator: str, options: dict[str, float]) -> None:
    """Whatever the operator and its weights, rows of labels that one expert knows are that expert's."""
    made = problem(pool, operator, parameters={"weight": {"low": 0.1, "high": 1.0}, **options})
    for genome in made.info.space.sample(np.random.default_rng(0), 3):
        weight = made.evaluator.model(made.decode(genome)).get_parameter("classifier.weight")
        for expert, names in (("moods", MOODS), ("sides", SIDES)):
            rows = own_rows(pool, expert, names)
            for label in {"fear", "calm", "pride"} & set(rows):
                torch.testing.assert_close(weight[LABELS.index(label)], rows[label], rtol=1e-5, atol=1e-6)


def test_shared_labels_follow_the_weights(pool: Pool) -> None:
    """With weights that add up to one, a row that both experts know is their weighted mean; with all on one it is that one's exactly."""
    made = problem(pool)
    moods, sides = own_rows(pool, "moods", MOODS), own_rows(pool, "sides", SIDES)
    for first in (0.0, 0.3, 1.0):
        recipe = made.decode(made.coefficients.weighted({"moods": first, "sides": 1.0 - first}))
        weight = made.evaluator.model(recipe).get_parameter("classifier.weight")
        for label in ("joy", "anger"):
            torch.testing.assert_close(weight[LABELS.index(label)], first * moods[label] + (1 - first) * sides[label], rtol=1e-5, atol=1e-6)
            if first in (0.0, 1.0):
                assert torch.equal(weight[LABELS.index(label)], (moods if first else sides)[label])


def test_an_expert_alone_answers_as_itself(pool: Pool) -> None:
    """The model of one expert alone gives its labels the logits that the expert gives them."""
    made = problem(pool)
    for name, names in (("moods", MOODS), ("sides", SIDES)):
        model = made.evaluator.model(made.alone(name))
        expert = AutoModelForSequenceClassification.from_pretrained(pool.experts[name].path).eval()
        with torch.no_grad():
            own = model(TOKENS).logits[:, [LABELS.index(label) for label in names]]
            torch.testing.assert_close(own, expert(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_it_is_written_and_made_again(pool: Pool, tmp_path: Path) -> None:
    """The folder names all labels, scores what the search scored, and its recipe makes it again."""
    made = problem(pool, groups="layer")
    recipe = made.decode(made.info.space.sample(np.random.default_rng(1), 1)[0])
    (evaluation,) = made.evaluate([Proposal("x", recipe=recipe)], "search")
    report = export_model(pool, recipe, tmp_path / "model", objectives=made.objectives, promised={"f": evaluation.scores["f"].value})
    assert report.exact
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        assert logits(model, None, CPU) == evaluation.scores["f"].value
    merge_recipe(tmp_path / "model/recipe.json", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    edit_config(Path(pool.experts["sides"].path), id2label={str(place): label for place, label in enumerate(SIDES[::-1])}, label2id=None)
    with pytest.raises(
        RecipeError, match="expert 'sides' names its labels pride, joy, calm, anger, this recipe was made when they were anger"
    ):
        merge_recipe(tmp_path / "model/recipe.json", tmp_path / "other")
    assert made.encode(recipe).tolist() == pytest.approx(made.info.space.sample(np.random.default_rng(1), 1)[0].tolist())


def test_layers_of_a_head_without_labels(write: Write) -> None:
    """A dense layer in front of the classifier, which began at random, is merged around the experts' mean, though the base lacks it."""
    config: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }

    def roberta(labels: tuple[str, ...]) -> PreTrainedModel:
        return RobertaForSequenceClassification(RobertaConfig(**config, pad_token_id=0, id2label=dict(enumerate(labels))))

    experts = {name: write(name, partial(roberta, labels)) for name, labels in (("moods", MOODS), ("sides", SIDES))}
    pool = Pool(write("base", lambda: roberta(MOODS).roberta), experts, heads="by_label")
    both = [Checkpoint(path).read("classifier.dense.weight") for path in experts.values()]
    torch.testing.assert_close(pool.read_base("classifier.dense.weight"), torch.stack(both).mean(0))
    assert torch.equal(pool.stack("classifier.dense.weight"), torch.stack(both))
    assert pool.spec("classifier.out_proj.weight").shape == (5, 16)


def test_heads_that_cannot_become_one_are_refused(write: Write, pool: Pool) -> None:
    """Labels without names, two of one name, other classes, other settings of the head and heads that are not finite are refused."""
    base, experts = pool.base.path, {name: Path(expert.path) for name, expert in pool.experts.items()}
    unnamed = write("unnamed", tiny_bert, id2label=None, label2id=None, num_labels=3)
    with pytest.raises(ConfigError, match=r"expert 'unnamed' .* does not name its own \(LABEL_0, LABEL_1, LABEL_2\); set id2label"):
        Pool(base, {"unnamed": unnamed}, heads="by_label")
    with pytest.raises(MismatchError, match="expert 'tags' is of class BertForTokenClassification, expert 'moods' of BertForSequence"):
        Pool(base, experts | {"tags": write("tags", tiny_bert, BertForTokenClassification, ("O", "B-PER"))}, heads="by_label")
    with pytest.raises(ConfigError, match="share one head"):
        pool.heads_asked("moods")
    edit_weights(experts["sides"], lambda tensors: tensors["classifier.weight"][0].fill_(torch.nan))
    with pytest.raises(SourceError, match=r"expert 'sides' .* holds NaN or infinite values in classifier.weight"):
        Pool(base, experts, heads="by_label").stack("classifier.weight")
    edit_config(experts["moods"], id2label={"0": "joy", "1": "joy", "2": "anger"}, label2id=None)
    with pytest.raises(ConfigError, match="expert 'moods' has two labels called 'joy'"):
        Pool(base, experts, heads="by_label")
