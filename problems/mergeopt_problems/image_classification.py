"""Image classification: any Hugging Face image classifier, judged on all its logits or on the task's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from mergeopt.errors import CandidateError, ConfigError, DataError, nearest
from mergeopt.task import Part, Predictions, Records
from mergeopt_problems.class_predictions import classified
from mergeopt_problems.drawing import drawn_by_label
from mergeopt_problems.image_data import ImageSource, Pictures, read
from mergeopt_problems.image_items import ImageItems
from mergeopt_problems.image_preprocessing import preparation
from mergeopt_problems.label_space import Classes, check_classes, class_indices, own_logits
from mergeopt_problems.model_inputs import evaluating

__all__ = ["ImageClassification", "ImageTask"]


class ImageTask:
    """Image classification on prepared items.

    Args:
        name: for people.
        parts: the items by part.
        classes: which logits the task is judged on, the i-th being the data's label i: their indices, or a regex that the names of the
            model's `id2label` must match in full (`mnist:.*`); None for all.
        batch: images scored at a time; fixed, since it may change the last bits of a score.

    Raises:
        ConfigError: batch is below 1, or classes is neither of these.
    """

    def __init__(self, *, name: str, parts: Mapping[Part, ImageItems], classes: Classes = None, batch: int = 64) -> None:
        if batch < 1:
            raise ConfigError(f"batch: expected at least 1, got {batch}")
        check_classes(classes)
        self.name = name
        self.classes = classes if classes is None or isinstance(classes, str) else [int(index) for index in classes]
        self.batch = batch
        self._items = dict(parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this task has data for."""
        return tuple(self._items)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the records besides model and items; JSON-able."""
        return {"classes": self.classes, "batch": self.batch}

    def items(self, part: Part) -> ImageItems:
        """Return the items of a part, the same object every time.

        Raises:
            DataError: the part was not given.
        """
        if part not in self._items:
            raise DataError(f"task {self.name!r} has no {part} part; {nearest(part, self._items)}. Name its split in the task's data")
        return self._items[part]

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

    def records(self, model: torch.nn.Module, part: Part, device: torch.device) -> Records:
        """Return what the model says of each image over the task's own logits, each [items].

        `loss` (cross-entropy) and `entropy` (of the softmax; both in nats, float32), `prediction` and `label` (int64).

        Raises:
            CandidateError: a logit is not finite.
        """
        items = self.items(part)
        classes = class_indices(self.name, self.classes, model)
        dtype = next(model.parameters()).dtype
        made: list[dict[str, torch.Tensor]] = []
        with evaluating(model):
            for pixels, labels in items.batches(self.batch):
                logits = own_logits(classes, model(pixel_values=pixels.to(device, dtype)).logits)
                if not bool(torch.isfinite(logits).all()):
                    raise CandidateError(f"task {self.name!r}: the model's logits on the {part} part are not finite")
                made.append(classified(logits, labels.to(device)))
        columns = {name: _joined([batch[name] for batch in made]) for name in made[0]}
        return {**columns, "label": items.labels.numpy().copy()}

    def predict(self, model: torch.nn.Module, part: Part, items: Sequence[int], device: torch.device) -> Predictions:
        """Return the task's own logits of some images, keeping the graph where gradients are on.

        Args:
            model: in evaluation mode, on the device.
            part: which data.
            items: indices of images, one or more, in any order; they run as one batch.
            device: where the model is.
        """
        own = self.items(part)
        index = torch.as_tensor(items, dtype=torch.int64)
        dtype = next(model.parameters()).dtype
        logits = model(pixel_values=own.pixels[index].to(device, dtype)).logits
        return Predictions(own_logits(class_indices(self.name, self.classes, model), logits), own.labels[index].to(device))

    def _probe(self, model: torch.nn.Module) -> torch.Tensor:
        image = next(iter(self._items.values())).pixels[:1]
        weight = next(model.parameters())
        try:
            with torch.inference_mode():
                logits = getattr(model(pixel_values=image.to(weight.device, weight.dtype)), "logits", None)
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
        if limit is not None and limit < 1:
            raise ConfigError(f"limit: expected at least 1, got {limit}")
        check_classes(classes)
        source = ImageSource.of(data)
        prepare = preparation(preprocess, processor)
        parts: dict[Part, ImageItems] = {}
        for part, pictures in read(source).items():
            kept = _stratified(pictures, limit, seed)
            parts[part] = ImageItems(prepare(kept.pictures), torch.from_numpy(kept.labels), settings=prepare.settings)
        super().__init__(name=name, parts=parts, classes=classes, batch=batch)


def _stratified(pictures: Pictures, limit: int | None, seed: int) -> Pictures:
    kept = drawn_by_label(pictures.labels, limit, seed)
    return Pictures([pictures.pictures[row] for row in kept], pictures.labels[kept])


def _joined(chunks: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = torch.cat(list(chunks)).numpy()
    return joined


def _shape(image: torch.Tensor) -> str:
    return ", ".join(str(size) for size in image.shape[1:])
