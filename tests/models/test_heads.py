from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from mergeopt.errors import ConfigError, MismatchError
from mergeopt.evaluation.arena import CandidateArena
from mergeopt.models.checkpoint import Checkpoint
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from tests.tiny_models import Cnn, edit_weights, tiny_bert, tiny_gpt2, tiny_vit, write_folder, write_module

EMOTIONS, TOPICS, TAGS = ("joy", "fear", "anger", "love", "sadness", "surprise"), ("sport", "world"), ("O", "B-PER", "I-PER")
CPU = torch.device("cpu")
TOKENS = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 0]])
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a model's folder under a name, its weights different for every name."""

    def written(name: str, build: Callable[..., PreTrainedModel] = tiny_bert, *arguments: Any, **changes: Any) -> Path:
        return write_folder(partial(build, *arguments, **changes), tmp_path / name, sum(map(ord, name)))

    return written


@pytest.fixture
def classifiers(write: Write) -> dict[str, Path]:
    return {
        "emotion": write("emotion", tiny_bert, BertForSequenceClassification, EMOTIONS),
        "topic": write("topic", tiny_bert, BertForSequenceClassification, TOPICS),
    }


def outside(names: tuple[str, ...] | list[str], *parts: str) -> list[str]:
    """Return the names that contain none of these parts."""
    return sorted(name for name in names if not any(part in name for part in parts))


def accounted(pool: Pool) -> dict[str, list[str]]:
    """Return what every source's coverage names, under the names that the source stores."""
    shared = (*pool.coverage.merged, *pool.coverage.copied, *pool.coverage.excluded)
    return {
        source: sorted([*(pool.stored(source, name) for name in shared), *pool.coverage.heads[source]])
        for source in ("base", *pool.experts)
    }


def test_heads_of_other_labels_stay_apart(write: Write, classifiers: Mapping[str, Path]) -> None:
    """Classifiers of six and of two labels share all but their classifier; every stored tensor of every source is named once."""
    base = write("base")
    pool = Pool(base, classifiers, heads="separate")
    assert sorted(pool.names) == outside(Checkpoint(base).names, "classifier")
    assert [sorted(names) for names in pool.coverage.heads.values()] == [["classifier.bias", "classifier.weight"]] * 3
    assert accounted(pool) == {name: list(c.names) for name, c in {"base": pool.base, **pool.experts}.items()}
    assert torch.equal(pool.stack(pool.names[0])[1], Checkpoint(classifiers["topic"]).read(pool.names[0]))
    with pytest.raises(MismatchError, match=r"classifier.weight: shape \[3, 16\] in the base, \[6, 16\] in expert 'emotion'"):
        Pool(base, classifiers)


def test_other_classes_share_what_both_have(write: Write, classifiers: Mapping[str, Path]) -> None:
    """A sequence and a token classifier share the body without the pooler, which only the former has and keeps with its head."""
    experts = {"ner": write("ner", tiny_bert, BertForTokenClassification, TAGS), "topic": classifiers["topic"]}
    pool = Pool(write("base"), experts, heads="separate")
    assert sorted(pool.names) == outside(pool.base.names, "classifier", "pooler")
    assert outside(pool.coverage.heads["topic"], "classifier") == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert outside(pool.coverage.heads["ner"], "classifier") == []
    assert accounted(pool)["topic"] == list(pool.experts["topic"].names)


def test_a_base_without_head(write: Write, classifiers: Mapping[str, Path]) -> None:
    """The bare model is base of classifiers, although its tensors are stored without their prefix; it has nothing that is not used."""
    base = write("base", tiny_bert, BertModel)
    pool = Pool(base, classifiers, heads="separate")
    name = "bert.pooler.dense.weight"
    assert name in pool.names
    assert torch.equal(pool.read_base(name), Checkpoint(base).read("pooler.dense.weight"))
    assert pool.coverage.heads["base"] == ()


def test_a_base_with_another_head(write: Write, classifiers: Mapping[str, Path]) -> None:
    """A masked language model is base of classifiers: its own head is listed as unused, and they keep the pooler that it lacks."""
    pool = Pool(write("base", tiny_bert, BertForMaskedLM), classifiers, heads="separate")
    assert outside(pool.coverage.heads["base"], "cls.predictions") == []
    assert pool.coverage.heads["base"]
    assert "bert.pooler.dense.weight" in pool.coverage.heads["emotion"]
    assert accounted(pool)["base"] == list(pool.base.names)


def test_a_base_of_pictures_without_head(write: Write) -> None:
    """The same holds for image classifiers."""
    pool = Pool(write("base", lambda: ViTModel(cast(ViTConfig, tiny_vit().config))), {"a": write("a", tiny_vit)}, heads="separate")
    assert outside(pool.coverage.heads["base"], "pooler") == []
    assert sorted(pool.coverage.heads["a"]) == ["classifier.bias", "classifier.weight"]


def test_a_damaged_source_is_no_head(write: Write, classifiers: Mapping[str, Path]) -> None:
    """A tensor of the body that a file lacks, although its architecture has it, is missing: it does not become a head."""
    lost = "bert.encoder.layer.1.output.dense.weight"
    base = write("base")
    edit_weights(base, lambda tensors: tensors.pop(lost))
    with pytest.raises(MismatchError, match=f"{lost}: missing in the base"):
        Pool(base, classifiers, heads="separate")
    edit_weights(classifiers["topic"], lambda tensors: tensors.pop(lost))
    with pytest.raises(MismatchError, match=f"missing: {lost}"):
        Pool(write("whole"), classifiers, heads="separate")


def test_bodies_must_agree(write: Write) -> None:
    """Settings of the body that differ, and tensors of other shapes, are refused with both sides; settings of heads are not."""
    base = write("base")
    with pytest.raises(MismatchError, match=r"num_hidden_layers is 2 in the base, 3 in expert 'deep'"):
        Pool(base, {"deep": write("deep", tiny_bert, num_hidden_layers=3)}, heads="separate")
    widened = write("wide")
    edit_weights(widened, lambda tensors: tensors.update({"bert.pooler.dense.bias": torch.zeros(17)}))
    with pytest.raises(MismatchError, match=r"bert.pooler.dense.bias: shape \[16\] in the base, \[17\] in expert 'wide'"):
        Pool(base, {"wide": widened}, heads="separate")
    assert Pool(base, {"dropped": write("dropped", tiny_bert, classifier_dropout=0.3)}, heads="separate").heads


def test_patterns_say_what_a_head_is(write: Write, classifiers: Mapping[str, Path]) -> None:
    """Regexes in place of the default move tensors into the heads; one that matches nothing, or what is then missing, is refused."""
    pool = Pool(write("base"), classifiers, heads="separate", head_tensors=["classifier", r"layer\.1\."])
    assert sorted(pool.names) == outside(pool.base.names, "classifier", "layer.1.")
    assert len(pool.coverage.heads["emotion"]) == 2 + 16
    with pytest.raises(
        ConfigError, match=r"head_tensors: the pattern 'score' matches no tensor; .* like classifier.weight, classifier.bias"
    ):
        Pool(write("base"), classifiers, heads="separate", head_tensors=["score"])
    with pytest.raises(MismatchError, match=r"classifier.weight: shape \[3, 16\] in the base, \[6, 16\] in expert 'emotion'"):
        Pool(write("base"), classifiers, heads="separate", head_tensors=["pooler"])
    with pytest.raises(MismatchError, match=r"classifier.weight: missing in the base; if it belongs to a head, add it to `head_tensors`"):
        Pool(write("bare", tiny_bert, BertModel), classifiers, heads="separate", head_tensors=["pooler"])


def test_what_cannot_be_meant_is_refused(write: Write, classifiers: Mapping[str, Path]) -> None:
    """Unknown modes, patterns without separate heads, models without heads, exclusions of heads and an expert called all are refused."""
    base = write("base")
    with pytest.raises(ConfigError, match="heads: did you mean 'separate'"):
        Pool(base, classifiers, heads="seperate")
    with pytest.raises(ConfigError, match="head_tensors: heads are shared"):
        Pool(base, classifiers, head_tensors=["classifier"])
    with pytest.raises(ConfigError, match="'all' means every head"):
        Pool(base, {"all": classifiers["topic"]}, heads="separate")
    with pytest.raises(ConfigError, match="matches only heads, which are kept apart anyway"):
        Pool(base, classifiers, heads="separate", exclude=["classifier"])
    bare = write("bare", tiny_bert, BertModel)
    with pytest.raises(ConfigError, match=r"no tensors outside their base model \(bert\.\*\)"):
        Pool(bare, {"same": write("same", tiny_bert, BertModel)}, heads="separate")


def test_heads_that_are_asked_for(write: Write, classifiers: Mapping[str, Path]) -> None:
    """Of several heads one must be named, or all; of one head none need be; where heads are shared none can be."""
    base = write("base")
    both, one = Pool(base, classifiers, heads="separate"), Pool(base, {"topic": classifiers["topic"]}, heads="separate")
    assert both.heads_asked("topic") == one.heads_asked(None) == ("topic",)
    assert both.heads_asked("all") == ("emotion", "topic")
    with pytest.raises(ConfigError, match=r"say whose to write: emotion, topic, or all \(a folder each\)"):
        both.heads_asked(None)
    with pytest.raises(ConfigError, match="there is no head 'emotoin'; did you mean 'emotion'"):
        both.heads_asked("emotoin")
    with pytest.raises(ConfigError, match="share one head"):
        Pool(base, {"e": write("e")}).heads_asked("e")


def test_live_models_share_a_row(write: Write, classifiers: Mapping[str, Path]) -> None:
    """Bound to an expert's body, the model with its head answers as that expert; tensors that are not merged are the base's, held once."""
    experts = {"ner": write("ner", tiny_bert, BertForTokenClassification, TAGS), **classifiers}
    pool = Pool(write("base", tiny_bert, BertModel), experts, heads="separate", exclude=["word_embeddings"])
    layout = Layout(pool)
    arena = CandidateArena(2, layout, torch.float32, CPU)
    for row, name in enumerate(("topic", "emotion")):
        place = pool.expert_names.index(name)
        for segment in layout.segments:
            arena.rows[row, segment.start : segment.end] = pool.stack(segment.name)[place].reshape(-1)
        with torch.no_grad():
            expected = AutoModelForSequenceClassification.from_pretrained(experts[name])
            expected.bert.embeddings.word_embeddings.weight.copy_(pool.read_base("bert.embeddings.word_embeddings.weight"))
            assert torch.equal(arena.bind(row, name)(TOKENS).logits, expected.eval()(TOKENS).logits)
        models = [arena.bind(row, expert) for expert in experts]
        assert [cast(PreTrainedModel, model).config.num_labels for model in models] == [3, 6, 2]
        for tensor in ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias"):
            assert len({model.get_parameter(f"bert.{tensor}").data_ptr() for model in models}) == 1
        assert arena.bind(row) is models[0]


def test_a_head_tied_to_the_body_follows_it(write: Write) -> None:
    """A language model's output that is tied to the merged embedding is the merge's, next to a classifier's head that is its own."""
    config = GPT2Config(vocab_size=13, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    experts = {"lm": write("lm", tiny_gpt2), "judge": write("judge", lambda: GPT2ForSequenceClassification(config))}
    pool = Pool(write("base", tiny_gpt2), experts, heads="separate")
    assert dict(pool.coverage.heads) == {"base": (), "lm": (), "judge": ("score.weight",)}
    arena = CandidateArena(1, Layout(pool), torch.float32, CPU)
    arena.rows.fill_(0.5)
    model = arena.bind(0, "lm")
    assert isinstance(model, GPT2LMHeadModel)
    assert bool((model.lm_head.weight == 0.5).all())
    assert torch.equal(arena.bind(0, "judge").get_parameter("score.weight"), Checkpoint(experts["judge"]).read("score.weight"))


def test_heads_of_bare_modules(tmp_path: Path) -> None:
    """Of modules that transformers does not know, regexes say what the head is; counters are still the largest of all."""
    files = {name: write_module(Cnn, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("base", "a", "b"))}
    edit_weights(files["b"], lambda tensors: tensors.update({"norm.num_batches_tracked": torch.tensor(7)}))
    base = files.pop("base")
    with pytest.raises(ConfigError, match="nothing says which tensors of this model are its head"):
        Pool(base, files, module=Cnn, heads="separate")
    pool = Pool(base, files, module=Cnn, heads="separate", head_tensors=["^head"])
    arena = CandidateArena(1, Layout(pool), torch.float32, CPU)
    for name, file in files.items():
        state = arena.bind(0, name).state_dict()
        assert torch.equal(state["head.weight"], Checkpoint(file).read("head.weight"))
        assert state["norm.num_batches_tracked"] == 7
