"""Candidates made and scored per second, against two loops that score with the same code: JSON with --json.

    python tests/bench/end_to_end.py [--json] [--size small|base] [--device cuda] [--dtype float32] [--threads N] [--rounds N] [--force]

`naive` merges state dicts tensor by tensor and loads them into a resident model; `disk` also writes every candidate as a model folder and
loads that. Models are BERT classifiers of random weights, `base` with BERT-base's sizes; the task is text classification. Beside each ratio
stands that of making alone, which it comes from: what scoring leaves of it.

The bars are for `--size base` on a CPU: at 2,000 scored tokens naive / ours >= 1.25 and disk / ours >= 1.5, at 100 tokens >= 4 and >= 8.
`small` has a fifth of the parameters and the same shape, and takes under a minute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import mergeopt as mo
from mergeopt.evaluation import product
from mergeopt.evaluation.threads import computing_threads
from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import Part
from tests.bench.turns import ratio, take_turns, where

SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 8000},
    "base": {},
}
TEXTS: Mapping[Part, tuple[int, int]] = {"search": (16, 125), "report": (4, 25)}
"""How many texts of how many tokens: 2,000 and 100 tokens to score."""
EXPERTS = 3
CLASSES = 2


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    product.PAYS = 0  # compiled at once, not after some candidates
    device = torch.device(asked.device)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        problem = _problem(Path(folder), asked)
        work = _work(problem, Path(folder) / "candidate", asked)
        seconds = take_turns(work, asked.rounds, device, force=asked.force)
    report: dict[str, Any] = {"size": asked.size, "parameters": problem.layout.elements, "experts": EXPERTS, "dtype": asked.dtype}
    for part, (texts, length) in TEXTS.items():
        tokens, batch = texts * length, _batch(part, asked)
        own = batch / np.median(seconds[f"ours_{part}"])
        report |= {
            f"candidates_per_second_{tokens}_tokens": round(float(own), 3),
            f"naive_over_ours_{tokens}_tokens": batch * ratio(seconds, f"naive_{part}", f"ours_{part}"),
            f"disk_over_ours_{tokens}_tokens": batch * ratio(seconds, f"disk_{part}", f"ours_{part}"),
        }
    report |= {
        "naive_over_ours_making_alone": asked.batch * ratio(seconds, "naive_make", "ours_make"),
        "ours_making_copies": ratio(seconds, "ours_make", "copy") / asked.batch,
        **where(seconds, device),
    }
    print(json.dumps(report) if asked.json else "\n".join(f"{name:38} {value}" for name, value in report.items()))


def _batch(part: Part, asked: argparse.Namespace) -> int:
    """Return how many candidates are timed at once: two of the long ones, in which making hardly counts."""
    return int(asked.batch if part == "report" else min(2, asked.batch))


def _work(problem: mo.MergeProblem, folder: Path, asked: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what is timed: a memory copy, making alone, and making and scoring per kind of loop and number of tokens."""
    evaluator = problem.evaluator
    rng = np.random.default_rng(0)
    populations = [[problem.decode(genome) for genome in rng.random((asked.batch, problem.info.space.dim))] for _ in range(2)]
    naive = _Naive(problem, asked.threads)
    rows, turn = evaluator.arena.rows, [0]

    def ours(count: int) -> list[Any]:
        turn[0] += 1  # so that no call finds its own candidates already there
        return populations[turn[0] % 2][:count]

    def evaluate(part: Part) -> None:
        for outcome in evaluator.evaluate(ours(_batch(part, asked)), part):
            assert outcome.error is None, outcome.error

    work: dict[str, Callable[[], object]] = {
        "copy": lambda: naive.spare.copy_(rows[0]),
        "ours_make": lambda: evaluator.make(ours(asked.batch)),
        "naive_make": naive.load,
    }
    for part in TEXTS:
        work[f"ours_{part}"] = partial(evaluate, part)
        work[f"naive_{part}"] = partial(naive.resident, part)
        work[f"disk_{part}"] = partial(naive.from_disk, folder, part)
    return work


class _Naive:
    """A loop over state dicts, with a resident model, that scores as we do."""

    def __init__(self, problem: mo.MergeProblem, threads: int) -> None:
        self._device, self._objective, self._threads = problem.device, problem.objectives[0], threads
        base, *experts = (Path(path) for path in (problem.pool.base.path, *(e.path for e in problem.pool.experts.values())))
        self._dtype, self._rng = problem.dtype, np.random.default_rng(1)
        self._base = self._state(base)
        self._experts = [self._state(folder) for folder in experts]
        self._model = self._model_of(base)
        self.spare = torch.empty_like(problem.evaluator.arena.rows[0])

    def _state(self, folder: Path) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._device, self._dtype) for name, tensor in load_file(folder / "model.safetensors").items()}

    def _model_of(self, folder: Path) -> Any:
        kind: Any = BertForSequenceClassification
        return kind.from_pretrained(folder, dtype=self._dtype).to(self._device)

    @torch.no_grad()
    def load(self) -> Any:
        """Merge and load into the resident model."""
        weights = self._rng.random(EXPERTS).tolist()
        with computing_threads(self._threads):
            merged = {}
            for name, base in self._base.items():
                total = base
                for weight, expert in zip(weights, self._experts, strict=True):
                    total = total + weight * (expert[name] - base)
                merged[name] = total
            self._model.load_state_dict(merged)
        return self._model

    def resident(self, part: Part) -> None:
        """Merge, load into the resident model, and score."""
        self._score(self.load(), part)

    def from_disk(self, folder: Path, part: Part) -> None:
        """Merge, write a model folder, load a model of it, and score."""
        self.load().save_pretrained(folder)
        self._score(self._model_of(folder), part)

    def _score(self, model: torch.nn.Module, part: Part) -> None:
        model.eval()
        with computing_threads(self._threads):
            self._objective.score(model, part, self._device, {})


def _problem(folder: Path, asked: argparse.Namespace) -> mo.MergeProblem:
    make: Any = BertConfig
    config = make(**SIZES[asked.size], num_labels=CLASSES)
    classifier: Any = BertForSequenceClassification
    for index in range(EXPERTS + 1):
        torch.manual_seed(index)
        classifier(config).save_pretrained(folder / f"m{index}")
    task = mo.load("tasks", "text_classification")(
        data={"path": _texts(folder, config.vocab_size), "search": "search", "report": "report"},
        tokenizer=_tokenizer(folder, config.vocab_size),
    )
    objective = mo.TaskObjective("classes", task, mo.load("metrics", "accuracy")())
    pool = mo.Pool(folder / "m0", {f"m{index}": folder / f"m{index}" for index in range(1, EXPERTS + 1)})
    return mo.MergeProblem(
        pool,
        "task_arithmetic",
        [objective],
        groups="layer",
        parameters={"weight": {"low": 0.0, "high": 1.0}},
        dtype=asked.dtype,
        device=asked.device,
        batch=asked.batch,
        threads=asked.threads,
    )


def _tokenizer(folder: Path, vocabulary: int) -> Path:
    """Write a tokenizer whose words are numbers."""
    words = Tokenizer(models.WordLevel({str(word): word for word in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=words, pad_token="0").save_pretrained(folder / "words")
    return folder / "words"


def _texts(folder: Path, vocabulary: int) -> str:
    """Write texts of random words, and return the file."""
    rng = np.random.default_rng(0)
    rows = []
    for part, (texts, length) in TEXTS.items():
        for index in range(texts):
            words = " ".join(str(word) for word in rng.integers(1, vocabulary, length))
            rows.append(json.dumps({"text": words, "label": index % CLASSES, "split": part}))
    (folder / "texts.jsonl").write_text("\n".join(rows))
    return str(folder / "texts.jsonl")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models")
    parser.add_argument("--batch", type=int, default=8, help="candidates made at a time")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of merged weights")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--force", action="store_true", help="report on a busy machine, too")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


if __name__ == "__main__":
    main()
