from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from mergeopt import registry
from mergeopt.batched_task import in_batches
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import DifferentiableTask, Items, Task
from mergeopt_problems.metrics import CrossEntropy, Entropy
from mergeopt_problems.sequences import Sequences
from mergeopt_problems.text_classification import TextClassification
from tests.problems.tiny_text import TEXTS, VOCABULARY, Rows, bert, entropy, wordpiece, write

CPU = torch.device("cpu")
NAMES = ["glad", "sad", "angry"]
Change = Callable[[dict[str, Any]], dict[str, Any]]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wordpiece(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Callable[..., TextClassification]:
    """Make the task on rows, with the tokenizer."""

    def made(rows: Rows | str | None = None, **options: Any) -> TextClassification:
        path = rows if isinstance(rows, str) else write(tmp_path, table() if rows is None else rows)
        data = {"path": path, "search": "val", "report": "test", **options.pop("data", {})}
        task = registry.load("tasks", "text_classification")(data=data, **{"tokenizer": tokenizer, "batch": 3, **options})
        assert isinstance(task, TextClassification)
        return task

    return made


def table() -> Rows:
    """Return the texts, each in `val` as it is and in `test` with one more word; with a second text and labels of three kinds."""
    return [
        {"text": text + more, "text_b": TEXTS[-i], "label": i % 3, "name": NAMES[i % 3], "split": split}
        for i, text in enumerate(TEXTS)
        for split, more in (("val", ""), ("test", " again"))
    ]


def classifier(labels: list[str] | None = None, **changes: Any) -> BertForSequenceClassification:
    return bert(BertForSequenceClassification, labels or NAMES, **changes)


def encoded(tokenizer: Path, *texts: list[str]) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer)(*texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("pairs", [False, True])
def test_losses_are_transformers_own(make: Callable[..., TextClassification], tokenizer: Path, pairs: bool) -> None:
    """The mean loss is that of transformers on the padded texts or pairs, and each record that of its row, in the order of the rows."""
    task, model = make(data={"text_b": "text_b"} if pairs else {}), classifier()
    assert isinstance(task, Task)
    assert isinstance(task, DifferentiableTask)
    assert isinstance(task.items("search"), Items)
    task.check(model)
    labels = torch.tensor([i % 3 for i in range(len(TEXTS))])
    second = [[TEXTS[-i] for i in range(len(TEXTS))]] if pairs else []
    with torch.no_grad():
        expected = model(**encoded(tokenizer, TEXTS, *second), labels=labels)
    score = TaskObjective("loss", task, CrossEntropy()).score(model, "search", CPU, {})
    assert score.value == pytest.approx(float(expected.loss), rel=1e-5)
    np.testing.assert_allclose(score.records["loss"], F.cross_entropy(expected.logits, labels, reduction="none").numpy(), rtol=1e-4)
    assert score.records["prediction"].tolist() == expected.logits.argmax(1).tolist()
    assert float(expected.logits.std(dim=0).min()) > 0.01
    assert score.records["label"].tolist() == labels.tolist()
    np.testing.assert_allclose(score.records["entropy"], entropy(expected.logits), rtol=1e-4)
    assert Entropy().aggregate(score.records) == pytest.approx(entropy(expected.logits).mean(), rel=1e-4)
    assert {key: column.dtype.name for key, column in score.records.items()} == {
        "loss": "float32", "entropy": "float32", "prediction": "int64", "label": "int64",
    }  # fmt: skip


def test_real_texts(data_dir: Path, tokenizer: Path) -> None:
    """On emotions of a real data set, the records of 40 comments are those of one comment at a time."""
    data = {"path": str(data_dir / "open/emotion/goemotions.parquet"), "search": "val", "report": "test"}
    task = TextClassification(data=data, tokenizer=tokenizer, max_length=40, limit=40, batch=16)
    model = classifier(["anger", "disgust", "fear", "joy", "sadness", "surprise"])
    task.check(model)
    records, items = task.records(model, "search", CPU), task.items("search")
    assert len(set(items.sequences.lengths)) > 10
    with torch.no_grad():
        alone = [model(input_ids=items[i]["input_ids"][None], labels=torch.tensor(items[i]["label"])).loss for i in range(len(items))]
    np.testing.assert_allclose(records["loss"], torch.stack(alone).numpy(), rtol=1e-4)


def test_batches_and_padding_change_nothing(make: Callable[..., TextClassification]) -> None:
    """Whatever the batch and whatever stands in the padding's place, records are the same but for rounding, and in the same order."""
    model = classifier()
    expected = make(batch=1).records(model, "search", CPU)
    for task in (make(batch=3), make(batch=100)):
        for padding in (0, 7):
            model.config.pad_token_id = padding
            records = task.records(model, "search", CPU)
            for column in expected:
                np.testing.assert_allclose(records[column], expected[column], rtol=1e-4)
    again = make(batch=3).records(model, "search", CPU)
    assert all(np.array_equal(again[column], make(batch=3).records(model, "search", CPU)[column]) for column in again)


def test_predictions_are_what_is_recorded(make: Callable[..., TextClassification]) -> None:
    """Losses of predicted texts are the recorded ones, in the order asked for, and carry gradients where these are on."""
    task, model = make(data={"label": "name"}, classes=[2, 0, 1]), classifier(["angry", "glad", "sad"])
    chosen = [5, 0, 3]
    made = task.predict(model, "search", chosen, CPU)
    losses = F.cross_entropy(made.logits, made.labels, reduction="none")
    records = task.records(model, "search", CPU)
    np.testing.assert_allclose(losses.detach().numpy(), records["loss"][chosen], rtol=1e-4)
    assert made.labels.tolist() == records["label"][chosen].tolist()
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 20
    torch.nn.Module.to(model, torch.bfloat16)
    half = task.predict(model, "search", chosen, CPU)
    assert half.logits.dtype == torch.float32


def test_names_of_labels(make: Callable[..., TextClassification]) -> None:
    """Labels that are names mean the model's own, or the order that the data gives; both say what numbers say."""
    by_number = make().records(classifier(), "search", CPU)
    ordered = make(data={"label": "name", "labels": NAMES}).records(classifier(), "search", CPU)
    by_name = make(data={"label": "name"})
    named = by_name.records(classifier(), "search", CPU)
    for column in by_number:
        assert np.array_equal(by_number[column], ordered[column])
        assert np.array_equal(by_number[column], named[column])
    # the same weights under other names: other labels are right
    turned = classifier(NAMES[::-1])
    by_name.check(turned)
    assert by_name.records(turned, "search", CPU)["label"].tolist() == (2 - by_number["label"]).tolist()
    assert by_name.items("search")[1]["label"] == "sad"


def test_classes_of_a_shared_head(make: Callable[..., TextClassification]) -> None:
    """Indices and a regex judge on the same logits; with a group the data's names are what it matches; what is not there is an error."""
    model = classifier([f"{head}:{name}" for head in ("first", "second") for name in NAMES])
    by_index = make(classes=[3, 4, 5]).records(model, "search", CPU)
    for task in (make(classes="second:.*"), make(classes="second:(.*)", data={"label": "name"})):
        task.check(model)
        records = task.records(model, "search", CPU)
        assert all(np.array_equal(records[column], by_index[column]) for column in records)
    assert by_index["prediction"].max() < 3
    assert not np.array_equal(by_index["loss"], make().records(model, "search", CPU)["loss"])
    with pytest.raises(DataError, match=r"'third:.*' matches none of the model's 6 label names \(first:glad, "):
        make(classes="third:.*").check(model)
    with pytest.raises(DataError, match="names the logit 6, but the model has 6"):
        make(classes=[4, 5, 6]).check(model)
    with pytest.raises(DataError, match="the search part has the label 2, but is judged on 2 logits"):
        make(classes=[0, 1]).check(model)
    with pytest.raises(DataError, match=r"the label 'angry', for which the model has no logit; .*known: second:angry, second:glad"):
        make(classes="second:.*", data={"label": "name"}).check(model)
    with pytest.raises(DataError, match="two of the logits it is judged on are called 'glad'"):
        make(classes=".*:(.*)", data={"label": "name"}).check(model)


def test_max_length_cuts(make: Callable[..., TextClassification], tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without max_length nothing is cut, whatever the tokenizer's file says; with it texts are cut as the tokenizer cuts, and said so."""
    model = classifier()
    whole = make().items("search")
    assert whole.sequences.lengths.max() > 6
    assert whole.sequences.lengths.min() < 6
    with caplog.at_level(logging.WARNING):
        task = make(max_length=6)
    assert "of 8 texts to max_length, 6 tokens" in caplog.text
    assert task.items("search").hash != whole.hash
    wrap: Any = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    cut = wrap(TEXTS, truncation=True, max_length=6, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**cut).logits
    assert task.records(model, "search", CPU)["prediction"].tolist() == logits.argmax(1).tolist()
    with pytest.raises(ConfigError, match="max_length: expected a whole number at least 3, got 2"):
        make(max_length=2)


def test_limit_is_stratified_and_seeded(make: Callable[..., TextClassification]) -> None:
    """A limit keeps each class in its share and the order of the rows, draws the same texts each time, and others under another seed."""
    rows = [{"text": "the " * i, "label": int(i % 4 == 0), "split": ("val", "test")[i >= 80]} for i in range(99)]
    first, again, other = (make(rows, limit=20, seed=seed).items("search") for seed in (0, 0, 1))
    assert (len(first), int(first.labels.sum())) == (20, 5)
    assert first.hash == again.hash != other.hash
    whole = make(rows).items("search")
    order = [next(k for k in range(80) if torch.equal(whole[k]["input_ids"], first[i]["input_ids"])) for i in range(20)]
    assert order == sorted(order)


def test_hash_follows_content(make: Callable[..., TextClassification], tmp_path: Path) -> None:
    """The hash of the items changes with a text, a label, a label's name and their order, and with nothing else."""
    rows = table()
    expected = make(rows).items("search").hash
    assert make(write(tmp_path, rows, "copy.jsonl"), batch=50, classes=[0, 1, 2]).items("search").hash == expected
    others = [[{**rows[0], "text": "what a mat"}, *rows[1:]], [{**rows[0], "label": 2}, *rows[1:]], rows[::-1]]
    hashes = {expected, *(make(other).items("search").hash for other in others)}
    for name in ("glad", "happy"):
        hashes.add(make([{**row, "label": row["name"].replace("glad", name)} for row in rows]).items("search").hash)
    hashes.add(make(rows, data={"text_b": "text_b"}).items("search").hash)
    assert len(hashes) == 7


def test_copies_are_left_out(make: Callable[..., TextClassification], caplog: pytest.LogCaptureFixture) -> None:
    """A text, or a pair, of the search part that also stands in the report part is left out of the search part, and said so."""
    rows = table()
    more = [*rows, {**rows[1], "split": "val", "label": 2}]
    with caplog.at_level(logging.WARNING):
        assert make(more).items("search").hash == make(rows).items("search").hash
    assert "left 1 of 9 texts out of 'val'" in caplog.text
    assert len(make([*more, {**more[-1], "text_b": "other"}], data={"text_b": "text_b"}).items("search")) == 9


def test_where_keeps_rows(make: Callable[..., TextClassification]) -> None:
    """`where` keeps the rows with a value."""
    assert make(data={"where": {"name": ["glad", "sad"]}}).items("search").labels.tolist() == [0, 1, 0, 1, 0, 1]


def small(kind: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config)
    model.train(False)
    return model


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3
}  # fmt: skip


def test_decoder(make: Callable[..., TextClassification]) -> None:
    """A decoder is read at each text's last token, whose place it finds by its padding; one without padding is refused by name."""
    config: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 3}
    task = make()
    model = small(GPT2ForSequenceClassification, GPT2Config(**config, pad_token_id=VOCABULARY - 1))
    task.check(model)
    np.testing.assert_allclose(task.records(model, "search", CPU)["loss"], make(batch=1).records(model, "search", CPU)["loss"], rtol=1e-4)
    with pytest.raises(DataError, match=r"does not take token ids \[2, \d+\]: Cannot handle batch sizes > 1 if no padding token"):
        task.check(small(GPT2ForSequenceClassification, GPT2Config(**config)))


def test_model_that_does_not_fit(make: Callable[..., TextClassification]) -> None:
    """Too small a vocabulary, too few positions or segments, and logits of other shapes are found before anything is scored."""
    task = make()
    longest = int(task.items("report").sequences.lengths.max())
    with pytest.raises(DataError, match=r"ids up to \d+, but the model's vocabulary is 20; name the model's own tokenizer"):
        task.check(classifier(vocab_size=20))
    with pytest.raises(DataError, match=f"texts have up to {longest} tokens, but the model has 12 positions; set `max_length: 12` or less"):
        task.check(classifier(max_position_embeddings=12))
    # RoBERTa's positions start after that of its padding
    for room, fits in ((longest + 2, True), (longest + 1, False)):
        config = RobertaConfig(**SIZES, max_position_embeddings=room, pad_token_id=1)
        model = small(RobertaForSequenceClassification, config)
        if fits:
            task.check(model)
        else:
            with pytest.raises(DataError, match=f"the model has {longest - 1} positions"):
                task.check(model)
    with pytest.raises(DataError, match="numbers segments up to 1, but the model knows 1"):
        make(data={"text_b": "text_b"}).check(classifier(type_vocab_size=1))
    with pytest.raises(DataError, match=r"expected a model with logits \[n, classes\], got BertForTokenClassification"):
        task.check(bert(BertForTokenClassification, NAMES))
    with pytest.raises(DataError, match="the model does not take token ids"):
        task.check(small(ViTForImageClassification, ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_attention_heads=2)))
    with pytest.raises(DataError, match="the search part has the label 2, but is judged on 2 logits"):
        task.check(classifier(["glad", "sad"]))


def test_broken_model_fails_alone(make: Callable[..., TextClassification]) -> None:
    """Logits that are not finite fail the candidate, and leave the model in the mode it was in."""
    model = classifier().train()
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(CandidateError, match="logits on the search part are not finite"):
        make().records(model, "search", CPU)
    assert model.training


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (dict, {"report": "tset"}, "no split 'tset'; did you mean 'test'"),
        (dict, {"text": "txet"}, r"no column 'txet' \(text\); did you mean 'text'"),
        (dict, {"text_b": "text_c"}, r"no column 'text_c' \(text_b\); did you mean"),
        (dict, {"label": "lable"}, r"no column 'lable' \(label\); did you mean 'label'"),
        (dict, {"label": "name", "labels": ["glad", "sad"]}, "the label 'angry' is not among `labels`; known: glad, sad"),
        (lambda row: {**row, "text": None}, {}, "split 'val', row 0: expected text in the column 'text', got None"),
        (lambda row: {**row, "text_b": 3}, {"text_b": "text_b"}, "split 'val', row 0: expected text in the column 'text_b', got 3"),
        (lambda row: {**row, "label": 0.5}, {}, "row 0: expected labels that are whole numbers or names, got 0.5"),
        (lambda row: {**row, "label": None if row["label"] == 1 else 0}, {}, "row 1: expected labels that are .* got None"),
        (lambda row: {**row, "label": -1}, {}, "class numbers from 0, got the label -1"),
    ],
)
def test_data_that_is_not_what_it_says(make: Callable[..., TextClassification], change: Change, data: dict[str, Any], message: str) -> None:
    """Each flaw of the data is one error that says where it is and what was expected."""
    with pytest.raises(DataError, match=message):
        make([change(row) for row in table()], data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "tokenizer: the models bring none; give a folder or hf://owner/name"),
        ({"tokenizer": 3}, "tokenizer: expected a folder or hf://owner/name, got 3"),
        ({"max_length": "64"}, "max_length: expected a whole number at least 3, got '64'"),
        ({"limit": 0}, "limit: expected a whole number at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number at least 0, got -1"),
        ({"batch": 0}, "batch: expected a whole number at least 1, got 0"),
        ({"classes": [1, 1]}, "classes: expected distinct indices"),
        ({"classes": "("}, r"classes: '\(' is no regular expression"),
        ({"data": {"where": "code"}}, "where: expected columns and the values to keep"),
        ({"data": {"texts": "text"}}, "unknown key 'texts'; did you mean 'text'"),
        ({"data": {"report": "val"}}, "search and report are both 'val'"),
    ],
)
def test_malformed_options(make: Callable[..., TextClassification], options: dict[str, Any], message: str) -> None:
    """Options that are unknown, of another type, or out of range are errors that say what would have done."""
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_parts_and_tokenizer_that_are_not_there(make: Callable[..., TextClassification], tmp_path: Path) -> None:
    """A part that was not named and a folder without a tokenizer are errors that say which."""
    task = make(data={"report": None})
    assert task.parts == ("search",)
    with pytest.raises(DataError, match="has no report part"):
        task.items("report")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"holds no tokenizer\.json; name a folder that does, hf://owner/name$"):
        make(tokenizer=tmp_path)


ragged = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12)


@given(ragged, st.integers(1, 5), st.integers(0, 99))
def test_sequences_are_padded_to_the_longest(rows: list[list[int]], size: int, padding: int) -> None:
    """Batches hold every text once, longest first; each row is a text's ids, then padding that the mask leaves out."""
    made = Sequences(rows, [[1] * len(row) for row in rows])
    batches = in_batches(made.longest_first(), size)
    order = np.concatenate(batches).tolist()
    assert sorted(order) == list(range(len(rows)))
    assert [len(rows[k]) for k in order] == sorted(map(len, rows), reverse=True)
    for items in batches:
        batch = made.batch(items, padding)
        longest = max(len(rows[k]) for k in items)
        for k, ids, mask, types in zip(items, *batch.values(), strict=True):
            own = rows[k]
            assert ids.tolist() == own + [padding] * (longest - len(own))
            assert mask.tolist() == types.tolist() == [1] * len(own) + [0] * (longest - len(own))
    kept = made.chosen(np.arange(0, len(rows), 2))
    assert [kept.batch([k], 0)["input_ids"][0].tolist() for k in range(len(kept))] == rows[::2]
