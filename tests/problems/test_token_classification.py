from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertForSequenceClassification, BertForTokenClassification, PreTrainedTokenizerFast

from mergeopt import registry
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.task import DifferentiableTask, Items, Task
from mergeopt_problems.lm_metrics import TokenLoss
from mergeopt_problems.text_encoding import TextEncoding
from mergeopt_problems.text_items import IGNORED
from mergeopt_problems.token_classification import TokenClassification
from tests.problems.tiny_text import TEXTS, Rows, bert, entropy, wordpiece, write

CPU = torch.device("cpu")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
Make = Callable[..., TokenClassification]
Change = Callable[[dict[str, Any]], dict[str, Any]]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wordpiece(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Make:
    """Make the task on rows, with the tokenizer."""

    def made(rows: Rows | None = None, **options: Any) -> TokenClassification:
        data = {
            "path": write(tmp_path, table() if rows is None else rows), "search": "val", "report": "test", **options.pop("data", {}),
        }  # fmt: skip
        task = registry.load("tasks", "token_classification")(data=data, **{"tokenizer": tokenizer, "batch": 3, **options})
        assert isinstance(task, TokenClassification)
        return task

    return made


def table() -> Rows:
    """Return the texts as words, each in `val` as it is and in `test` with one more; tags by name and by number."""
    rows = []
    for i, text in enumerate(TEXTS):
        for split, more in (("val", ""), ("test", " again")):
            words = (text + more).split()
            numbers = [(i + 3 * k) % 5 for k in range(len(words))]
            rows.append({"tokens": words, "tags": [TAGS[n] for n in numbers], "numbers": numbers, "split": split, "row": i})
    return rows


def tagger(labels: list[str] | None = None, **changes: Any) -> BertForTokenClassification:
    return bert(BertForTokenClassification, labels or TAGS, **changes)


def aligned(tokenizer: Path, rows: Rows, labels: list[str]) -> tuple[Any, torch.Tensor]:
    """Return inputs and labels as transformers' guide to token classification aligns them."""
    wrap: Any = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    inputs = wrap([row["tokens"] for row in rows], is_split_into_words=True, return_tensors="pt", padding=True)
    made = torch.full_like(inputs["input_ids"], IGNORED)
    for i, row in enumerate(rows):
        before = None
        for position, word in enumerate(inputs.word_ids(i)):
            if word is not None and word != before:
                made[i, position] = labels.index(row["tags"][word])
            before = word
    return inputs, made


def test_losses_are_transformers_own(make: Make, tokenizer: Path) -> None:
    """Nats per word are transformers' own loss on labels aligned as its guide does, and each record is that of its sentence."""
    task, model = make(), tagger()
    assert isinstance(task, Task)
    assert isinstance(task, DifferentiableTask)
    assert isinstance(task.items("search"), Items)
    task.check(model)
    rows = [row for row in table() if row["split"] == "val"]
    inputs, labels = aligned(tokenizer, rows, TAGS)
    assert (labels[:, 2:-1] == IGNORED).any()
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
    score = TaskObjective("loss", task, TokenLoss()).score(model, "search", CPU, {})
    assert score.value == pytest.approx(float(expected.loss), rel=1e-5)
    records = score.records
    losses = F.cross_entropy(expected.logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    entropies = entropy(expected.logits) * (labels != IGNORED).numpy()
    words = torch.tensor([len(row["tokens"]) for row in rows])
    assert records["tokens"].tolist() == words.tolist()
    np.testing.assert_allclose(records["nll"], losses.sum(1).numpy(), rtol=1e-4)
    np.testing.assert_allclose(records["loss"], (losses.sum(1) / words).numpy(), rtol=1e-4)
    np.testing.assert_allclose(records["entropy"], entropies.sum(1) / words.numpy(), rtol=1e-4)
    assert {key: column.dtype.name for key, column in records.items()} == {
        "true_positives": "int64", "predicted_entities": "int64", "gold_entities": "int64",
        "loss": "float32", "nll": "float64", "tokens": "int64", "entropy": "float32",
    }  # fmt: skip


class Oracle(torch.nn.Module):
    """Says of every token what a table says, in place of a trained model."""

    def __init__(self, tags: torch.Tensor, labels: list[str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tags, self.count = tags, len(labels)
        self.config = tagger(labels).config

    def forward(self, input_ids: torch.Tensor) -> Any:
        logits = 9.0 * F.one_hot(self.tags[: len(input_ids), : input_ids.shape[1]], self.count).float()
        return type("Output", (), {"logits": logits + self.weight})


def test_entities_are_counted(make: Make, tokenizer: Path) -> None:
    """What a model says of first tokens makes the entities: all of them right for one that is right, some for one that errs in places."""
    words = ["the", "cats", "sat", "on", "the", "mats", "dog"]
    rows = [{"tokens": words, "tags": ["B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC", "I-LOC"], "split": "val"}]
    _, labels = aligned(tokenizer, rows, TAGS)
    assert (labels[0, 1:-1] == IGNORED).any()
    task = make(rows, data={"report": None})

    def counts(said: torch.Tensor) -> list[int]:
        records = task.records(Oracle(said, TAGS), "search", CPU)
        return [int(records[key][0]) for key in ("true_positives", "predicted_entities", "gold_entities")]

    # other tokens than first ones say O, and must not count
    right = labels.clamp(min=0)
    assert counts(right) == [2, 2, 2]
    start = int((labels[0] == TAGS.index("B-LOC")).nonzero())
    wrong = right.clone()
    wrong[0, start] = TAGS.index("O")  # an entity of the other two words
    assert counts(wrong) == [1, 2, 2]
    wrong[0, start] = TAGS.index("B-PER")
    assert counts(wrong) == [1, 3, 2]
    assert counts(torch.zeros_like(right)) == [0, 0, 2]


def test_batches_and_padding_change_nothing(make: Make) -> None:
    """Whatever the batch and whatever stands in the padding's place, records are the same but for rounding, and in the same order."""
    model = tagger()
    expected = make(batch=1).records(model, "search", CPU)
    assert expected["predicted_entities"].sum() > 0
    for task in (make(batch=3), make(batch=100)):
        for padding in (0, 7):
            model.config.pad_token_id = padding
            records = task.records(model, "search", CPU)
            for column in expected:
                np.testing.assert_allclose(records[column], expected[column], rtol=1e-4)


def test_predictions_are_what_is_recorded(make: Make) -> None:
    """Losses of predicted words sum to the recorded ones, sentence after sentence in the order asked for, and carry gradients."""
    task, model = make(), tagger()
    chosen = [5, 0, 3]
    made = task.predict(model, "search", chosen, CPU)
    records = task.records(model, "search", CPU)
    tokens = records["tokens"][chosen].tolist()
    assert made.logits.shape == (sum(tokens), 5)
    losses = F.cross_entropy(made.logits, made.labels, reduction="none")
    sums = [float(part.detach().sum()) for part in torch.split(losses, tokens)]
    np.testing.assert_allclose(sums, records["nll"][chosen], rtol=1e-4)
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 20


def test_items(make: Make, tokenizer: Path) -> None:
    """An item is a sentence's ids, and the place of each word's tag at its first token."""
    items = make().items("search")
    rows = [row for row in table() if row["split"] == "val"]
    inputs, labels = aligned(tokenizer, rows, items.names)
    for index in range(len(items)):
        inside = inputs["attention_mask"][index].bool()
        assert items[index]["input_ids"].tolist() == inputs["input_ids"][index][inside].tolist()
        assert items[index]["label"].tolist() == labels[index][inside].tolist()


def test_tags_are_matched_by_name(make: Make) -> None:
    """The order of a model's labels does not matter, nor whether the data has names or numbers; a regex picks a head and its names."""
    expected = make().records(tagger(), "search", CPU)
    order = [3, 0, 4, 2, 1]
    turned = tagger([TAGS[k] for k in order])
    with torch.no_grad():
        for parameter in (turned.classifier.weight, turned.classifier.bias):
            parameter.copy_(parameter[order])
    numbered = make(data={"tags": "numbers", "labels": TAGS})
    headed = tagger([f"politics:{tag}" for tag in TAGS])
    for task, model in ((make(), turned), (numbered, tagger()), (make(classes="politics:(.*)"), headed)):
        task.check(model)
        records = task.records(model, "search", CPU)
        for column in expected:
            np.testing.assert_allclose(records[column], expected[column], rtol=1e-5)
    assert numbered.items("search").hash == make().items("search").hash
    with pytest.raises(DataError, match="the data has the label 'B-LOC', for which the model has no logit; did you mean"):
        make().check(headed)
    with pytest.raises(DataError, match=r"id2label: expected the BIO tags O, B-TYPE and I-TYPE, got 'LABEL_5'"):
        make().check(tagger([*TAGS, "LABEL_5"]))


def test_what_is_cut_counts_as_missed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Words past max_length have no loss; their entities, and those that the end cuts in two, are gold and never found."""
    words = ["the", "cat", "sat", "on", "the", "mat"]
    rows = [{"tokens": words, "tags": ["B-PER", "O", "B-LOC", "I-LOC", "I-LOC", "B-PER"], "split": "val"}]
    with caplog.at_level(logging.WARNING):
        task = make(rows, max_length=6, data={"report": None})
    assert "cut 1 of 1 texts to max_length, 6 tokens" in caplog.text
    said = torch.tensor([[0, 1, 0, 3, 4, 0]])
    records = task.records(Oracle(said, TAGS), "search", CPU)
    assert [int(records[key][0]) for key in ("tokens", "true_positives", "predicted_entities", "gold_entities")] == [4, 1, 2, 3]


def test_words_that_are_not_read(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A word of nothing that the tokenizer reads has no loss, and a sentence of such words, or of none, is left out and counted."""
    rows = [
        {"tokens": ["\u200b"], "tags": ["B-LOC"], "split": "val"},
        {"tokens": [], "tags": [], "split": "val"},
        {"tokens": ["the", "\u200b", "cat"], "tags": ["B-PER", "I-PER", "I-PER"], "split": "val"},
    ]
    with caplog.at_level(logging.WARNING):
        task = make(rows, data={"report": None})
    assert "left 2 of 3 sentences out, which hold no word" in caplog.text
    assert (len(task.items("search")), task.items("search").names) == (1, ["B-PER", "I-PER"])
    records = task.records(Oracle(torch.tensor([[0, 1, 2, 0]]), TAGS), "search", CPU)
    assert [int(records[key][0]) for key in ("tokens", "true_positives", "predicted_entities", "gold_entities")] == [2, 0, 2, 1]
    with pytest.raises(DataError, match="expected sentences of words that the tokenizer can read, got none"):
        make(rows[:2], data={"report": None})


def test_byte_level_words_have_their_space(tmp_path: Path) -> None:
    """A byte-level tokenizer reads a word among others as it does within a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=made).save_pretrained(tmp_path)
    sequences, positions = TextEncoding(tmp_path, None).words([["on", "the", "mat"]])
    whole = TextEncoding(tmp_path, None).texts([" on the mat"])
    assert sequences.batch([0], 0)["input_ids"].tolist() == whole.batch([0], 0)["input_ids"].tolist()
    assert positions[0][0] == 0


def test_real_sentences(data_dir: Path, tokenizer: Path) -> None:
    """On 60 real sentences each word counts once, and gold entities are the tags that begin one."""
    data = {"path": str(data_dir / "open/ner/crossner_wnut.parquet"), "search": "val", "report": "test", "where": {"domain": "politics"}}
    task = TokenClassification(data=data, tokenizer=tokenizer, limit=60)
    model = tagger([*TAGS, "B-ORG", "I-ORG", "B-MISC", "I-MISC"], max_position_embeddings=512)
    task.check(model)
    records, items = task.records(model, "search", CPU), task.items("search")
    assert records["tokens"].tolist() == items.words.tolist()
    begins = np.asarray([name.startswith("B-") for name in items.names])[items.tags]
    assert records["gold_entities"].sum() == begins.sum() > 200
    assert (records["true_positives"] <= np.minimum(records["predicted_entities"], records["gold_entities"])).all()


def test_limit_hash_and_copies(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A limit is seeded, the hash follows words and tags alone, and sentences that stand in both parts are left out of the search part."""
    rows = table()
    whole = make(rows).items("search")
    first, again, other = (make(rows, limit=4, seed=seed).items("search") for seed in (0, 0, 1))
    assert len(first) == 4
    assert first.hash == again.hash != other.hash
    assert make(rows, batch=9, limit=100).items("search").hash == whole.hash
    for key, value in (("tokens", ["a", *rows[0]["tokens"][1:]]), ("tags", ["B-PER", *rows[0]["tags"][1:]])):
        assert make([{**rows[0], key: value}, *rows[1:]]).items("search").hash != whole.hash
    with caplog.at_level(logging.WARNING):
        assert make([*rows, {**rows[1], "split": "val"}]).items("search").hash == whole.hash
    assert "left 1 of 9 sentences out of 'val'" in caplog.text


def test_model_that_does_not_fit(make: Make) -> None:
    """Logits per text, too few positions, missing names and a broken model are found."""
    with pytest.raises(DataError, match=r"expected a model with logits \[n, tokens, classes\], got BertForSequenceClassification"):
        make().check(bert(BertForSequenceClassification, TAGS))
    with pytest.raises(DataError, match=r"the model has 8 positions; set `max_length: 8` or less"):
        make().check(tagger(max_position_embeddings=8))
    with pytest.raises(DataError, match="the data has the label 'I-LOC', for which the model has no logit"):
        make(classes=[0, 1, 2, 3]).check(tagger())
    broken = tagger()
    with torch.no_grad():
        broken.classifier.bias.fill_(torch.inf)
    with pytest.raises(CandidateError, match="logits on the search part are not finite"):
        make().records(broken, "search", CPU)


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (dict, {"tokens": "tokesn"}, r"no column 'tokesn' \(tokens\); did you mean 'tokens'"),
        (dict, {"tags": "tgas"}, r"no column 'tgas' \(tags\); did you mean 'tags'"),
        (dict, {"tags": "numbers"}, r"row 0: the tags are numbers \(0, say\); give `labels:`"),
        (dict, {"tags": "numbers", "labels": TAGS[:4]}, r"the tag 4 is not among the 4 `labels` \(0 to 3\)"),
        (dict, {"tags": "row"}, r"row 0: expected one tag for each of 6 words in the column 'row', got 0"),
        (lambda row: {**row, "tokens": "the cat"}, {}, "row 0: expected a list of words in the column 'tokens', got 'the cat'"),
        (lambda row: {**row, "tags": row["tags"][1:]}, {}, "row 0: expected one tag for each of 6 words in the column 'tags', got 5 tags"),
        (lambda row: {**row, "tags": [0.5] * len(row["tags"])}, {}, "expected tags that are names or numbers, got 0.5"),
        (lambda row: {**row, "tags": ["S-PER"] * len(row["tags"])}, {}, "search part: expected the BIO tags .* got 'S-PER'"),
    ],
)
def test_data_that_is_not_what_it_says(make: Make, change: Change, data: dict[str, Any], message: str) -> None:
    """Each flaw of the data is one error that says where it is and what was expected."""
    with pytest.raises(DataError, match=message):
        make([change(row) for row in table()], data=data)


def test_malformed_options(make: Make) -> None:
    """Options out of range and unknown keys are errors that say what would have done."""
    for options, message in (
        ({"limit": 0}, "limit: expected a whole number at least 1"),
        ({"max_length": 2}, "max_length: expected a whole number at least 3, got 2"),
        ({"classes": []}, "classes: expected distinct indices"),
        ({"data": {"text": "x"}}, "unknown key 'text'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**options)
