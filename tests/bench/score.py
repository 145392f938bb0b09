"""Eight candidates scored by one live model, in several ways: ratios within one run, JSON with --json.

    python tests/bench/score.py [--json] [--size small|base] [--device cuda] [--dtype float32] [--threads N] [--rounds N] [--force]

`views` is ours: parameters are views of an arena, and a candidate is bound by pointing at its row. It is held against copying the
candidate's parameters into a model, `load_state_dict`, and one pass of all candidates by `torch.func` (`functional_call` under `vmap`).

`first_half` is ours where candidates share the first half of the layers and one of them runs it; `known_half` where an earlier candidate
had run it already. The bar is views / known_half >= 1.8 at 512 tokens. `layers` makes and scores all candidates layer by layer, reading
the models from their files, and is held against making and scoring them one by one in an arena.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import mergeopt as mo
from mergeopt.batched_task import Batch, Indices, batched_records
from mergeopt.evaluation.prefix import PrefixCache, identity
from mergeopt.evaluation.threads import computing_threads
from mergeopt.forward import forward
from mergeopt.models.architecture import quiet_transformers
from mergeopt.task import Part, Records
from tests.bench.turns import ratio, take_turns, where

SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 8000},
    "base": {},
}
TOKENS = (512, 64)
LENGTH = 16  # tokens of an item
CANDIDATES = 8
EXPERTS = 3
AGREE = 1e-5  # largest difference of logits between ways of scoring, over the largest logit


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    device = torch.device(asked.device)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), torch.inference_mode():
        _write_models(Path(folder), asked.size)
        work: dict[str, Callable[[], object]] = {}
        report: dict[str, Any] = {"size": asked.size, "candidates": CANDIDATES, "experts": EXPERTS, "dtype": asked.dtype}
        for tokens in TOKENS:
            ways = _Ways(Path(folder), tokens, asked)
            work |= {f"{name}_{tokens}": run for name, run in ways.work().items()}
            report["parameters"] = ways.problem.layout.elements
            report[f"disagreement_{tokens}_tokens"] = ways.disagreement()
        copied = torch.empty_like(ways.rows[0])
        with computing_threads(asked.threads):
            seconds = take_turns({"copy": lambda: copied.copy_(ways.rows[0]), **work}, asked.rounds, device, force=asked.force)
    for tokens in TOKENS:
        for way in ("copied", "load_state_dict", "vmap"):
            report[f"{way}_over_views_{tokens}_tokens"] = ratio(seconds, f"{way}_{tokens}", f"views_{tokens}")
        for way in ("first_half", "known_half"):
            report[f"views_over_{way}_{tokens}_tokens"] = ratio(seconds, f"views_{tokens}", f"{way}_{tokens}")
        report[f"layers_over_arena_{tokens}_tokens"] = ratio(seconds, f"layers_{tokens}", f"arena_{tokens}")
        report[f"milliseconds_per_candidate_{tokens}_tokens"] = 1e3 * float(np.median(seconds[f"views_{tokens}"])) / CANDIDATES
    report |= where(seconds, device)
    print(json.dumps(report) if asked.json else "\n".join(f"{name:40} {value}" for name, value in report.items()))


class _Ways:
    """The ways in which candidates that share half of their layers are scored on so many tokens."""

    def __init__(self, folder: Path, tokens: int, asked: argparse.Namespace) -> None:
        self.problem, self._layered = (_problem(folder, tokens, asked, scoring) for scoring in ("candidates", "layers"))
        self._device, evaluator = self.problem.device, self.problem.evaluator
        self._recipes = [self.problem.decode(genome) for genome in _genomes(self.problem)]
        with computing_threads(asked.threads):
            assert not any(evaluator.make(self._recipes))
        self.rows, self._live = evaluator.arena.rows, evaluator.arena.lives()
        self._inputs = {"input_ids": _token_ids(tokens, self.problem)}
        self._other = self.problem.layout.live_model(self.problem.dtype, self._device)
        self._own = dict(self._other.named_parameters())
        self._states = [{s.live: row[s.start : s.end].view(s.shape) for s in self.problem.layout.segments} for row in self.rows]
        self._prefixes, self._round = PrefixCache(1 << 30), 0
        values = [evaluator.values(self.problem.operator, recipe) for recipe in self._recipes]
        self._identities = [identity(r, v, len(self.problem.layout.segments)) for r, v in zip(self._recipes, values, strict=True)]

    def work(self) -> dict[str, Callable[[], object]]:
        """Return what is timed, by name."""
        return {
            "views": self.views,
            "copied": self.copied,
            "load_state_dict": self.loaded,
            "vmap": self.vmap,
            "first_half": self.first_half,
            "known_half": self.known_half,
            "arena": partial(self._evaluated, self.problem),
            "layers": partial(self._evaluated, self._layered),
        }

    def disagreement(self) -> float:
        """Return the largest difference of logits from ours, over the largest logit.

        Raises:
            AssertionError: it is more than rounding.
        """
        ours = self.views()
        others = (self.copied(), self.loaded(), self.vmap(), self.first_half(), self.known_half())
        worst = max(float((other - ours).abs().max() / ours.abs().max()) for other in others)
        assert worst <= AGREE or self.problem.dtype != torch.float32, worst
        return worst

    def views(self) -> torch.Tensor:
        """Score by pointing at the candidates' rows."""
        arena = self.problem.evaluator.arena
        return torch.stack([forward(arena.bind(row), self._inputs, self._device) for row in range(CANDIDATES)])

    def copied(self) -> torch.Tensor:
        """Score by copying each candidate's parameters into a model."""
        made = []
        for state in self._states:
            for name, tensor in state.items():
                self._own[name].copy_(tensor)
            made.append(forward(self._other, self._inputs, self._device))
        return torch.stack(made)

    def loaded(self) -> torch.Tensor:
        """Score by loading each candidate's state dict into a model."""
        made = []
        for state in self._states:
            self._other.load_state_dict(state, strict=False)
            made.append(forward(self._other, self._inputs, self._device))
        return torch.stack(made)

    def vmap(self) -> torch.Tensor:
        """Score all candidates in one pass over stacked parameters."""
        stacked = {s.live: self.rows[:, s.start : s.end].view(CANDIDATES, *s.shape) for s in self.problem.layout.segments}
        inputs = {name: tensor.to(self._device) for name, tensor in self._inputs.items()}

        def one(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            logits: torch.Tensor = torch.func.functional_call(self._other, parameters, (), inputs).logits
            return logits

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations without a rule of their own, which run candidate by candidate
            made: torch.Tensor = torch.func.vmap(one)(stacked)
        return made

    def first_half(self) -> torch.Tensor:
        """Score candidates of which one runs the layers that all share: other ones each time, as far as the cache is told."""
        self._round += 1
        return self._reusing([replace(own, all_tensors=own.all_tensors + str(self._round).encode()) for own in self._identities])

    def known_half(self) -> torch.Tensor:
        """Score candidates whose shared layers ran for earlier candidates."""
        self._round += 1
        upper = [segment.layer not in _lower(self.problem) for segment in self.problem.layout.segments]
        suffix = str(self._round).encode()
        return self._reusing(
            [
                replace(own, tensors=tuple(t + suffix if above else t for t, above in zip(own.tensors, upper, strict=True)))
                for own in self._identities
            ]
        )

    def _reusing(self, identities: Sequence[Any]) -> torch.Tensor:
        self._prefixes.know(identities)
        arena, made = self.problem.evaluator.arena, []
        for row, own in enumerate(identities):
            with self._prefixes.scoring(self._live, own):
                made.append(forward(arena.bind(row), self._inputs, self._device))
        return torch.stack(made)

    def _evaluated(self, problem: mo.MergeProblem) -> None:
        for evaluation in problem.evaluate([mo.Proposal("x", recipe=recipe) for recipe in self._recipes], "search"):
            assert evaluation.error is None, evaluation.error


class _Tokens:
    """Random token ids and labels, as a task."""

    name = "tokens"
    parts: tuple[Part, ...] = ("search",)

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids
        self.hash = str(tuple(ids.shape))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return {"input_ids": self._ids[index], "label": 0}

    def items(self, part: Part) -> _Tokens:
        return self

    def check(self, model: torch.nn.Module) -> None:
        return

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        return batched_records(self, model, part, device, items)

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        yield Batch(np.arange(len(self)), {"input_ids": self._ids})

    def record(self, model: torch.nn.Module, part: Part, items: Indices, logits: torch.Tensor) -> Records:
        return {"prediction": logits.argmax(1).cpu().numpy(), "label": np.zeros(len(items), dtype=np.int64)}


def _problem(folder: Path, tokens: int, asked: argparse.Namespace, scoring: Any) -> mo.MergeProblem:
    pool = mo.Pool(folder / "m0", {f"m{index}": folder / f"m{index}" for index in range(1, EXPERTS + 1)})
    vocabulary = pool.spec("bert.embeddings.word_embeddings.weight").shape[0]
    ids = torch.randint(1, vocabulary, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    return mo.MergeProblem(
        pool,
        "task_arithmetic",
        [mo.TaskObjective("tokens", _Tokens(ids), mo.load("metrics", "accuracy")())],
        groups="layer",
        parameters={"weight": {"low": 0.0, "high": 1.0}},
        dtype=asked.dtype,
        device=asked.device,
        batch=CANDIDATES,
        threads=asked.threads,
        scoring=scoring,
        recall=False,  # the same candidates are scored in every round
    )


def _token_ids(tokens: int, problem: mo.MergeProblem) -> torch.Tensor:
    task: Any = problem.objectives[0].task  # type: ignore[attr-defined]
    ids: torch.Tensor = next(task.batches(None, "search")).inputs["input_ids"]
    assert ids.numel() == tokens
    return ids


def _lower(problem: mo.MergeProblem) -> set[str]:
    """Return the layers that candidates share: the embeddings and the first half of the others."""
    layers = [name for name in dict.fromkeys(segment.layer for segment in problem.layout.segments) if name.startswith("layer.")]
    return {"embeddings", *layers[: len(layers) // 2]}


def _genomes(problem: mo.MergeProblem) -> list[Any]:
    """Return genomes that agree in the layers that candidates share."""
    rng, lower = np.random.default_rng(0), _lower(problem)
    shared = np.array([name.split("/")[1] in lower for name in problem.coefficients.space.names])
    genomes = rng.random((CANDIDATES, len(shared)))
    return list(np.where(shared, genomes[0], genomes))


def _write_models(folder: Path, size: str) -> None:
    make: Any = BertConfig
    kind: Any = BertForSequenceClassification
    for index in range(EXPERTS + 1):
        torch.manual_seed(index)
        kind(make(**SIZES[size])).save_pretrained(folder / f"m{index}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models")
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
