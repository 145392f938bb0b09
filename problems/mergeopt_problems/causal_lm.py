"""Causal language modelling: how well a model predicts each next token of some documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import Batch, asked_items, in_batches
from mergeopt.errors import DataError
from mergeopt.forward import forward
from mergeopt.task import Part, Predictions, Records
from mergeopt_problems.drawing import drawn
from mergeopt_problems.model_settings import configured
from mergeopt_problems.options import check_draw, check_whole
from mergeopt_problems.parted_task import BatchedPartedTask
from mergeopt_problems.sequence_models import positions
from mergeopt_problems.text_data import TextSource, read
from mergeopt_problems.text_items import IGNORED, TextItems, Window, WindowBatch, windows
from mergeopt_problems.token_losses import token_losses
from mergeopt_problems.tokenization import tokenization

__all__ = ["CausalLM", "TextTask"]

LEAK = 0.1  # how far earlier logits may move with a later token, in their standard deviations: rounding in bfloat16, not reading ahead


class TextTask(BatchedPartedTask[TextItems]):
    """Next-token prediction on windows of tokens.

    Args:
        name: for people.
        parts: the windows by part.
        batch: windows scored at a time; fixed, since it may change the last bits of a score.
        warnings: what a run over them has to say, a sentence each.

    Raises:
        ConfigError: batch is below 1.
    """

    default_metric = "token_loss"

    def __init__(self, *, name: str, parts: Mapping[Part, TextItems], batch: int = 16, warnings: tuple[str, ...] = ()) -> None:
        super().__init__(name=name, parts=parts, batch=batch, warnings=warnings)

    def check(self, model: torch.nn.Module) -> None:
        """Run the longest window through a model, twice: once with another last token.

        Raises:
            DataError: a token id or a window is too large for the model, it has no logits per token, or they depend on later tokens.
        """
        highest = max(items.highest for items in self._items.values())
        longest = max(int(items.lengths.max()) for items in self._items.values())
        # before anything is run: an id past the embedding would take a GPU down
        self._check_vocabulary(highest, configured(model, ("vocab_size",)))
        most = positions(model)
        if most is not None and longest > most:
            raise DataError(
                f"task {self.name!r}: its windows have up to {longest} tokens, but the model has {most} positions; "
                f"set `window: {most}` or less"
            )
        items = max(self._items.values(), key=lambda part: int(part.lengths.max()))
        batch = items.batch([int(items.lengths.argmax())])
        logits = self._probe(model, batch)
        self._check_vocabulary(highest, logits.shape[2])
        other = batch.input_ids.clone()
        other[0, -1] = 0 if other[0, -1] else highest
        moved = self._probe(model, WindowBatch(other, batch.attention_mask, batch.labels))
        earlier = logits[:, :-1]
        if earlier.numel() and float((earlier - moved[:, :-1]).abs().max()) > LEAK * float(earlier.std()):
            raise DataError(
                f"task {self.name!r}: the logits of {type(model).__name__} depend on later tokens, so they predict nothing; "
                "expected a causal language model"
            )

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some windows, None for all, in batches of neighbours."""
        own = self.items(part)
        for chosen in in_batches(asked_items(len(own), items), self.batch):
            yield Batch(chosen, own.batch(chosen).inputs)

    def record(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Records:
        """Return what the predicted tokens of some windows cost.

        `nll`: sum of their negative log-likelihoods in nats (float64); `tokens`: how many they are; `bytes`: UTF-8 bytes of their text
        (both int64); `loss`: nll / tokens (float32), whose mean over windows weighs a short window like a long one.

        Raises:
            CandidateError: a logit is not finite.
        """
        own = self.items(part)
        losses = token_losses(logits, own.batch(items).labels.to(logits.device), self.name, part)
        nll, tokens = losses.cpu().double().sum(dim=1).numpy(), own.tokens[items]
        return {"loss": (nll / tokens).astype(np.float32), "nll": nll, "tokens": tokens, "bytes": own.bytes[items]}

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return one row per predicted token of some windows, window after window, keeping the graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of windows, one or more, in any order; they run as one batch.
            device: where the model is.
        """
        return self.predictions(model, part, np.asarray(items, dtype=np.intp), _logits(model, self.items(part).batch(items), device))

    def predictions(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Predictions:
        """Return the logits of the predicted tokens of some windows, one row each."""
        labels = self.items(part).batch(items).labels.to(logits.device)
        asked = labels != IGNORED
        return Predictions(logits[asked].to(torch.float32), labels[asked], asked.nonzero()[:, 0])

    def _probe(self, model: torch.nn.Module, batch: WindowBatch) -> torch.Tensor:
        shape = list(batch.input_ids.shape)
        try:
            with torch.inference_mode():
                logits = _logits(model, batch, next(model.parameters()).device)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"task {self.name!r}: the model does not take tokens [n, {shape[1]}]: {reason}") from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or list(logits.shape[:2]) != shape:
            raise DataError(f"task {self.name!r}: expected a model with logits [n, tokens, vocabulary], got {type(model).__name__}")
        return logits.to(torch.float32)

    def _check_vocabulary(self, highest: int, vocabulary: int | None) -> None:
        if vocabulary is not None and highest >= vocabulary:
            raise DataError(
                f"task {self.name!r}: its tokens have ids up to {highest}, but the model's vocabulary is {vocabulary}; "
                "name the model's own tokenizer as `tokenizer:`"
            )


class CausalLM(TextTask):
    """Next-token prediction on documents that `datasets` reads, or on plain text.

    Documents are tokenized one by one and cut into windows that never cross from one into the next; the tail of a document is a shorter
    window. A document's first token is never predicted, nor, without overlap, any window's.

    Args:
        data: where the documents are, as `TextSource`: at least `path` and `search`.
        tokenizer: `bytes` (UTF-8 bytes as ids, for a vocabulary of 256 or more), a model folder, or `hf://owner/name[@revision]`; with
            the special tokens that it adds to a document by itself.
        window: tokens of a window, at least 2 and at most the model's positions.
        stride: tokens from the start of one window to the start of the next, at most `window`; None for `window`. With overlap, each token
            is predicted once, in the first window that holds it, and read as context in the next.
        limit: at most so many windows a part, drawn uniformly; None for all.
        seed: of that draw.
        batch: windows scored at a time.
        name: for people.

    Raises:
        ConfigError: an option is unknown, out of range, or contradicts another.
        DataError: the data or the tokenizer cannot be read, or a part is empty.
    """

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        tokenizer: str | Path | None = None,
        window: int = 256,
        stride: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        batch: int = 16,
        name: str = "causal_lm",
    ) -> None:
        check_whole("window", window, 2)
        check_whole("stride", window if stride is None else stride, 1, window, "window")
        check_draw(limit=limit, seed=seed, batch=batch)
        step = window if stride is None else stride
        source = TextSource.of(data)
        tokenize = tokenization(tokenizer)
        settings = {**tokenize.settings, "window": window, "stride": step}
        found = read(source)
        parts: dict[Part, TextItems] = {}
        for part, documents in found.parts.items():
            cut = list(windows(map(tokenize, documents), window, step))
            if not cut:
                raise DataError(f"data: {source.path}: no document of the {part} part has two tokens or more, so nothing is predicted")
            parts[part] = TextItems(_drawn(cut, limit, seed), settings=settings)
        super().__init__(name=name, parts=parts, batch=batch, warnings=found.warnings)


def _drawn(cut: Sequence[Window], limit: int | None, seed: int) -> Sequence[Window]:
    return [cut[index] for index in drawn(len(cut), limit, seed)]


def _logits(model: torch.nn.Module, batch: WindowBatch, device: torch.device) -> torch.Tensor:
    """Return a model's logits [n, t, V] in its own type."""
    return forward(model, batch.inputs, device)
