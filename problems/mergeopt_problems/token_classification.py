"""Token classification: any Hugging Face token classifier on words with BIO tags, such as the names of people and places."""

from __future__ import annotations

import logging
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
from mergeopt_problems.entities import OUTSIDE, TagScheme, count_entities
from mergeopt_problems.label_space import Classes, check_classes, class_indices, class_names, classes_by_name, own_logits
from mergeopt_problems.options import check_draw
from mergeopt_problems.parted_task import BatchedPartedTask
from mergeopt_problems.refusals import check_finite
from mergeopt_problems.sequence_models import check_inputs, logits_of, probe, sequence_batches
from mergeopt_problems.tagged_items import TaggedItems
from mergeopt_problems.tagged_text import Tagged, TaggedTextSource, read
from mergeopt_problems.text_encoding import TextEncoding

__all__ = ["TokenClassification"]

log = logging.getLogger(__name__)


class TokenClassification(BatchedPartedTask[TaggedItems]):
    """Classification of the words of sentences that `datasets` reads.

    A word is what its first token is said to be; its other tokens and the special ones do not count. Tags of the data are those of the
    model's `id2label`, by name. A word that no token stands for (of a sentence that is cut, or of nothing that the tokenizer reads) has
    no loss, and is said to be outside of any entity: the entities that it is part of count as missed.

    Args:
        data: where words and tags are, as `TaggedTextSource`: at least `path` and `search`.
        tokenizer: model folder, or `hf://owner/name[@revision]`; with the special tokens that it adds by itself.
        max_length: tokens of a sentence, special ones included, past which it is cut; None to cut nothing.
        classes: which logits the task is judged on: their indices, or a regex that the names of the model's `id2label` must match in full;
            with a group, the data's tags are what it matches (`politics:(.*)`). None for all.
        limit: at most so many sentences a part, drawn stratified by the rarest type of entity in each; None for all.
        seed: of that draw.
        batch: sentences scored at a time, of like lengths; fixed, since it may change the last bits of a score.
        name: for people.

    Raises:
        ConfigError: an option is unknown, out of range, or contradicts another.
        DataError: the data or the tokenizer cannot be read, a tag is not BIO, or a part is empty.
    """

    default_metric = "entity_f1"

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
        name: str = "token_classification",
    ) -> None:
        check_draw(limit=limit, seed=seed, batch=batch)
        check_classes(classes)
        source = TaggedTextSource.of(data)
        encoding = TextEncoding(tokenizer, max_length)
        found = read(source)
        parts: dict[Part, TaggedItems] = {}
        for part, sentences in found.parts.items():
            kept = sentences.chosen(drawn_by_label(sentences.kinds, limit, seed))
            parts[part] = _items(kept, encoding, f"{source.path}, {part} part")
        super().__init__(name=name, parts=parts, batch=batch, warnings=found.warnings)
        self.classes, self._padding = classes, encoding.padding

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"classes": self.classes, **super().settings}

    def check(self, model: torch.nn.Module) -> None:
        """Run the longest sentence through a model and compare its label names with the tags.

        Raises:
            DataError: a token id or a length is too large for the model, it has no logits per token, or a tag has no logit.
        """
        check_inputs(self.name, model, (items.sequences for items in self._items.values()))
        longest = max(self._items.values(), key=lambda items: int(items.sequences.lengths.max()))
        logits = probe(self.name, model, longest.sequences, self._padding)
        if logits.ndim != 3 or logits.shape[1] != int(longest.sequences.lengths.max()):
            raise DataError(f"task {self.name!r}: expected a model with logits [n, tokens, classes], got {type(model).__name__}")
        names = class_names(self.name, self.classes, model)
        if self.classes is None and len(names) != logits.shape[2]:
            raise DataError(f"task {self.name!r}: the model has {logits.shape[2]} logits, but names {len(names)} in its id2label")
        for items in self._items.values():
            classes_by_name(self.name, items.names, names)
        TagScheme(names, f"task {self.name!r}: the model's id2label")

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some sentences, None for all, in batches of like lengths."""
        return sequence_batches(model, self.items(part).sequences, self._padding, self.batch, items)

    def record(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Records:
        """Return what a model says of some sentences over the task's own logits.

        `true_positives`, `predicted_entities` and `gold_entities` (int64): entities found with start, end and type, said to be there, and
        there; `nll`: sum of its words' cross-entropies in nats (float64); `tokens`: how many words these are (int64); `loss`:
        nll / tokens, and `entropy`: mean over words of that of the softmax (both float32).

        Raises:
            CandidateError: a logit is not finite.
        """
        part_items = self.items(part)
        names = class_names(self.name, self.classes, model)
        rows, positions, words = part_items.asked(items)
        own = own_logits(class_indices(self.name, self.classes, model), logits[rows, positions])
        check_finite(own, self.name, part)
        places = classes_by_name(self.name, part_items.names, names)
        made = classified(own, torch.from_numpy(places[part_items.tags[words]]))
        every = part_items.words_of(items)
        predicted = np.full(len(every), OUTSIDE, dtype=np.int64)
        predicted[part_items.positions[every] >= 0] = made["prediction"]
        scheme = TagScheme(names, f"task {self.name!r}: the model's id2label")
        counts = count_entities(scheme, predicted, places[part_items.tags[every]], part_items.words[items])
        nll, entropy = _sums(rows, len(items), made["loss"]), _sums(rows, len(items), made["entropy"])
        tokens = np.bincount(rows, minlength=len(items))
        return {
            "true_positives": counts.right,
            "predicted_entities": counts.predicted,
            "gold_entities": counts.gold,
            "loss": (nll / tokens).astype(np.float32),
            "nll": nll,
            "tokens": tokens,
            "entropy": (entropy / tokens).astype(np.float32),
        }

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return one row per word of some sentences, sentence after sentence, keeping the graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of sentences, one or more, in any order; they run as one batch.
            device: where the model is.
        """
        logits = logits_of(model, self.items(part).sequences, items, self._padding, device)
        return self.predictions(model, part, np.asarray(items, dtype=np.intp), logits)

    def predictions(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Predictions:
        """Return the task's own logits of the words of some sentences, one row each."""
        own = self.items(part)
        rows, positions, words = own.asked(items)
        places = classes_by_name(self.name, own.names, class_names(self.name, self.classes, model))
        labels = torch.from_numpy(places[own.tags[words]]).to(logits.device)
        judged = own_logits(class_indices(self.name, self.classes, model), logits[rows, positions])
        return Predictions(judged, labels, torch.from_numpy(rows))


def _items(sentences: Tagged, encoding: TextEncoding, where: str) -> TaggedItems:
    TagScheme(sorted({tag for tags in sentences.tags for tag in tags}), f"data: {where}")
    sequences, positions = encoding.words(sentences.words)
    kept = np.flatnonzero([bool((own >= 0).any()) for own in positions])
    if not kept.size:
        raise DataError(f"data: {where}: expected sentences of words that the tokenizer can read, got none")
    if len(kept) < len(positions):
        log.warning("%s: left %d of %d sentences out, which hold no word", where, len(positions) - len(kept), len(positions))
    own = sentences.chosen(kept)
    return TaggedItems(sequences.chosen(kept), [positions[row] for row in kept], own.tags, settings=encoding.settings)


def _sums(rows: npt.NDArray[np.int64], count: int, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return sums over words by row, float64 [count], always in the same order."""
    return np.bincount(rows, weights=values.astype(np.float64), minlength=count).astype(np.float64, copy=False)
