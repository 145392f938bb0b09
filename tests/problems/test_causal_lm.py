from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CTRLTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from mergeopt import registry
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import Items, Task
from mergeopt_problems import token_losses
from mergeopt_problems.causal_lm import CausalLM
from mergeopt_problems.lm_metrics import Perplexity
from mergeopt_problems.text_items import IGNORED, windows
from mergeopt_problems.tokenization import ByteTokenization, FolderTokenization, Tokens, tokenization

CPU = torch.device("cpu")
DOCUMENTS = [
    "The cat sat on the mat, and the cat was glad.",
    "Un café, s'il vous plaît: l'été à Malmö.",
    "猫 sat on the mat 🐈",
    "The mat",
    "été",
    "def cat(mat): return mat + 1\n",
]
Rows = list[dict[str, Any]]
Change = Callable[[dict[str, Any]], dict[str, Any]]

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of byte-level BPE tokenizers of 300 tokens: `plain`, and `marked`, which puts a special token at either end of a text."""
    folders = {}
    for name in ("plain", "marked"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        made.train_from_iterator(DOCUMENTS * 3, trainer)
        if name == "marked":
            made.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", made.token_to_id("<s>"))])
        folders[name] = tmp_path_factory.mktemp(name)
        wrap: Any = PreTrainedTokenizerFast
        wrap(tokenizer_object=made, bos_token="<s>").save_pretrained(folders[name])
    return folders


def table() -> Rows:
    """Return the documents, each in `val` as it is and in `test` with one more word."""
    return [{"text": f"{document}{more}", "split": split} for document in DOCUMENTS for split, more in (("val", ""), ("test", " Again."))]


def write(folder: Path, rows: Rows, name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def task(path: Any, **options: Any) -> CausalLM:
    data = {"path": path, "search": "val", "report": "test", **options.pop("data", {})}
    made = registry.load("tasks", "causal_lm")(data=data, **{"tokenizer": "bytes", "window": 16, **options})
    assert isinstance(made, CausalLM)
    return made


def gpt2(*, vocabulary: int = 300, positions: int = 64) -> GPT2LMHeadModel:
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=positions, n_embd=16, n_layer=2, n_head=2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(False)
    return model


def plain_nll(model: PreTrainedModel, documents: list[list[int]], window: int, stride: int) -> tuple[float, int]:
    """Return nats and predicted tokens by transformers' own loss, a window at a time, as its guide to perplexity has it."""
    nats, count = 0.0, 0
    for ids in documents:
        reached = 0
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            inputs = torch.tensor([ids[begin:end]])
            labels = inputs.clone()
            labels[:, : reached - begin] = IGNORED
            asked = int((labels[:, 1:] != IGNORED).sum())
            if asked:
                with torch.no_grad():
                    nats += float(model(input_ids=inputs, labels=labels).loss) * asked
            count, reached = count + asked, end
            if end == len(ids):
                break
    return nats, count


@pytest.mark.parametrize("expert", ["base", "own"])
@pytest.mark.parametrize(("domain", "base", "own"), [("code", 11.5, 9.5), ("maths", 10.8, 9.3), ("spanish", 10.0, 8.3)])
def test_zoo(data_dir: Path, zoo_dir: Path, domain: str, base: float, own: float, expert: str) -> None:
    """The byte models reach their documented perplexities over the first 8,000 bytes of test text, in windows of 64 bytes."""
    where = {"split_column": "split", "where": {"domain": domain}}
    made = task(str(data_dir / "open/lm/text.parquet"), window=64, data=where)
    folder = zoo_dir / "gpt_bytes" / (domain if expert == "own" else "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made.check(model)
    first = int((np.cumsum(made.items("report").lengths) <= 8000).sum())
    with torch.no_grad():
        predictions = made.predict(model, "report", range(first), CPU)
    perplexity = F.cross_entropy(predictions.logits, predictions.labels).exp()
    assert float(perplexity) == pytest.approx(base if expert == "base" else own, abs=0.15)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (64, 64), (2, 1)])
@pytest.mark.parametrize("tokenizer", ["bytes", "plain", "marked"])
def test_perplexity_is_transformers_own(tmp_path: Path, tokenizers: dict[str, Path], tokenizer: str, window: int, stride: int) -> None:
    """Perplexities equal those of transformers' own loss, window by window and without padding."""
    path = tokenizers.get(tokenizer, tokenizer)
    made = task(write(tmp_path, table()), tokenizer=path, window=window, stride=stride)
    assert isinstance(made, Task)
    assert isinstance(made.items("search"), Items)
    model = gpt2()
    made.check(model)
    if tokenizer == "bytes":
        documents = [list(document.encode()) for document in DOCUMENTS]
    else:
        documents = PreTrainedTokenizerFast.from_pretrained(path)(DOCUMENTS)["input_ids"]
    nats, count = plain_nll(model, documents, window, stride)
    score = TaskObjective("perplexity", made, Perplexity()).score(model, "search", CPU, {})
    assert score.records["tokens"].sum() == count
    assert score.value == pytest.approx(math.exp(nats / count), rel=1e-5)
    records = score.records
    np.testing.assert_allclose(records["loss"], records["nll"] / records["tokens"], rtol=1e-6)
    assert {key: column.dtype.name for key, column in records.items()} == {
        "loss": "float32", "nll": "float64", "tokens": "int64", "bytes": "int64",
    }  # fmt: skip
    assert not model.training


def test_bytes_of_what_is_predicted(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    """All bytes of a document count where special tokens, which have none, stand around it, and all but its first token's where none do."""
    path = write(tmp_path, table())
    total = sum(len(document.encode()) for document in DOCUMENTS)
    for name, expected in (("bytes", total - len(DOCUMENTS)), ("marked", total)):
        items = task(path, tokenizer=tokenizers.get(name, name), window=64).items("search")
        assert items.bytes.sum() == expected, name


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Windows scored alone cost what they cost beside longer ones, whatever stands in the padding's place."""
    path, model = write(tmp_path, table()), gpt2()
    alone, together = task(path, batch=1), task(path, batch=50)
    assert len(set(alone.items("search").lengths)) > 3
    left, right = alone.records(model, "search", CPU), together.records(model, "search", CPU)
    np.testing.assert_allclose(left["nll"], right["nll"], rtol=1e-5)
    batch = together.items("search").batch(range(len(together.items("search"))))
    assert not batch.attention_mask.all()
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cross-entropy in chunks of a few rows is that of all rows."""
    made, model = task(write(tmp_path, table())), gpt2()
    whole = made.records(model, "search", CPU)
    monkeypatch.setattr(token_losses, "ELEMENTS", 7 * 300)
    np.testing.assert_allclose(made.records(model, "search", CPU)["nll"], whole["nll"], rtol=1e-6)


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(2, 12), st.data())
def test_every_token_is_predicted_once(lengths: list[int], window: int, data: st.DataObject) -> None:
    """With overlap each token of a document but its first is predicted once, without it each but the first of every window; in order."""
    stride = data.draw(st.integers(1, window))
    ends = np.cumsum([0, *lengths])
    documents = [Tokens(np.arange(a, b, dtype=np.int32), np.ones(b - a, dtype=np.int32)) for a, b in itertools.pairwise(ends)]
    cut = list(windows(documents, window, stride))
    predicted = [int(i) for one in cut for i in one.tokens.ids[one.context :]]
    every = window if stride == window else 10**6
    assert predicted == [int(i) for document in documents for place, i in enumerate(document.ids) if place % every]
    for one in cut:
        assert 2 <= len(one.tokens.ids) <= window
        assert 1 <= one.context < len(one.tokens.ids)
        assert (np.diff(one.tokens.ids) == 1).all()
        assert any(set(one.tokens.ids) <= set(document.ids) for document in documents)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_sizes_sum_to_the_document(tokenizers: dict[str, Path], text: str) -> None:
    """Whatever the text, the bytes of its tokens sum to its own, special tokens having none; byte ids are the bytes."""
    plain = ByteTokenization()(text)
    assert bytes(plain.ids.tolist()) == text.encode()
    for tokenize in (plain_tokenization(tokenizers["plain"]), plain_tokenization(tokenizers["marked"])):
        made = tokenize(text)
        assert made.sizes.sum() == len(text.encode())
        assert (made.sizes >= 0).all()
        assert len(made.ids) == len(made.sizes)
    assert made.sizes[0] == 0


@functools.cache
def plain_tokenization(path: Path) -> FolderTokenization:
    made = tokenization(path)
    assert isinstance(made, FolderTokenization)
    return made


def test_items(tmp_path: Path) -> None:
    """An item is a window's tokens but the last, with the token after each as its label; the order is that of the rows."""
    items = task(write(tmp_path, table()), window=16).items("search")
    text = DOCUMENTS[0].encode()
    for index, start in enumerate(range(0, 45, 16)):
        ids = list(text[start : start + 16])
        assert items[index]["input_ids"].tolist() == ids[:-1]
        assert items[index]["label"].tolist() == ids[1:]
    overlapping = task(write(tmp_path, table()), window=16, stride=12).items("search")[1]
    assert overlapping["input_ids"].tolist() == list(text[12:27])
    assert overlapping["label"].tolist() == [IGNORED] * 3 + list(text[16:28])


def test_limit_is_seeded(tmp_path: Path) -> None:
    """A limit draws the same windows each time, others under another seed, and keeps their order."""
    path = write(tmp_path, table())
    whole = task(path).items("search")
    first, again, other = (task(path, limit=5, seed=seed).items("search") for seed in (0, 0, 1))
    assert len(first) == 5 < len(whole)
    assert first.hash == again.hash != other.hash
    order = [next(k for k in range(len(whole)) if whole[k]["label"].tolist() == first[i]["label"].tolist()) for i in range(5)]
    assert order == sorted(order)
    assert task(path, limit=1000).items("search").hash == whole.hash


def test_hash_follows_content(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    """The hash of the items changes with the text, its order, the tokenizer, window and stride, and with nothing else."""
    rows = table()
    path = write(tmp_path, rows)
    expected = task(path).items("search").hash
    assert task(write(tmp_path, rows, "copy.jsonl"), batch=3).items("search").hash == expected
    others = [task(path, **options) for options in ({"window": 12}, {"stride": 12}, {"tokenizer": tokenizers["plain"]})]
    changed = [{**rows[0], "text": DOCUMENTS[0].replace("c", "b")}, *rows[1:]]
    others += [task(write(tmp_path, changed, "changed.jsonl")), task(write(tmp_path, rows[::-1], "turned.jsonl"))]
    assert len({expected, *(other.items("search").hash for other in others)}) == 6


def test_every_form_of_one_text(tmp_path: Path) -> None:
    """The same documents in one table, in split files, as text files and in folders of these are the same items."""
    text = "One\r\ndocument,\n\nof lines.\n"
    rows = [{"text": text, "split": "val"}, {"text": "Another.\n", "split": "test"}]
    expected = task(write(tmp_path, rows))
    files = {row["split"]: write(tmp_path, [row], f"{row['split']}.jsonl") for row in rows}
    texts = {}
    for row in rows:
        file = tmp_path / f"{row['split']}.txt"
        file.write_bytes(row["text"].encode())
        texts[row["split"]] = str(file)
    renamed = write(tmp_path, [{"content": row["text"], "part": row["split"]} for row in rows], "renamed.jsonl")
    forms = [task(files), task(texts), task(renamed, data={"text": "content", "split_column": "part"})]
    for form in forms:
        assert form.items("search").hash == expected.items("search").hash
        assert form.items("report").hash == expected.items("report").hash


def test_folder_of_text_files(tmp_path: Path) -> None:
    """A folder's text files are whole documents, not their lines."""
    for split in ("val", "test"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{split}.txt").write_text(f"Two lines\nof {split}.\n")
    items = task(tmp_path / "folder", window=64).items("search")
    assert [bytes(items[i]["input_ids"].tolist()) for i in range(len(items))] == [b"Two lines\nof val."]


def test_where_keeps_rows(tmp_path: Path) -> None:
    """`where` keeps the rows with a value, or one of some, in a column of any kind; what no row has is an error with the nearest."""
    rows = [{**row, "domain": ("code", "prose")[i % 4 < 2], "year": i % 3} for i, row in enumerate(table())]
    path = write(tmp_path, rows)

    def kept(**where: Any) -> str:
        return task(path, data={"where": where}).items("search").hash

    def alone(keep: Callable[[dict[str, Any]], bool]) -> str:
        return task(write(tmp_path, [row for row in rows if keep(row)], "alone.jsonl")).items("search").hash

    assert kept(domain="code") == alone(lambda row: row["domain"] == "code")
    assert kept(domain=["code", "prose"]) == task(path).items("search").hash
    assert kept(year=1, domain="prose") == alone(lambda row: row["year"] == 1 and row["domain"] == "prose")
    with pytest.raises(DataError, match=r"has 'coed' as its domain; did you mean 'code'\? known: code, prose"):
        kept(domain="coed")
    with pytest.raises(DataError, match="has no column 'domian'; did you mean 'domain'"):
        kept(domian="code")
    with pytest.raises(DataError, match=r"split 'val' is empty where \{'domain': 'other'\}"):
        task(write(tmp_path, [*rows, {**rows[1], "domain": "other"}], "more.jsonl"), data={"where": {"domain": "other"}})
    many = write(tmp_path, [{**row, "key": f"key{i:03}"} for i, row in enumerate(table() * 10)], "many.jsonl")
    with pytest.raises(DataError, match=r"did you mean 'key\d01'\? known: .*key001") as caught:
        task(many, data={"where": {"key": "key01"}})
    assert len(str(caught.value)) < 600


def test_copies_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A document of the search part that also stands in the report part is left out of the search part, and said so."""
    rows = table()
    with caplog.at_level(logging.WARNING):
        made = task(write(tmp_path, [*rows, {**rows[1], "split": "val"}], "more.jsonl"))
    assert made.items("search").hash == task(write(tmp_path, rows)).items("search").hash
    assert "left 1 of 7 documents out of 'val'" in caplog.text


def test_model_that_does_not_fit(tmp_path: Path) -> None:
    """Too small a vocabulary, too few positions, no logits per token, and logits that read ahead are found before anything is scored."""
    made = task(write(tmp_path, table()))
    with pytest.raises(DataError, match=r"ids up to 240, but the model's vocabulary is 200; name the model's own tokenizer"):
        made.check(gpt2(vocabulary=200))
    accents = [{"text": "é" * count, "split": split} for split, count in (("val", 9), ("test", 8))]
    with pytest.raises(DataError, match="ids up to 195, but the model's vocabulary is 180"):
        task(write(tmp_path, accents, "accents.jsonl")).check(gpt2(vocabulary=180))
    with pytest.raises(DataError, match=r"windows have up to 16 tokens, but the model has 12 positions; set `window: 12` or less"):
        made.check(gpt2(positions=12))
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        masked = BertForMaskedLM(BertConfig(vocab_size=256, max_position_embeddings=64, **sizes))
        with torch.no_grad():
            for parameter in masked.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        masked.train(False)
        images = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    with pytest.raises(DataError, match="BertForMaskedLM depend on later tokens"):
        made.check(masked)
    with pytest.raises(DataError, match="the model does not take tokens"):
        made.check(images)
    with pytest.raises(DataError, match=r"expected a model with logits \[n, tokens, vocabulary\], got Plain"):
        made.check(Plain(torch.nn.Embedding(256, 4), lambda hidden: hidden.mean(dim=1)))


class Plain(torch.nn.Module):
    """A model of nothing but an embedding, with logits made of it."""

    def __init__(self, embedding: torch.nn.Embedding, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embedding, self.read = embedding, read

    def forward(self, input_ids: torch.Tensor) -> Any:
        return types.SimpleNamespace(logits=self.read(self.embedding(input_ids)))


def test_plain_module(tmp_path: Path) -> None:
    """A module without configuration or attention mask is asked too, and its ids are checked by its logits."""
    path = write(tmp_path, table())
    counts = torch.nn.Embedding(256, 250)
    torch.nn.init.zeros_(counts.weight)
    records = task(path).records(Plain(counts, lambda hidden: hidden), "search", CPU)
    np.testing.assert_allclose(records["loss"], math.log(250), rtol=1e-6)
    task(path).check(Plain(counts, lambda hidden: hidden))
    with pytest.raises(DataError, match="vocabulary is 240"):
        task(path).check(Plain(counts, lambda hidden: hidden[..., :240]))


def test_broken_model_fails_alone(tmp_path: Path) -> None:
    """Logits that are not finite fail the candidate instead of counting as predictions."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(CandidateError, match="logits on the search part are not finite"):
        task(write(tmp_path, table())).records(model, "search", CPU)


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (dict, {"report": "tset"}, "no split 'tset'; did you mean 'test'"),
        (dict, {"text": "txet"}, r"no column 'txet' \(text\); did you mean 'text'"),
        (lambda row: {**row, "text": 3}, {}, "split 'val', row 0: expected text in the column 'text', got 3"),
        (lambda row: {**row, "text": None}, {}, "split 'val', row 0: expected text in the column 'text', got None"),
        (lambda row: {**row, "text": row["split"][0]}, {}, "no document of the search part has two tokens or more"),
    ],
)
def test_data_that_is_not_what_it_says(tmp_path: Path, change: Change, data: dict[str, Any], message: str) -> None:
    """Each flaw of the data is one error that says where it is and what was expected."""
    with pytest.raises(DataError, match=message):
        task(write(tmp_path, [change(row) for row in table()]), data=data)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    """A text file in another encoding, and text with half a character, are errors about the data."""
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot read .*latin\.txt: 'utf-8' codec"):
        task({"val": str(tmp_path / "latin.txt"), "test": str(tmp_path / "latin.txt")})
    with pytest.raises(DataError, match="cannot be written as UTF-8"):
        ByteTokenization()("\ud800")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "tokenizer: the models bring none; give a folder, hf://owner/name, or 'bytes'"),
        ({"tokenizer": 3}, "tokenizer: expected a folder, .* got 3"),
        ({"window": 1}, "window: expected a whole number at least 2, got 1"),
        ({"window": "64"}, "window: expected a whole number at least 2, got '64'"),
        ({"stride": 0}, r"stride: expected a whole number from 1 to 16 \(`window`\), got 0"),
        ({"stride": 17}, "stride: expected a whole number from 1 to 16"),
        ({"limit": 0}, "limit: expected a whole number at least 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number at least 0, got -1"),
        ({"batch": 0}, "batch: expected a whole number at least 1, got 0"),
        ({"data": {"where": "code"}}, "where: expected columns and the values to keep"),
        ({"data": {"wehre": {}}}, "unknown key 'wehre'; did you mean 'where'"),
        ({"data": {"report": "val"}}, "search and report are both 'val'"),
    ],
)
def test_malformed_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Options that are unknown, of another type, or out of range are errors that say what would have done."""
    with pytest.raises(ConfigError, match=message):
        task(write(tmp_path, table()), **options)


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    """A folder without a tokenizer, with a broken or a slow one, is an error that names it; nothing is looked up on a hub."""
    path = write(tmp_path, table())
    with pytest.raises(DataError, match=r"nowhere holds no tokenizer\.json; name a folder that does"):
        task(path, tokenizer=tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load the tokenizer of"):
        task(path, tokenizer=tmp_path)
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a": 1, "b</w>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    slow: Any = CTRLTokenizer
    slow(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path / "slow")
    with pytest.raises(DataError, match=r"slow has no tokenizer\.json, without which it is unknown which text a token stands for"):
        task(path, tokenizer=tmp_path / "slow")
