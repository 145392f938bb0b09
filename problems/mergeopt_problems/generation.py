"""Generation: what a language model, decoder alone or encoder and decoder, writes in answer to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeopt.batched_task import in_batches
from mergeopt.errors import CandidateError, ConfigError, DataError
from mergeopt.forward import evaluating
from mergeopt.task import Part, Records
from mergeopt_problems.answers import Answers
from mergeopt_problems.decoding import Decoding, Output
from mergeopt_problems.drawing import drawn
from mergeopt_problems.options import check_draw
from mergeopt_problems.parted_task import PartedTask
from mergeopt_problems.prompt_items import PromptItems
from mergeopt_problems.prompts import Prompts, PromptSource, read
from mergeopt_problems.sequence_models import check_inputs, positions
from mergeopt_problems.sequences import Sequences
from mergeopt_problems.tokenization import Tokenization, tokenization

__all__ = ["Generation"]

PLACE = "{prompt}"


class Generation(PartedTask[PromptItems]):
    """Answers to prompts that `datasets` reads, decoded greedily.

    Args:
        data: where prompts and references are, as `PromptSource`: at least `path` and `search`.
        tokenizer: `bytes` (UTF-8 bytes as ids), a model folder, or `hf://owner/name[@revision]`; with the special tokens that it adds by
            itself.
        template: what a prompt becomes before it is encoded, with `{prompt}` in its place; `A: {prompt}\nB:`, say.
        chat: whether it is then put as a user's turn into the tokenizer's chat template, before the answer.
        max_new_tokens: after which an output is cut.
        stop: texts at the first of which an output ends; they are no part of it.
        extract: a regex, whose last match (its first group, where it has one) is an output's answer, and a reference's; None for all of it.
        ignore_case: whether an answer in another case matches exactly.
        limit: at most so many prompts a part, drawn uniformly; None for all.
        seed: of that draw.
        batch: prompts answered at a time, of like lengths; fixed, since it may change the last bits of a logit, and so, rarely, an output.
        name: for people.

    Raises:
        ConfigError: an option is unknown, out of range, or contradicts another.
        DataError: the data or the tokenizer cannot be read, a part is empty, or a prompt or reference is of no use.
    """

    default_metric = "exact_match"

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        tokenizer: str | Path | None = None,
        template: str = PLACE,
        chat: bool = False,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] = (),
        extract: str | None = None,
        ignore_case: bool = False,
        limit: int | None = None,
        seed: int = 0,
        batch: int = 16,
        name: str = "generation",
    ) -> None:
        check_draw(limit=limit, seed=seed, batch=batch)
        if not isinstance(template, str) or PLACE not in template:
            raise ConfigError(f"template: expected text with {PLACE} in it, got {template!r}")
        source = PromptSource.of(data)
        tokenize = tokenization(tokenizer)
        self._answers = Answers(extract, ignore_case=ignore_case)
        self._decoding = Decoding(tokenize, max_new_tokens, stop)
        found = read(source)
        parts: dict[Part, PromptItems] = {}
        for part, prompts in found.parts.items():
            kept = prompts.chosen(drawn(len(prompts.prompts), limit, seed))
            parts[part] = self._encoded(kept, tokenize, template, chat, f"{source.path}, {part} part")
        super().__init__(name=name, parts=parts, batch=batch, warnings=found.warnings)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {**super().settings, **self._decoding.settings, **self._answers.settings}

    def check(self, model: torch.nn.Module) -> None:
        """Have a model write one token after the longest and the shortest prompt.

        Raises:
            DataError: a token id or a prompt is too large for the model, or it does not write text.
        """
        if not getattr(model, "can_generate", lambda: False)():
            raise DataError(f"task {self.name!r}: expected a model of transformers that writes text, got {type(model).__name__}")
        prompts = max((items.sequences for items in self._items.values()), key=lambda own: int(own.lengths.max()))
        self._check_room(model, int(prompts.lengths.max()))
        check_inputs(self.name, model, (items.sequences for items in self._items.values()))
        chosen = sorted({int(prompts.lengths.argmax()), int(prompts.lengths.argmin())})
        try:
            with evaluating(model):
                self._decoding(model, prompts, chosen, next(model.parameters()).device, max_new_tokens=1)
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, CandidateError):  # of this very model, which is no fault of the task
                return
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"task {self.name!r}: the model does not take prompts [{len(chosen)}, tokens]: {reason}") from error

    def records(self, model: torch.nn.Module, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        """Return what a model answers to some prompts, None for all, each [items].

        `output`: text; `reference`: text; `exact_match` (int64): 1 where the answers of both are the same, else 0; `truncated` (bool):
        whether the output was cut before the model ended it; `unparsed` (bool): whether no answer was found in it. The character NUL,
        which columns of text cannot end with, is U+FFFD.

        Raises:
            CandidateError: a logit is no number.
        """
        own = self.items(part)
        outputs: dict[int, Output] = {}
        with evaluating(model):
            for chosen in in_batches(own.sequences.longest_first(items), self.batch):
                outputs.update(zip(chosen.tolist(), self._decoding(model, own.sequences, chosen.tolist(), device), strict=True))
        asked = range(len(own)) if items is None else items
        references = [own.references[item] for item in asked]
        answers = [self._answers.of(outputs[item].text) for item in asked]
        right = [answer == self._answers.of(reference) for answer, reference in zip(answers, references, strict=True)]
        return {
            "output": _column([outputs[item].text for item in asked]),
            "reference": _column(references),
            "exact_match": np.asarray(right, dtype=np.int64),
            "truncated": np.asarray([not outputs[item].ended for item in asked]),
            "unparsed": np.asarray([answer is None for answer in answers]),
        }

    def _check_room(self, model: Any, longest: int) -> None:
        most, wanted = positions(model), self._decoding.max_new_tokens
        # an encoder-decoder numbers what it reads and what it writes apart
        needed = max(longest, wanted) if model.config.is_encoder_decoder else longest + wanted
        if most is not None and needed > most:
            raise DataError(
                f"task {self.name!r}: its prompts have up to {longest} tokens and {wanted} are to be written (`max_new_tokens`), but the "
                f"model has {most} positions; lower it, or leave long prompts out"
            )

    def _encoded(self, prompts: Prompts, tokenize: Tokenization, template: str, chat: bool, where: str) -> PromptItems:
        encode = tokenize.turn if chat else tokenize
        ids = [encode(template.replace(PLACE, prompt)).ids.tolist() for prompt in prompts.prompts]
        for prompt, own in zip(prompts.prompts, ids, strict=True):
            if not own:
                raise DataError(f"data: {where}: the prompt {prompt!r:.80} has no token; leave it out, or give a `template:`")
        for reference in prompts.references:
            if self._answers.of(reference) is None:
                raise DataError(f"data: {where}: `extract:` finds no answer in the reference {reference!r:.80}; correct one or the other")
        return PromptItems(Sequences(ids), prompts.references, settings=tokenize.settings)


def _column(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.str_]]:
    return np.asarray([text.replace("\0", "\ufffd") for text in texts], dtype=np.str_)
