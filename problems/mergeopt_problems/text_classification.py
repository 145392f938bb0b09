"""Text classification: any Hugging Face sequence classifier, on texts or pairs of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import Batch
from mergeopt.errors import DataError
from mergeopt.task import Part, Predictions, Records
from mergeopt_problems.class_predictions import classified
from mergeopt_problems.drawing import drawn_by_label
from mergeopt_problems.label_space import Classes, check_classes, class_indices, class_names, classes_by_name, own_logits
from mergeopt_problems.labelled_text import LabelledTextSource, read_labelled
from mergeopt_problems.options import check_draw
from mergeopt_problems.parted_task import BatchedPartedTask
from mergeopt_problems.refusals import check_finite
from mergeopt_problems.sequence_items import SequenceItems
from mergeopt_problems.sequence_models import check_inputs, logits_of, probe, sequence_batches
from mergeopt_problems.text_encoding import TextEncoding

__all__ = ["TextClassification"]


class TextClassification(BatchedPartedTask[SequenceItems]):
    """Classification of texts, or of pairs of texts, that `datasets` reads.

    Labels that are numbers count the task's own logits from 0, and so do names whose order `labels:` gives; other names are those of the
    model's `id2label`.

    Args:
        data: where texts and labels are, as `LabelledTextSource`: at least `path` and `search`.
        tokenizer: model folder, or `hf://owner/name[@revision]`; with the special tokens that it adds by itself.
        max_length: tokens of a text, special ones included, past which it is cut (of a pair, the longer one first); None to cut nothing.
        classes: which logits the task is judged on: their indices, or a regex that the names of the model's `id2label` must match in full
            (`emotion:.*`); with a group, the data's names are what it matches (`emotion:(.*)`). None for all.
        limit: at most so many texts a part, drawn stratified by label; None for all.
        seed: of that draw.
        batch: texts scored at a time, of like lengths; fixed, since it may change the last bits of a score.
        name: for people.

    Raises:
        ConfigError: an option is unknown, out of range, or contradicts another.
        DataError: the data or the tokenizer cannot be read, or a part is empty.
    """

    default_metric = "accuracy"

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
        name: str = "text_classification",
    ) -> None:
        check_draw(limit=limit, seed=seed, batch=batch)
        check_classes(classes)
        source = LabelledTextSource.of(data)
        encoding = TextEncoding(tokenizer, max_length)
        found = read_labelled(source)
        parts: dict[Part, SequenceItems] = {}
        for part, (texts, labels) in found.parts.items():
            rows = drawn_by_label(labels.numbers, limit, seed)
            kept, own = texts.chosen(rows), labels.chosen(rows)
            if int(own.numbers.min()) < 0:
                raise DataError(f"data: {source.path}: expected class numbers from 0, got the label {int(own.numbers.min())} ({part} part)")
            parts[part] = SequenceItems(encoding.texts(kept.first, kept.second), own.numbers, names=own.names, settings=encoding.settings)
        super().__init__(name=name, parts=parts, batch=batch, warnings=found.warnings)
        self.classes, self._padding = classes, encoding.padding

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"classes": self.classes, **super().settings}

    def check(self, model: torch.nn.Module) -> None:
        """Run the longest text through a model and compare its logits with the labels.

        Raises:
            DataError: a token id or a length is too large for the model, it has no logits per text, or a label has no logit.
        """
        check_inputs(self.name, model, (items.sequences for items in self._items.values()))
        longest = max(self._items.values(), key=lambda items: int(items.sequences.lengths.max()))
        logits = probe(self.name, model, longest.sequences, self._padding)
        if logits.ndim != 2:
            raise DataError(f"task {self.name!r}: expected a model with logits [n, classes], got {type(model).__name__}")
        own = own_logits(class_indices(self.name, self.classes, model), logits)
        for part, items in self._items.items():
            highest = int(self._labels(items, model).max())
            if highest >= own.shape[1]:
                raise DataError(
                    f"task {self.name!r}: the {part} part has the label {highest}, but is judged on {own.shape[1]} logits "
                    f"(labels 0 to {own.shape[1] - 1}); correct `classes:` or the data"
                )

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some texts, None for all, in batches of like lengths."""
        return sequence_batches(model, self.items(part).sequences, self._padding, self.batch, items)

    def record(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Records:
        """Return what a model says of some texts over the task's own logits.

        `loss` (cross-entropy) and `entropy` (of the softmax; both in nats, float32), `prediction` and `label` (int64).

        Raises:
            CandidateError: a logit is not finite.
        """
        own = own_logits(class_indices(self.name, self.classes, model), logits)
        check_finite(own, self.name, part)
        return classified(own, self._labels(self.items(part), model)[items])

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return the task's own logits of some texts, keeping the graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of texts, one or more, in any order; they run as one batch.
            device: where the model is.
        """
        logits = logits_of(model, self.items(part).sequences, items, self._padding, device)
        return self.predictions(model, part, np.asarray(items, dtype=np.intp), logits)

    def predictions(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Predictions:
        """Return the task's own logits of some texts, one row each."""
        labels = self._labels(self.items(part), model)[items]
        return Predictions(own_logits(class_indices(self.name, self.classes, model), logits), labels.to(logits.device))

    def _labels(self, items: SequenceItems, model: torch.nn.Module) -> torch.Tensor:
        """Return places among the task's own logits, int64 [items]."""
        if items.names is None:
            return torch.from_numpy(items.labels)
        return items.named(classes_by_name(self.name, items.names, class_names(self.name, self.classes, model)))
