"""A tiny tokenizer, tiny BERTs over its vocabulary, and tables of rows, for tests of tasks on text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedModel, PreTrainedTokenizerFast

from mergeopt.models.architecture import quiet_transformers

Rows = list[dict[str, Any]]
M = TypeVar("M", bound=PreTrainedModel)

TEXTS = [
    "the cat sat on the mat",
    "glad",
    "a sad dog, barking at the cat and at another dog",
    "so glad of the mat!",
    "what",
    "the dog is angry at the glad cat",
    "angry and sad",
    "surprised by a barking mat on the mat on the mat",
]
PIECES = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", "!", *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase),
    "the", "cat", "sat", "on", "mat", "glad", "sad", "dog", "bark", "##ing", "at", "and", "an", "##other", "so", "of", "what", "is", "ang",
    "##ry", "surprise", "by", "again",
]  # fmt: skip
VOCABULARY = 90
"""Of the models: more than the tokenizer's."""


def wordpiece(folder: Path) -> Path:
    """Write a WordPiece tokenizer of BERT's kind: lower case, [CLS] and [SEP], segments for pairs; saved with cutting and padding on."""
    # not trained, which depends on the run: ties fall as they may
    made = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # as sentence encoders are published; neither may reach a task
    made.enable_truncation(6)
    made.enable_padding(length=6)
    wrap: Any = PreTrainedTokenizerFast
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    wrap(tokenizer_object=made, model_input_names=inputs, **named).save_pretrained(folder)
    return folder


def bert(kind: type[M], labels: Sequence[str], **changes: Any) -> M:
    """Return a BERT of two layers with random weights, large enough that its answers differ."""
    sizes: Mapping[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 48, "id2label": dict(enumerate(labels)), "label2id": {name: k for k, name in enumerate(labels)},
    }  # fmt: skip
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(0)
        model: Any = kind(BertConfig(**{**sizes, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.8 * torch.randn_like(parameter))
    model.train(False)
    found: M = model
    return found


def write(folder: Path, rows: Iterable[Mapping[str, Any]], name: str = "data.jsonl") -> str:
    """Write rows as json lines and return the file."""
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def entropy(logits: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return scipy's entropy of the softmax in nats, over the last axis."""
    found: npt.NDArray[np.float64] = stats.entropy(torch.softmax(logits.detach().double(), dim=-1).numpy(), axis=-1)
    return found
