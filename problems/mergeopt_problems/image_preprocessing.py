"""From decoded pictures to what an image model gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mergeopt.errors import ConfigError, DataError, nearest

__all__ = ["FolderProcessor", "Normalize", "Picture", "Preparation", "preparation"]

Picture = npt.NDArray[np.uint8]
"""A decoded picture, uint8 [height, width] (grey) or [height, width, 3] (RGB)."""

HUB_PREFIX = "hf://"
CHUNK = 64


class Preparation(Protocol):
    """Makes prepared pixels of pictures."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the result besides the pictures; JSON-able."""
        ...

    def __call__(self, pictures: Sequence[Picture], /) -> torch.Tensor:
        """Return float32 [pictures, channels, height, width]."""
        ...


class Normalize:
    """(x / 255 - mean) / std for pictures that all have the model's size.

    Args:
        mean: one number, or one per channel.
        std: one positive number, or one per channel.
    """

    def __init__(self, *, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        self.mean = _per_channel(mean, "mean")
        self.std = _per_channel(std, "std")
        if min(self.std) <= 0:
            raise ConfigError(f"preprocess: expected a positive std, got {std!r}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Mean and standard deviation."""
        return {"mean": self.mean, "std": self.std}

    def __call__(self, pictures: Sequence[Picture], /) -> torch.Tensor:
        """Return float32 [pictures, 1 or 3, height, width].

        Raises:
            DataError: the pictures differ in shape, or have another number of channels than mean and std.
        """
        shapes = sorted({picture.shape for picture in pictures}, key=str)
        if len(shapes) != 1:
            raise DataError(f"pictures of different shapes ({shapes[0]} and {shapes[1]}, say); give `processor:`, which resizes them")
        stacked = torch.from_numpy(np.stack(pictures))
        pixels = (stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)).to(torch.float32) / 255.0
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, pixels.shape[1]):
                raise DataError(f"preprocess: {len(values)} values for {name}, but the pictures have {pixels.shape[1]} channel(s)")
        mean, std = (torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class FolderProcessor:
    """The image processor of a model folder.

    Args:
        path: folder with a preprocessor_config.json, or `hf://owner/name` (only then is anything fetched).

    Raises:
        DataError: there is no such processor.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoImageProcessor

        self.path = str(path)
        hub = self.path.startswith(HUB_PREFIX)
        if not hub and not any((Path(path) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise DataError(f"processor: {self.path} holds no preprocessor_config.json; name a folder that does, or give `preprocess:`")
        name, _, revision = self.path.removeprefix(HUB_PREFIX).partition("@") if hub else (self.path, "", "")
        try:
            load: Any = AutoImageProcessor.from_pretrained
            self._processor: Any = load(name, revision=revision or None, backend="pil", local_files_only=not hub, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"processor: cannot load the image processor of {self.path}: {str(error).splitlines()[0]}") from error

    @property
    def settings(self) -> Mapping[str, Any]:
        """The processor's own settings."""
        return {"processor": json.loads(self._processor.to_json_string())}

    def __call__(self, pictures: Sequence[Picture], /) -> torch.Tensor:
        """Return float32 [pictures, channels, height, width].

        Raises:
            DataError: the processor leaves pictures of different sizes.
        """
        mean = getattr(self._processor, "image_mean", None)
        mode = "L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB"
        chunks: list[torch.Tensor] = []
        for start in range(0, len(pictures), CHUNK):
            images = [_channels_last(picture, mode) for picture in pictures[start : start + CHUNK]]
            try:
                made = self._processor(images=images, return_tensors="pt", input_data_format="channels_last")
            except ValueError as error:
                raise DataError(f"processor: {self.path} cannot prepare these pictures: {str(error).splitlines()[0]}") from error
            chunks.append(made["pixel_values"].to(torch.float32))
        if len({chunk.shape[1:] for chunk in chunks}) > 1:
            raise DataError(f"processor: {self.path} leaves pictures of different sizes; all must come out equal")
        return torch.cat(chunks)


def preparation(preprocess: Mapping[str, Any] | None, processor: str | Path | None) -> Preparation:
    """Return the preparation that the options of a task ask for: exactly one of them.

    Args:
        preprocess: `mean` and `std`, applied to pixels / 255.
        processor: folder (or hub id) whose image processor is used.

    Raises:
        ConfigError: both or neither are given, or `preprocess` has an unknown key.
        DataError: there is no such processor.
    """
    if (preprocess is None) == (processor is None):
        got = "neither" if preprocess is None else "both"
        raise ConfigError(
            f"image_classification: expected either `preprocess: {{mean: ..., std: ...}}` or `processor: FOLDER` (a model folder with a "
            f"preprocessor_config.json), got {got}; pixels must reach a model as in its training"
        )
    if processor is not None:
        return FolderProcessor(processor)
    if not isinstance(preprocess, Mapping):
        raise ConfigError(f"preprocess: expected {{mean: ..., std: ...}}, got {preprocess!r}")
    for key in preprocess:
        if key not in ("mean", "std"):
            raise ConfigError(f"preprocess: unknown key {key!r}; {nearest(str(key), ('mean', 'std'))}")
    return Normalize(mean=preprocess.get("mean", 0.0), std=preprocess.get("std", 1.0))


def _per_channel(value: float | Sequence[float], name: str) -> list[float]:
    values = list(value) if isinstance(value, Sequence) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) or not np.isfinite(v) for v in values):
        raise ConfigError(f"preprocess: expected for {name} a finite number or one per channel, got {value!r}")
    return [float(v) for v in values]


def _channels_last(picture: Picture, mode: str) -> Picture:
    converted = np.asarray(Image.fromarray(picture).convert(mode), dtype=np.uint8)
    return converted[..., None] if converted.ndim == 2 else converted
