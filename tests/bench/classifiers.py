"""BERT classifiers of random weights, texts of random words for them, and the loop over state dicts that searches are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import mergeopt as mo
from mergeopt.evaluation.threads import computing_threads
from mergeopt.task import Part

__all__ = ["EXPERTS", "NaiveLoop", "problem_over", "write_models", "write_texts"]

SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 4000},
    "small": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 8000},
    "base": {},
}
"""Of models: BERT-base's sizes are the configuration's own."""
EXPERTS = 3
TEXTS, WORDS = "texts.jsonl", "words"
LARGE: Any = BertForSequenceClassification


def write_models(folder: Path, size: str) -> None:
    """Write a base, experts that differ from it by a fifth of what it varies by, and a tokenizer whose words are numbers."""
    make: Any = BertConfig
    config = make(**SIZES[size], num_labels=2)
    torch.manual_seed(0)
    base = {name: tensor.clone() for name, tensor in LARGE(config).state_dict().items()}
    for index in range(EXPERTS + 1):
        torch.manual_seed(index)
        other = LARGE(config)
        if index:
            other.load_state_dict({name: base[name] + 0.2 * tensor for name, tensor in other.state_dict().items()})
        other.save_pretrained(folder / f"m{index}")
    words = Tokenizer(models.WordLevel({str(word): word for word in range(config.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=words, pad_token="0").save_pretrained(folder / WORDS)


def write_texts(folder: Path, counts: Mapping[Part, tuple[int, int]]) -> None:
    """Write texts whose classes are what the first expert says, which is made to say both equally often: candidates near it score more.

    Args:
        folder: of the models.
        counts: of each part, texts and tokens of each.
    """
    model, rng = LARGE.from_pretrained(folder / "m1").eval(), np.random.default_rng(0)
    rows: list[str] = []
    for part, (texts, length) in counts.items():
        tokens = torch.from_numpy(rng.integers(1, model.config.vocab_size, (texts, length)))
        with torch.inference_mode():
            logits = torch.cat([model(input_ids=some).logits for some in torch.split(tokens, 32)])
        leaning = logits[:, 1] - logits[:, 0]
        if not rows:
            model.classifier.bias.data[0] += leaning.median()
            leaning -= leaning.median()
        for words, label in zip(tokens.tolist(), (leaning > 0).tolist(), strict=True):
            rows.append(json.dumps({"text": " ".join(map(str, words)), "label": int(label), "split": part}))
    model.save_pretrained(folder / "m1")
    (folder / TEXTS).write_text("\n".join(rows))


def problem_over(folder: Path, parts: Mapping[str, str], **options: Any) -> mo.MergeProblem:
    """Return the search for the accuracy of merges by task arithmetic; `parts` names the splits, options go to the problem."""
    task = mo.load("tasks", "text_classification")(data={"path": str(folder / TEXTS), **parts}, tokenizer=folder / WORDS)
    objective = mo.TaskObjective("classes", task, mo.load("metrics", "accuracy")())
    pool = mo.Pool(folder / "m0", {f"m{index}": folder / f"m{index}" for index in range(1, EXPERTS + 1)})
    return mo.MergeProblem(pool, "task_arithmetic", [objective], parameters={"weight": {"low": 0.0, "high": 1.0}}, **options)


class NaiveLoop:
    """A loop over state dicts: merges tensor by tensor with temporaries, loads into a resident model, and scores as a problem does.

    Args:
        folder: of the models.
        problem: gives device, type and objective.
    """

    def __init__(self, folder: Path, problem: mo.MergeProblem) -> None:
        self._device, self._dtype, self._threads = problem.device, problem.dtype, problem.threads
        self._objective = problem.objectives[0]
        self._base, *self._experts = (self._state(folder / f"m{index}") for index in range(EXPERTS + 1))
        self._model = self._model_of(folder / "m0")

    @torch.no_grad()
    def load(self, weights: list[float]) -> Any:
        """Merge, and load into the resident model."""
        with computing_threads(self._threads):
            merged = {}
            for name, base in self._base.items():
                total = base
                for weight, expert in zip(weights, self._experts, strict=True):
                    total = total + weight * (expert[name] - base)
                merged[name] = total
            self._model.load_state_dict(merged)
        return self._model

    def resident(self, weights: list[float], part: Part) -> float:
        """Merge, load into the resident model, and score."""
        return self._score(self.load(weights), part)

    def from_disk(self, weights: list[float], part: Part, folder: Path) -> float:
        """Merge, write a model folder, load a model of it, and score."""
        self.load(weights).save_pretrained(folder)
        return self._score(self._model_of(folder), part)

    def _score(self, model: torch.nn.Module, part: Part) -> float:
        model.eval()
        with computing_threads(self._threads):
            return self._objective.score(model, part, self._device, {}).value

    def _state(self, folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._device, self._dtype) for name, tensor in load_file(folder / "model.safetensors").items()}

    def _model_of(self, folder: Path) -> Any:
        return LARGE.from_pretrained(folder, dtype=self._dtype).to(self._device)
