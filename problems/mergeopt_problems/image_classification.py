"""Image classification: any Hugging Face image classifier, judged on all its logits or on the task's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.batched_task import Batch, asked_items, in_batches
from mergeopt.errors import DataError
from mergeopt.forward import evaluating, forward
from mergeopt.task import Part, Predictions, Records
from mergeopt_problems.class_predictions import classified
from mergeopt_problems.drawing import drawn_by_label
from mergeopt_problems.image_data import ImageSource, read
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.image_preprocessing import preparation
from mergeopt_problems.label_space import Classes, check_classes, class_indices, own_logits
from mergeopt_problems.options import check_draw
from mergeopt_problems.parted_task import BatchedPartedTask
from mergeopt_problems.refusals import check_finite

__all__ = ["ImageClassification", "ImageTask"]


class ImageTask(BatchedPartedTask[ImageItems]):
    """Image classification on prepared items.

    Args:
        name: for people.
        parts: the items by part.
        classes: which logits the task is judged on, the i-th being the data's label i: their indices, or a regex that the names of the
            model's `id2label` must match in full (`mnist:.*`); None for all.
        batch: images scored at a time; fixed, since it may change the last bits of a score.
        warnings: what a run over them has to say, a sentence each.

    Raises:
        ConfigError: batch is below 1, or classes is neither of these.
    """

    def __init__(
        self, *, name: str, parts: Mapping[Part, ImageItems], classes: Classes = None, batch: int = 64, warnings: tuple[str, ...] = ()
    ) -> None:
        check_classes(classes)
        super().__init__(name=name, parts=parts, batch=batch, warnings=warnings)
        self.classes = classes if classes is None or isinstance(classes, str) else [int(index) for index in classes]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"classes": self.classes, **super().settings}

    def check(self, model: torch.nn.Module) -> None:
        """Run one image through a model and compare its logits with the labels.

        Raises:
            DataError: the image does not fit the model, or a label has no logit.
        """
        logits = own_logits(class_indices(self.name, self.classes, model), self._probe(model))
        for part, items in self._items.items():
            highest = int(items.labels.max())
            if highest >= logits.shape[1]:
                raise DataError(
                    f"task {self.name!r}: the {part} part has the label {highest}, but is judged on {logits.shape[1]} logits "
                    f"(labels 0 to {logits.shape[1] - 1}); correct `classes:` or the data"
                )

    def batches(self, model: torch.nn.Module, part: Part, items: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield some images, None for all, in batches of neighbours."""
        own = self.items(part)
        for chosen in in_batches(asked_items(len(own), items), self.batch):
            yield Batch(chosen, {"pixel_values": own.pixels[torch.from_numpy(chosen)]})

    def record(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Records:
        """Return what a model says of some images over the task's own logits.

        `loss` (cross-entropy) and `entropy` (of the softmax; both in nats, float32), `prediction` and `label` (int64).

        Raises:
            CandidateError: a logit is not finite.
        """
        own = own_logits(class_indices(self.name, self.classes, model), logits)
        check_finite(own, self.name, part)
        return classified(own, self.items(part).labels[torch.from_numpy(items)])

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return the task's own logits of some images, keeping the graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of images, one or more, in any order; they run as one batch.
            device: where the model is.
        """
        chosen = np.asarray(items, dtype=np.intp)
        logits = forward(model, {"pixel_values": self.items(part).pixels[torch.from_numpy(chosen)]}, device)
        return self.predictions(model, part, chosen, logits)

    def predictions(self, model: torch.nn.Module, part: Part, items: npt.NDArray[np.intp], logits: torch.Tensor) -> Predictions:
        """Return the task's own logits of some images, one row each."""
        labels = self.items(part).labels[torch.from_numpy(items)].to(logits.device)
        return Predictions(own_logits(class_indices(self.name, self.classes, model), logits), labels)

    def _probe(self, model: torch.nn.Module) -> torch.Tensor:
        image = next(iter(self._items.values())).pixels[:1]
        try:
            with evaluating(model):
                logits = forward(model, {"pixel_values": image}, next(model.parameters()).device)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"task {self.name!r}: the model does not take images [n, {_shape(image)}]: {reason}") from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise DataError(f"task {self.name!r}: expected a model with logits [n, classes], got {type(model).__name__}")
        return logits


class ImageClassification(ImageTask):
    """Image classification on data that `datasets` reads.

    Args:
        data: where pictures and labels are, as `ImageSource`: at least `path` and `search`.
        classes: see `ImageTask`.
        preprocess: `mean` and `std` (a number, or one per channel) applied to pixels / 255; this or `processor`.
        processor: model folder (or `hf://owner/name`) whose image processor prepares the pictures.
        limit: at most so many images a part, drawn stratified by label; None for all.
        seed: of that draw.
        batch: images scored at a time.
        name: for people.

    Raises:
        ConfigError: an option is unknown or contradicts another.
        DataError: the data cannot be read, or a part is empty.
    """

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        classes: Classes = None,
        preprocess: Mapping[str, Any] | None = None,
        processor: str | Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        batch: int = 64,
        name: str = "image_classification",
    ) -> None:
        check_draw(limit=limit, seed=seed, batch=batch)
        check_classes(classes)
        source = ImageSource.of(data)
        prepare = preparation(preprocess, processor)
        found = read(source)
        parts: dict[Part, ImageItems] = {}
        for part, pictures in found.parts.items():
            kept = pictures.chosen(drawn_by_label(pictures.labels, limit, seed))
            parts[part] = ImageItems(prepare(kept.pictures), torch.from_numpy(kept.labels), settings=prepare.settings)
        super().__init__(name=name, parts=parts, classes=classes, batch=batch, warnings=found.warnings)


def _shape(image: torch.Tensor) -> str:
    return ", ".join(str(size) for size in image.shape[1:])
