"""Trains the small vision transformers of the digits problem, and keeps them as Hugging Face folders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.utils import logging

from mergeopt.cache import cache_folder
from mergeopt.evaluation.threads import computing_threads
from mergeopt.recipe import content_hash
from mergeopt_problems.image_items import ImageItems

__all__ = ["MEAN", "SCALE", "STD", "Settings", "train_all"]

VERSION = 1
"""Raised whenever this file trains other weights from the same settings."""

SCALE = 1.0 / 16.0
MEAN = 0.3
STD = 0.35
THREADS = 1  # so small a model gains little from more, and loses much when another process keeps a core busy
SEED = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """How the models are trained; a lighter training is another set of models.

    Args:
        base_epochs: over all tasks together.
        expert_epochs: over an expert's own task.
        base_rate: highest learning rate of the one-cycle schedule, for the base.
        expert_rate: the same for experts.
        batch: images a step.
    """

    base_epochs: int = 12
    expert_epochs: int = 10
    base_rate: float = 2e-3
    expert_rate: float = 1e-3
    batch: int = 64


def train_all(
    data: Mapping[str, ImageItems], experts: Sequence[str], *, settings: Settings, progress: Callable[[str], None]
) -> dict[str, Path]:
    """Return the folders of the base model (`base`) and of the experts, training those that are not kept already.

    Args:
        data: training images of every task; the base learns all of them.
        experts: tasks to return an expert for.
        settings: how to train.
        progress: told one line before each training.
    """
    folder = _folder(data, settings)
    base = folder / "base"
    if not base.is_dir():
        progress(f"digits: training the base model, kept in {folder}")
        _keep(base, _train_base(data, settings))
    paths = {"base": base}
    for name in experts:
        paths[name] = folder / name
        if not paths[name].is_dir():
            progress(f"digits: training the expert {name!r}")
            _keep(paths[name], _train_expert(base, data[name], settings))
    return paths


def _folder(data: Mapping[str, ImageItems], settings: Settings) -> Path:
    determined_by = {
        "version": VERSION,
        "settings": asdict(settings),
        "data": {name: items.hash for name, items in data.items()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        "threads": THREADS,
    }
    return cache_folder() / "digits" / content_hash(determined_by)[:16]


def _keep(folder: Path, model: ViTForImageClassification) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(model, made)
        made.chmod(0o755)  # mkdtemp's folder is for its owner only
        made.rename(folder)
    except OSError:
        # another process was first: its folder holds the same weights
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _save(model: ViTForImageClassification, folder: Path) -> None:
    with _no_bars():
        model.save_pretrained(folder)
    size = {"height": 8, "width": 8}
    processor = ViTImageProcessorPil(do_resize=False, size=size, rescale_factor=SCALE, image_mean=[MEAN], image_std=[STD])
    processor.save_pretrained(folder)


def _train_base(data: Mapping[str, ImageItems], settings: Settings) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ViTForImageClassification(config)
    pixels = torch.cat([items.pixels for items in data.values()])
    labels = torch.cat([items.labels for items in data.values()])
    return _fit(model, pixels, labels, epochs=settings.base_epochs, rate=settings.base_rate, batch=settings.batch)


def _train_expert(base: Path, items: ImageItems, settings: Settings) -> ViTForImageClassification:
    with _no_bars():
        model = ViTForImageClassification.from_pretrained(base, local_files_only=True)
    return _fit(model, items.pixels, items.labels, epochs=settings.expert_epochs, rate=settings.expert_rate, batch=settings.batch)


def _fit(
    model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor, *, epochs: int, rate: float, batch: int
) -> ViTForImageClassification:
    generator = torch.Generator().manual_seed(SEED)
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    with computing_threads(THREADS):
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                loss = F.cross_entropy(model(pixel_values=pixels[chosen]).logits, labels[chosen])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    model.train(False)
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    # a bar of a few milliseconds per model would stand between the lines of a run
    bars: Any = logging  # untyped there
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
