from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AlbertConfig, AlbertForSequenceClassification, BertForSequenceClassification, BertForTokenClassification

import mergeopt as mo
from mergeopt.errors import ConfigError
from mergeopt.evaluation.layer_major import LayerMajor
from mergeopt.evaluation.materialize import TensorMaker
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.evaluation.racing import Racing
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.find import find_operator
from mergeopt.problem import Proposal
from mergeopt.registry import load
from tests.evaluation.shared_layers import Family, bits, parted, scored
from tests.problems.batched import KINDS, TAGS, Asked, causal_lm, text_classification, token_classification
from tests.problems.tiny_text import bert

CPU = torch.device("cpu")
PLENTY = 1 << 30
RACING = {"rule": "sequential", "first": 2, "z": 1.0}

pytestmark = pytest.mark.usefixtures("cache")


def both(family: Family, operator: str = "task_arithmetic", **options: Any) -> tuple[MergeProblem, MergeProblem]:
    """Return a problem that scores whole candidates, and the same that scores layer by layer."""
    return family.problem(operator, **options), family.problem(operator, scoring="layers", **options)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_scores_are_those_of_whole_models(kind: Callable[[Path], Asked], tmp_path: Path) -> None:
    """Every record of every candidate is the same to the last bit, among recipes of other kinds, and whatever is scored together."""
    family = Family.made(kind, tmp_path)
    whole, layers = both(family)
    proposals = [*layers.baselines(), *(Proposal("x", genome) for genome in parted(whole, [0, 2, 1]))]
    expected = bits(list(whole.evaluate(proposals, "search")))
    assert len({str(own) for own in expected}) == len(proposals)
    assert bits(list(layers.evaluate(proposals, "search"))) == expected
    alone = family.problem(scoring="layers", batch=1)
    assert bits(list(alone.evaluate(proposals[-2:], "search"))) == expected[-2:]


@pytest.mark.parametrize("operator", ["linear", "ties", "dare_ties", "della", "slerp"])
def test_every_kind_of_plan(operator: str, tmp_path: Path) -> None:
    """Scores are those of whole models whatever rule makes the weights."""
    whole, layers = both(Family.made(text_classification, tmp_path), operator)
    genomes = parted(whole, [0, 0])
    expected = bits(scored(whole, genomes))
    assert len({str(own) for own in expected}) == 3
    assert bits(scored(layers, genomes)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types(dtype: str, tmp_path: Path) -> None:
    """Scores in a narrow type are those of whole models of that type; one that overflows fails alone, for the same reason."""
    search = {"weight": {"low": 0.0, "high": 1e7}}
    whole, layers = both(Family.made(causal_lm, tmp_path), dtype=dtype, parameters=search)
    genomes = [np.full(whole.coefficients.space.dim, value) for value in (5e-8, 1.0, 2e-8)]
    expected, found = scored(whole, genomes), scored(layers, genomes)
    assert [e.error for e in found] == [e.error for e in expected]
    assert ("overflow" in str(found[1].error)) == (dtype == "float16")
    assert bits([found[0], found[2]]) == bits([expected[0], expected[2]])


def test_heads_that_stay_apart(tmp_path: Path) -> None:
    """Where experts keep their heads, each task is scored on its own model, and all go through a shared layer together."""
    texts, tags = text_classification(tmp_path), token_classification(tmp_path)
    models = {"texts": bert(BertForSequenceClassification, "abc"), "tags": bert(BertForTokenClassification, TAGS)}
    for seed, (name, model) in enumerate(models.items()):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
    bert(BertForSequenceClassification, "abc").save_pretrained(tmp_path / "base")
    pool = Pool(tmp_path / "base", {name: tmp_path / name for name in models}, heads="separate")
    objectives = [
        TaskObjective(name, asked.task, load("metrics", metric)(), expert=name)
        for name, asked, metric in (("texts", texts, "cross_entropy"), ("tags", tags, "token_loss"))
    ]
    whole, layers = (
        MergeProblem(pool, "task_arithmetic", objectives, groups="layer", device="cpu", scoring=scoring)
        for scoring in ("candidates", "layers")
    )
    genomes = np.random.default_rng(0).uniform(0.1, 0.9, (3, whole.coefficients.space.dim))
    expected = bits(scored(whole, list(genomes)))
    assert len({str(own) for own in expected}) == 3
    assert bits(scored(layers, list(genomes))) == expected


def test_weights_are_never_there_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live model is hollow, and no more of the candidates is there at any time than a layer and what lies outside of layers."""
    problem = Family.made(text_classification, tmp_path).problem(scoring="layers", batch=2)
    scorer = problem._scorer
    assert isinstance(scorer, LayerMajor)
    (live,) = scorer._lives.values()
    assert not any(any(parameter.stride()) for parameter in live.model.parameters())
    weak: Any = StorageWeakRef
    made: list[tuple[Any, int]] = []
    there: list[int] = []
    make = TensorMaker.make

    def watched(maker: TensorMaker, index: int) -> torch.Tensor:
        tensor = make(maker, index)
        made.append((weak(tensor.untyped_storage()), tensor.nbytes))
        there.append(sum(size for storage, size in made if not storage.expired()))
        return tensor

    monkeypatch.setattr(TensorMaker, "make", watched)
    assert [e.error for e in scored(problem, parted(problem, [0]))] == [None, None]
    sizes: dict[str, int] = {}
    for segment in problem.layout.segments:
        sizes[segment.layer] = sizes.get(segment.layer, 0) + 2 * 4 * (segment.end - segment.start)
    outside = sizes.pop("embeddings") + sizes.pop("head")
    assert max(there) == outside + max(sizes.values()) < outside + sum(sizes.values())
    assert all(storage.expired() for storage, _ in made)
    assert not any(any(parameter.stride()) for parameter in live.model.parameters())


@pytest.mark.parametrize(
    ("memory", "racing"), [({"scoring": "layers"}, None), ({"prefixes": PLENTY}, None), ({"prefixes": PLENTY}, RACING)]
)
def test_a_search_goes_the_same_way(memory: Mapping[str, Any], racing: Mapping[str, Any] | None, tmp_path: Path) -> None:
    """A search that scores by layers, or reuses shared ones, tries the same candidates to the same scores as one that does neither."""
    family = Family.made(text_classification, tmp_path)
    found = []
    for name, options in (("plain", {}), ("other", memory)):
        problem = family.problem(batch=3, **options)
        run = mo.optimize(problem, strategy=load("strategies", "nsga2")(pop_size=4), budget=12, seed=0, racing=racing, out=tmp_path / name)
        scores = [trial.scores.get("search") for trial in run.trials]
        values = [None if own is None else own["score"].value for own in scores]
        found.append([(trial.key, trial.censored is not None, value) for trial, value in zip(run.trials, values, strict=True)])
    assert len(found[0]) > 12
    assert any(censored for _, censored, _ in found[0]) == (racing is not None)
    assert found[0] == found[1]


def test_what_needs_whole_models_is_refused(tmp_path: Path) -> None:
    """Functions, racing, learning, evolving and reuse say that they need whole candidates; so do models that cannot be cut."""
    family = Family.made(text_classification, tmp_path)
    function = FunctionObjective("size", lambda model, items, device: 1.0, items=None, direction="minimize")
    with pytest.raises(ConfigError, match=r"memory: scoring: layers: the objective 'size' is a function of a whole model"):
        scored(family.problem(objective=function, scoring="layers"), [np.zeros(10)])
    problem = family.problem(scoring="layers")
    for refused in (lambda: problem.race(Racing(), seed=0), problem.members, lambda: problem.gradients(None)):
        with pytest.raises(ConfigError, match="no candidate is in memory as a whole"):
            refused()
    with pytest.raises(ConfigError, match="leave one of the two out"):
        family.problem(scoring="layers", prefixes=1000)


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    """A model whose layers run several times is refused with its class."""
    asked = text_classification(tmp_path)
    config = AlbertConfig(
        vocab_size=90, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=48, id2label=dict(enumerate("abc")),
    )  # fmt: skip
    folders = [tmp_path / name for name in ("base", "e0", "e1")]
    for folder in folders:
        AlbertForSequenceClassification(config).save_pretrained(folder)
    objective = TaskObjective("loss", asked.task, load("metrics", "cross_entropy")())
    layout = Layout(Pool(folders[0], folders[1:]))
    with pytest.raises(ConfigError, match="AlbertForSequenceClassification cannot be cut at its layers"):
        LayerMajor(layout, [objective], find_operator, dtype=torch.float32, device=CPU, batch=2, threads=1)
