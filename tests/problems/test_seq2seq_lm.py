"""Encoder-decoder language models, against transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mergeopt import registry
from mergeopt.batched_task import JudgedTask
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import Items
from mergeopt_problems.lm_metrics import BytePerplexity, Perplexity
from mergeopt_problems.seq2seq_lm import Seq2SeqLM
from mergeopt_problems.text_items import IGNORED
from tests.problems.tiny_text import TEXTS, Rows, wordpiece, write

CPU = torch.device("cpu")
Make = Callable[..., Seq2SeqLM]

pytestmark = pytest.mark.usefixtures("cache")


def table() -> Rows:
    return [{"prompt": text, "reference": f"{text[: 3 + i]} é", "split": "val"} for i, text in enumerate(TEXTS)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make the task on rows, over bytes."""

    def made(rows: Rows | None = None, **options: Any) -> Seq2SeqLM:
        data = {"path": write(tmp_path, table() if rows is None else rows), "search": "val"}
        task = registry.load("tasks", "seq2seq_lm")(data=data, **{"tokenizer": "bytes", "batch": 3, **options})
        assert isinstance(task, Seq2SeqLM)
        return task

    return made


def random(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
        torch.manual_seed(0)
        model: PreTrainedModel = kind(config)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(False)
    return model


def t5(**changes: Any) -> Any:
    sizes: Any = {"vocab_size": 256, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "n_positions": 8}
    return random(
        T5ForConditionalGeneration, T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **changes})
    )


def bart(**changes: Any) -> Any:
    sizes: Any = {
        "vocab_size": 256, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip
    return random(BartForConditionalGeneration, BartConfig(**{**sizes, **changes}))


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize("tokenizer", ["bytes", "folder"])
def test_losses_are_transformers_own(make: Make, tmp_path: Path, build: Callable[[], Any], tokenizer: str) -> None:
    """Nats of each reference equal transformers' own loss, pair by pair and without padding; metrics are made of their sums."""
    path = wordpiece(tmp_path / "tokenizer") if tokenizer == "folder" else tokenizer
    task, model = make(tokenizer=path), build()
    assert isinstance(task, JudgedTask)
    assert isinstance(task.items("search"), Items)
    task.check(model)
    nats, counts = [], []
    plain: Any = AutoTokenizer.from_pretrained(path) if tokenizer == "folder" else lambda text: {"input_ids": list(text.encode())}
    for row in table():
        source, target = plain(row["prompt"])["input_ids"], plain(row["reference"])["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss
        nats.append(float(loss) * len(target))
        counts.append(len(target))
    records = task.records(model, "search", CPU)
    np.testing.assert_allclose(records["nll"], nats, rtol=1e-5)
    assert records["tokens"].tolist() == counts
    assert records["bytes"].tolist() == [len(row["reference"].encode()) for row in table()]
    np.testing.assert_allclose(records["loss"], np.array(nats) / counts, rtol=1e-5)
    for metric, total in ((Perplexity(), sum(counts)), (BytePerplexity(), records["bytes"].sum())):
        score = TaskObjective("one", task, metric).score(model, "search", CPU, {})
        assert score.value == pytest.approx(math.exp(sum(nats) / total), rel=1e-5)


def test_predictions_are_as_recorded(make: Make) -> None:
    """Losses of predicted tokens sum to the recorded ones, pair after pair in the order asked for, and keep the model's graph."""
    task, model = make(), t5()
    records = task.records(model, "search", CPU)
    made = task.predict(model, "search", [3, 0, 5], CPU)
    losses = F.cross_entropy(made.logits, made.labels, reduction="none").double()
    assert made.rows is not None
    sums = np.bincount(made.rows.numpy(), weights=losses.detach().numpy())
    np.testing.assert_allclose(sums, records["nll"][[3, 0, 5]], rtol=1e-5)
    one = task.items("search")[3]
    assert one["label"].tolist() == list(table()[3]["reference"].encode())
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 10
    labels = task.items("search").labels([0, 7])
    assert (labels == IGNORED).any()


def test_models_that_do_not_fit(make: Make) -> None:
    """Decoders, too few positions and too small vocabularies are refused by name; T5 has no positions to run out of; NaN fails alone."""
    with pytest.raises(DataError, match="expected an encoder-decoder of transformers, got GPT2LMHeadModel"):
        make().check(random(GPT2LMHeadModel, GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(DataError, match="texts have up to 48 tokens, but the model has 40 positions"):
        make().check(bart(max_position_embeddings=40))
    with pytest.raises(DataError, match="ids up to 195, but the model's vocabulary is 120"):
        make().check(t5(vocab_size=120))
    model = t5()
    with torch.no_grad():
        model.decoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(CandidateError, match="logits on the search part are not finite"):
        make().records(model, "search", CPU)


def test_options_and_rows_of_no_use(make: Make) -> None:
    """Options out of range, and texts without a token, are errors that say so."""
    for options, said in (({"batch": 0}, "batch: expected"), ({"limit": 0}, "limit: expected"), ({"seed": -1}, "seed: expected")):
        with pytest.raises(ConfigError, match=said):
            make(**options)
    with pytest.raises(DataError, match="the text '' has no token"):
        make([*table(), {"prompt": "a", "reference": "", "split": "val"}])
