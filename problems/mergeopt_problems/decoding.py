"""What a live model writes after some prompts: greedily, by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mergeopt.errors import CandidateError, ConfigError
from mergeopt.models.architecture import quiet_transformers
from mergeopt_problems.options import check_whole
from mergeopt_problems.sequences import Sequences
from mergeopt_problems.tokenization import Tokenization

__all__ = ["Decoding", "Output"]

SPECIAL = 8  # tokens without text that may stand within a stop text


@dataclass(frozen=True, slots=True)
class Output:
    """What a model wrote after one prompt.

    Args:
        text: up to what ended it, without that; special tokens left out.
        ended: whether the model ended it, by a token that ends texts or by a stop text; else it was cut.
    """

    text: str
    ended: bool


class Decoding:
    """Greedy decoding.

    In all else the model's own generation settings count: the tokens that end a text, a repetition penalty, a shortest length.

    Args:
        tokenization: that made the prompts.
        max_new_tokens: after which an output is cut.
        stop: texts at the first of which an output ends.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(self, tokenization: Tokenization, max_new_tokens: int, stop: str | Sequence[str]) -> None:
        check_whole("max_new_tokens", max_new_tokens, 1)
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop: expected texts that are not empty, got {stop!r}")
        self.max_new_tokens = max_new_tokens
        self._tokenization = tokenization
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": self.stop}

    def __call__(
        self, model: Any, prompts: Sequences, items: Sequence[int], device: torch.device, max_new_tokens: int | None = None
    ) -> list[Output]:
        """Return what a model writes after some prompts, which run as one batch. Every call starts with an empty cache.

        Args:
            model: of transformers, in evaluation mode, on the device.
            prompts: encoded.
            items: which, one or more.
            device: where the model is.
            max_new_tokens: fewer than its own; None for these.

        Raises:
            CandidateError: a logit is no number.
        """
        own = model.generation_config.pad_token_id
        padding = self._tokenization.padding if own is None else own
        writer = bool(model.config.is_encoder_decoder)
        batch = prompts.batch(items, padding, left=not writer)
        given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        start = 1 if writer else given["input_ids"].shape[1]
        settings: Any = GenerationConfig
        config = settings(
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            pad_token_id=padding,
        )
        stopping = StoppingCriteriaList([_Stops(self, start)] if self.stop else [])
        with quiet_transformers():
            ids = model.generate(
                **given, generation_config=config, stopping_criteria=stopping, logits_processor=LogitsProcessorList([_Numbers()])
            )
        ends = model.generation_config.eos_token_id
        return [self._output(row, {ends} if isinstance(ends, int) else set(ends or ())) for row in ids[:, start:].tolist()]

    def stops(self, ids: Sequence[int]) -> bool:
        """Return whether a stop text stands among some tokens."""
        # most steps are settled by the last few tokens: one token or more stands for a byte or more
        few = ids[-SPECIAL - max(len(text.encode()) for text in self.stop) :]
        return self._end(self._tokenization.text(few)) is not None and self._end(self._tokenization.text(ids)) is not None

    def _output(self, ids: list[int], ends: set[int]) -> Output:
        count = next((place for place, one in enumerate(ids) if one in ends), len(ids))
        text = self._tokenization.text(ids[:count])
        end = self._end(text)
        return Output(text[:end], ended=count < len(ids) or end is not None)

    def _end(self, text: str) -> int | None:
        return min((text.index(stop) for stop in self.stop if stop in text), default=None)


class _Stops(StoppingCriteria):
    """Ends the outputs of a batch that hold a stop text.

    Args:
        decoding: knows the texts.
        start: tokens before an output.
    """

    def __init__(self, decoding: Decoding, start: int) -> None:
        self._decoding, self._start = decoding, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        found = [self._decoding.stops(row) for row in input_ids[:, self._start :].tolist()]
        return torch.tensor(found, device=input_ids.device)


class _Numbers(LogitsProcessor):
    """Refuses logits that are no numbers, of which any token would be the largest."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(torch.isnan(scores).any()):
            raise CandidateError("the model's logits are not finite")
        return scores
