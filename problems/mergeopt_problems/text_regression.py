"""Text regression: one number per text or pair of texts, such as how alike two sentences are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import Batch
from mergeopt.errors import DataError
from mergeopt.task import Part, Records
from mergeopt_problems.drawing import drawn
from mergeopt_problems.label_space import Classes, check_classes, class_indices, own_logits
from mergeopt_problems.labelled_text import ScoredTextSource, read_scored
from mergeopt_problems.options import check_draw
from mergeopt_problems.parted_task import BatchedPartedTask
from mergeopt_problems.refusals import check_finite
from mergeopt_problems.sequence_items import SequenceItems
from mergeopt_problems.sequence_models import check_inputs, probe, sequence_batches
from mergeopt_problems.text_encoding import TextEncoding

__all__ = ["TextRegression"]


class TextRegression(BatchedPartedTask[SequenceItems]):
    """Prediction of a number for texts, or for pairs of texts, that `datasets` reads: the model's one logit, as it is.

    Args:
        data: where texts and numbers are, as `ScoredTextSource`: at least `path` and `search`.
        tokenizer: model folder, or `hf://owner/name[@revision]`; with the special tokens that it adds by itself.
        max_length: tokens of a text, special ones included, past which it is cut (of a pair, the longer one first); None to cut nothing.
        classes: the one logit that counts, of a model that has several: its index in a list, or a regex on its name in `id2label`.
        limit: at most so many texts a part, drawn uniformly; None for all.
        seed: of that draw.
        batch: texts scored at a time, of like lengths; fixed, since it may change the last bits of a score.
        name: for people.

    Raises:
        ConfigError: an option is unknown, out of range, or contradicts another.
        DataError: the data or the tokenizer cannot be read, or a part is empty.
    """

    default_metric = "mean_squared_error"

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        tokenizer: str | Path | None = None,
        max_length: int | None = None,
        classes: Classes = None,
        limit: int | None = None,
        seed: int = 0,
        batch: int = 32,
        name: str = "text_regression",
    ) -> None:
        check_draw(limit=limit, seed=seed, batch=batch)
        check_classes(classes)
        encoding = TextEncoding(tokenizer, max_length)
        found = read_scored(ScoredTextSource.of(data))
        parts: dict[Part, SequenceItems] = {}
        for part, (texts, targets) in found.parts.items():
            rows = drawn(len(targets), limit, seed)
            kept = texts.chosen(rows)
            parts[part] = SequenceItems(encoding.texts(kept.first, kept.second), targets[rows], settings=encoding.settings)
        super().__init__(name=name, parts=parts, batch=batch, warnings=found.warnings)
        self.classes, self._padding = classes, encoding.padding

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"classes": self.classes, **super().settings}

    def check(self, model: torch.nn.Module) -> None:
        """Run the longest text through a model.

        Raises:
            DataError: a token id or a length is too large for the model, or it has not one logit per text.
        """
        check_inputs(self.name, model, (items.sequences for items in self._items.values()))
        longest = max(self._items.values(), key=lambda items: int(items.sequences.lengths.max()))
        logits = own_logits(class_indices(self.name, self.classes, model), probe(self.name, model, longest.sequences, self._padding))
        if logits.ndim != 2 or logits.shape[1] != 1:
            raise DataError(
                f"task {self.name!r}: expected one logit per text, got logits {list(logits.shape)} of {type(model).__name__}; "
                "pick one with `classes:`"
            )

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some texts, None for all, in batches of like lengths."""
        return sequence_batches(model, self.items(part).sequences, self._padding, self.batch, items)

    def record(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Records:
        """Return `prediction` (float32) and `target` (float64) of some texts.

        Raises:
            CandidateError: a logit is not finite.
        """
        own = own_logits(class_indices(self.name, self.classes, model), logits)
        check_finite(own, self.name, part)
        return {"prediction": own[:, 0].cpu().numpy(), "target": self.items(part).labels[items]}
