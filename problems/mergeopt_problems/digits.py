"""The embedded default problem: four views of scikit-learn's handwritten digits that pull one small vision transformer apart.

1,797 real images of 8x8 pixels, shown upright, turned by 180 degrees, as a negative and mirrored, share one 10-way head. Turned, a 6 is
a 9: the tasks contradict each other, so that merging their experts is a true trade-off. Nothing is downloaded; the base model and the
experts are trained on first use (about half a minute) and kept in the cache folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits

from mergeopt import registry
from mergeopt.errors import ConfigError, nearest
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.merge_problem import MergeMaterials
from mergeopt.task import Part
from mergeopt_problems.digits_training import MEAN, SCALE, STD, Settings, train_all
from mergeopt_problems.image_classification import ImageTask
from mergeopt_problems.image_items import ImageItems

__all__ = ["TASKS", "digits", "trained_digits"]

log = logging.getLogger(__name__)

TASKS = ("upright", "turned", "negative", "mirrored")
VIEWS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "upright": lambda images: images,
    "turned": lambda images: images.flip((-2, -1)),
    "negative": lambda images: 1.0 - images,
    "mirrored": lambda images: images.flip(-1),
}
TRAIN, SEARCH = 900, 450
BATCH = 150  # activations of more images leave the caches of a small machine
SPLIT_SEED = 0


def digits(*, tasks: Sequence[str] = TASKS, metric: str = "accuracy") -> MergeMaterials:
    """Return base, experts and objectives of the digits problem, training what is not in the cache folder yet.

    Args:
        tasks: the views to merge experts of, in order; of `TASKS`.
        metric: registered name of the metric of every objective.

    Raises:
        ConfigError: a task is unknown or named twice, or none is named.
        PluginError: the metric is unknown.
    """
    return trained_digits(tasks=tasks, metric=metric)


def trained_digits(
    *,
    tasks: Sequence[str] = TASKS,
    metric: str = "accuracy",
    progress: Callable[[str], None] | None = None,
    settings: Settings | None = None,
) -> MergeMaterials:
    """Return what `digits` returns, trained as told.

    Args:
        tasks: the views to merge experts of, in order; of `TASKS`.
        metric: registered name of the metric of every objective.
        progress: told one line before each training; None to log them.
        settings: how to train; None for the defaults.

    Raises:
        ConfigError: a task is unknown or named twice, or none is named.
        PluginError: the metric is unknown.
    """
    chosen = _chosen(tasks)
    make_metric = registry.load("metrics", metric)
    data = _data()
    training = {name: parts["train"] for name, parts in data.items()}
    folders = train_all(training, chosen, settings=settings or Settings(), progress=progress or log.info)
    objectives = []
    for name in chosen:
        parts: dict[Part, ImageItems] = {"search": data[name]["search"], "report": data[name]["report"]}
        objectives.append(TaskObjective(name, ImageTask(name=f"digits/{name}", parts=parts, batch=BATCH), make_metric(), expert=name))
    return MergeMaterials(
        name="digits", base=str(folders["base"]), experts={name: str(folders[name]) for name in chosen}, objectives=tuple(objectives)
    )


def _chosen(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str) or not tasks:
        raise ConfigError(f"digits: expected a list of tasks, got {tasks!r}; known: {', '.join(TASKS)}")
    for name in tasks:
        if name not in TASKS:
            raise ConfigError(f"digits: unknown task {name!r}; {nearest(str(name), TASKS)}")
        if list(tasks).count(name) > 1:
            raise ConfigError(f"digits: the task {name!r} is named twice")
    return tuple(tasks)


def _data() -> dict[str, dict[str, ImageItems]]:
    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)) * SCALE
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(labels)))
    rows = {"train": order[:TRAIN], "search": order[TRAIN : TRAIN + SEARCH], "report": order[TRAIN + SEARCH :]}
    return {
        name: {
            part: ImageItems(
                ((VIEWS[name](images[chosen]) - MEAN) / STD)[:, None],
                labels[chosen],
                settings={"data": "scikit-learn digits", "view": name, "scale": SCALE, "mean": MEAN, "std": STD},
            )
            for part, chosen in rows.items()
        }
        for name in TASKS
    }
