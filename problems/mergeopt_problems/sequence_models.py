"""Models over encoded texts: what they are asked, and whether they can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import Batch, in_batches
from mergeopt.errors import DataError
from mergeopt.forward import evaluating, forward
from mergeopt_problems.model_settings import configured
from mergeopt_problems.sequences import Sequences

__all__ = ["check_inputs", "logits_of", "padding_of", "positions", "probe", "sequence_batches"]

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


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
    return forward(model, sequences.batch(items, padding_of(model, padding)), device)


def sequence_batches(model: torch.nn.Module, sequences: Sequences, padding: int, size: int, items: Sequence[int] | None) -> Iterator[Batch]:
    """Yield some texts in batches, longest first; `padding` as `logits_of`.

    Args:
        model: that gets them.
        sequences: the texts.
        padding: the tokenizer's padding.
        size: texts of a batch.
        items: which; None for all.
    """
    for chosen in in_batches(sequences.longest_first(items), size):
        yield Batch(chosen, sequences.batch(chosen, padding_of(model, padding)))


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
    longest, most = max(int(own.lengths.max()) for own in sequences), positions(model)
    if most is not None and longest > most:
        raise DataError(
            f"task {task!r}: its texts have up to {longest} tokens, but the model has {most} positions; set `max_length: {most}` or less"
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


def padding_of(model: torch.nn.Module, otherwise: int) -> int:
    """Return the token id that a model of transformers takes for padding, or another where it is configured with none."""
    own = configured(model, ("pad_token_id",))
    return otherwise if own is None else own


def positions(model: torch.nn.Module) -> int | None:
    """Return how many tokens a model of transformers can number, None where that is not limited, or not known."""
    if configured(model, ("relative_attention_num_buckets",)) is not None:  # T5's family only carries a number along
        return None
    count = configured(model, POSITIONS)
    for name, module in model.named_modules():
        # RoBERTa's family counts positions from after the padding's
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return count
