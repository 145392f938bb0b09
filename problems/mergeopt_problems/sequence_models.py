"""Models over encoded texts: what they are asked, and whether they can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.errors import CandidateError, DataError, nearest
from mergeopt.task import Part
from mergeopt_problems.model_inputs import configured, evaluating, forward
from mergeopt_problems.sequences import Sequences

__all__ = ["check_finite", "check_inputs", "logits_of", "part_of", "probe"]

T = TypeVar("T")

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def part_of(parts: Mapping[Part, T], part: Part, task: str) -> T:
    """Return the items of a part.

    Raises:
        DataError: the part was not given.
    """
    if part not in parts:
        raise DataError(f"task {task!r} has no {part} part; {nearest(part, parts)}. Name its split in the task's data")
    return parts[part]


def logits_of(
    model: torch.nn.Module, sequences: Sequences, items: Sequence[int] | npt.NDArray[np.intp], padding: int, device: torch.device
) -> torch.Tensor:
    """Return a model's logits of some texts in its own type, [n, classes] or [n, tokens, classes].

    Args:
        model: in evaluation mode, on the device.
        sequences: the texts.
        items: which; they run as one batch.
        padding: the tokenizer's padding, for a model that is configured with none: decoders find the end of a text by their own.
        device: where the model is.
    """
    own = configured(model, ("pad_token_id",))
    return forward(model, sequences.batch(items, padding if own is None else own), device)


def check_finite(logits: torch.Tensor, task: str, part: Part) -> None:
    """Raise `CandidateError` when a logit is not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise CandidateError(f"task {task!r}: the model's logits on the {part} part are not finite")


def check_inputs(task: str, model: torch.nn.Module, parts: Iterable[Sequences]) -> None:
    """Compare texts with a model's configuration before anything is run: an id past an embedding would take a GPU down.

    Args:
        task: its name, for messages.
        model: of transformers; of any other, nothing is known.
        parts: the texts.

    Raises:
        DataError: a token id, a segment or a length is too large for the model.
    """
    sequences = list(parts)
    highest, vocabulary = max(own.highest for own in sequences), configured(model, ("vocab_size",))
    if vocabulary is not None and highest >= vocabulary:
        raise DataError(
            f"task {task!r}: its tokens have ids up to {highest}, but the model's vocabulary is {vocabulary}; "
            "name the model's own tokenizer as `tokenizer:`"
        )
    longest, positions = max(int(own.lengths.max()) for own in sequences), _positions(model)
    if positions is not None and longest > positions:
        raise DataError(
            f"task {task!r}: its texts have up to {longest} tokens, but the model has {positions} positions; set `max_length: {positions}` "
            "or less"
        )
    segment, segments = max(own.highest_type for own in sequences), configured(model, ("type_vocab_size",))
    if segments and segment >= segments:
        raise DataError(
            f"task {task!r}: its tokenizer numbers segments up to {segment}, but the model knows {segments}; "
            "name the model's own tokenizer as `tokenizer:`"
        )


def probe(task: str, model: torch.nn.Module, sequences: Sequences, padding: int) -> torch.Tensor:
    """Return a model's logits of its longest and its shortest text, in one batch.

    Raises:
        DataError: the model cannot take them, or has no logits for each.
    """
    items = np.asarray(sorted({int(sequences.lengths.argmax()), int(sequences.lengths.argmin())}), dtype=np.intp)
    shape = [len(items), int(sequences.lengths.max())]
    try:
        with evaluating(model):
            logits = logits_of(model, sequences, items, padding, next(model.parameters()).device)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"task {task!r}: the model does not take token ids {shape}: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3) or logits.shape[0] != len(items):
        raise DataError(f"task {task!r}: expected a model with logits of each text, got {type(model).__name__}")
    return logits


def _positions(model: torch.nn.Module) -> int | None:
    count = configured(model, POSITIONS)
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from after the padding's
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return count
