"""One small task of each kind that asks a model once per batch, with a model for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mergeopt.batched_task import BatchedTask
from mergeopt_problems.causal_lm import CausalLM
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.seq2seq_lm import Seq2SeqLM
from mergeopt_problems.text_classification import TextClassification
from mergeopt_problems.text_regression import TextRegression
from mergeopt_problems.token_classification import TokenClassification
from tests.problems.tiny_text import TEXTS, Rows, bert, wordpiece, write

__all__ = ["KINDS", "Asked"]

TAGS = ["O", "B-PER", "I-PER"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A task and a model that it can ask."""

    task: BatchedTask
    model: PreTrainedModel


def text_classification(folder: Path) -> Asked:
    task = TextClassification(data=_source(folder, _rows()), tokenizer=wordpiece(folder), batch=3)
    return Asked(task, bert(BertForSequenceClassification, ["a", "b", "c"], num_hidden_layers=3))


def text_regression(folder: Path) -> Asked:
    rows = [{**row, "target": i / 3} for i, row in enumerate(_rows())]
    task = TextRegression(data=_source(folder, rows), tokenizer=wordpiece(folder), batch=3)
    return Asked(task, bert(BertForSequenceClassification, ["alike"], num_hidden_layers=3))


def token_classification(folder: Path) -> Asked:
    rows: Rows = [
        {"tokens": text.split(), "tags": [TAGS[(i + k) % 3] for k in range(len(text.split()))], "split": "val"}
        for i, text in enumerate(TEXTS)
    ]
    task = TokenClassification(data=_source(folder, rows), tokenizer=wordpiece(folder), batch=3)
    return Asked(task, bert(BertForTokenClassification, TAGS, num_hidden_layers=3))


def causal_lm(folder: Path) -> Asked:
    task = CausalLM(data=_source(folder, _rows()), tokenizer="bytes", window=12, batch=4)
    config = GPT2Config(vocab_size=256, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    return Asked(task, _random(GPT2LMHeadModel, config))


def image_classification(folder: Path) -> Asked:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((10, 3, 8, 8), generator=generator)
    task = ImageTask(name="images", parts={"search": ImageItems(pixels, torch.arange(10) % 3, settings={})}, batch=4)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        id2label=dict(enumerate("abc")),
    )  # fmt: skip
    return Asked(task, _random(ViTForImageClassification, config))


def seq2seq_lm(folder: Path) -> Asked:
    rows = [{"prompt": text, "reference": text[::-2], "split": "val"} for text in TEXTS]
    task = Seq2SeqLM(data=_source(folder, rows), tokenizer="bytes", batch=3)
    sizes: Any = {"vocab_size": 256, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    config = T5Config(**{**sizes, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3})
    return Asked(task, _random(T5ForConditionalGeneration, config))


KINDS: list[Callable[[Path], Asked]] = [
    text_classification,
    text_regression,
    token_classification,
    causal_lm,
    seq2seq_lm,
    image_classification,
]


def _rows() -> Rows:
    return [{"text": text, "label": i % 3, "split": "val"} for i, text in enumerate(TEXTS)]


def _source(folder: Path, rows: Rows) -> dict[str, str]:
    return {"path": write(folder, rows), "search": "val"}


def _random(kind: Callable[[Any], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.train(False)
    return model
