"""Encoder-decoder language modelling: how well a model predicts each token of what it is to write of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import Batch, in_batches
from mergeopt.errors import DataError
from mergeopt.forward import evaluating, forward
from mergeopt.task import Part, Predictions, Records
from mergeopt_problems.drawing import drawn
from mergeopt_problems.options import check_draw
from mergeopt_problems.pair_items import PairItems
from mergeopt_problems.parted_task import BatchedPartedTask
from mergeopt_problems.prompts import Prompts, PromptSource, read
from mergeopt_problems.sequence_models import check_inputs, padding_of
from mergeopt_problems.text_items import IGNORED
from mergeopt_problems.token_losses import token_losses
from mergeopt_problems.tokenization import Tokenization, tokenization

__all__ = ["Seq2SeqLM"]


class Seq2SeqLM(BatchedPartedTask[PairItems]):
    """Prediction of each token of a reference from a prompt and the reference's tokens before it, by an encoder-decoder.

    Args:
        data: where prompts and references are, as `PromptSource`: at least `path` and `search`.
        tokenizer: `bytes` (UTF-8 bytes as ids), a model folder, or `hf://owner/name[@revision]`; with the special tokens that it adds by
            itself.
        limit: at most so many pairs a part, drawn uniformly; None for all.
        seed: of that draw.
        batch: pairs scored at a time, of like lengths; fixed, since it may change the last bits of a score.
        name: for people.

    Raises:
        ConfigError: an option is unknown, out of range, or contradicts another.
        DataError: the data or the tokenizer cannot be read, a part is empty, or a text has no token.
    """

    default_metric = "token_loss"

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        tokenizer: str | Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        batch: int = 16,
        name: str = "seq2seq_lm",
    ) -> None:
        check_draw(limit=limit, seed=seed, batch=batch)
        source = PromptSource.of(data)
        tokenize = tokenization(tokenizer)
        found = read(source)
        parts: dict[Part, PairItems] = {}
        for part, prompts in found.parts.items():
            kept = prompts.chosen(drawn(len(prompts.prompts), limit, seed))
            parts[part] = _encoded(kept, tokenize, f"{source.path}, {part} part")
        super().__init__(name=name, parts=parts, batch=batch, warnings=found.warnings)
        self._padding = tokenize.padding

    def check(self, model: torch.nn.Module) -> None:
        """Run the longest pair through a model.

        Raises:
            DataError: a token id or a text is too large for the model, or it is no encoder-decoder with logits per token.
        """
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise DataError(f"task {self.name!r}: expected an encoder-decoder of transformers, got {type(model).__name__}")
        check_inputs(self.name, model, (own for items in self._items.values() for own in (items.sources, items.targets)))
        part = max(self._items, key=lambda part: int(self._items[part].targets.lengths.max()))
        items = self._items[part]
        chosen = sorted({int(items.sources.lengths.argmax()), int(items.targets.lengths.argmax())})
        shape = list(items.labels(chosen).shape)
        try:
            with evaluating(model):
                logits = forward(model, self._inputs(model, items, np.asarray(chosen)), next(model.parameters()).device)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"task {self.name!r}: the model does not take texts and {shape} tokens to write: {reason}") from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or list(logits.shape[:2]) != shape:
            raise DataError(f"task {self.name!r}: expected a model with logits [n, tokens, vocabulary], got {type(model).__name__}")

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some pairs, None for all, in batches of like lengths."""
        own = self.items(part)
        for chosen in in_batches(own.sources.longest_first(items), self.batch):
            yield Batch(chosen, self._inputs(model, own, chosen))

    def record(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Records:
        """Return what the tokens of some references cost.

        `nll`: sum of their negative log-likelihoods in nats (float64); `tokens`: how many they are; `bytes`: UTF-8 bytes of their text
        (both int64); `loss`: nll / tokens (float32), whose mean over pairs weighs a short reference like a long one.

        Raises:
            CandidateError: a logit is not finite.
        """
        own = self.items(part)
        losses = token_losses(logits, own.labels(items).to(logits.device), self.name, part)
        nll, tokens = losses.cpu().double().sum(dim=1).numpy(), own.targets.lengths[items]
        return {"loss": (nll / tokens).astype(np.float32), "nll": nll, "tokens": tokens, "bytes": own.bytes[items]}

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return one row per token of some references, pair after pair, keeping the graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of pairs, one or more, in any order; they run as one batch.
            device: where the model is.
        """
        chosen = np.asarray(items, dtype=np.intp)
        return self.predictions(model, part, chosen, forward(model, self._inputs(model, self.items(part), chosen), device))

    def predictions(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Predictions:
        """Return the logits of the tokens of some references, one row each."""
        labels = self.items(part).labels(items).to(logits.device)
        asked = labels != IGNORED
        return Predictions(logits[asked].to(torch.float32), labels[asked], asked.nonzero()[:, 0])

    def _inputs(self, model: Any, own: PairItems, items: npt.NDArray[np.intp]) -> dict[str, torch.Tensor]:
        """Return what a model gets; what its decoder reads, the references moved by one token, is made by its own rule."""
        read = model.prepare_decoder_input_ids_from_labels(own.labels(items))
        return {**own.sources.batch(items, padding_of(model, self._padding)), "decoder_input_ids": read}


def _encoded(prompts: Prompts, tokenize: Tokenization, where: str) -> PairItems:
    sources = [tokenize(prompt) for prompt in prompts.prompts]
    targets = [tokenize.target(reference) for reference in prompts.references]
    for texts, encoded in ((prompts.prompts, sources), (prompts.references, targets)):
        for text, own in zip(texts, encoded, strict=True):
            if not len(own.ids):
                raise DataError(f"data: {where}: the text {text!r:.80} has no token; leave it out")
    return PairItems(sources, targets, settings=tokenize.settings)
