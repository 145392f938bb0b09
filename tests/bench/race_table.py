"""Makes the frozen tables that race.py replays: which of 2,000 images each of 100 real merges classifies right, for four tasks.

    MERGEOPT_DATA=... MERGEOPT_ZOO=... python tests/bench/race_table.py

`spread` holds what a search proposes at first: weights uniform over the operator's default range, one per expert. `close` holds what it
proposes late: weights per layer, within a tenth of equal shares, so that most merges are near ties. Items are the validation and test
images of each task, in the order of the files. About 10 minutes on one core.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import mergeopt as mo
from mergeopt.task import Part
from mergeopt_problems.image_classification import ImageClassification
from mergeopt_problems.metrics import Accuracy

TABLE = Path(__file__).parent / "tables" / "vit_images.npz"
TASKS = ("mnist", "fashion", "notmnist", "kannada")
CANDIDATES = 100
PARTS: tuple[Part, ...] = ("search", "report")
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "spread": {"groups": "model"},
    "close": {"groups": "layer", "parameters": {"weight": {"low": 0.225, "high": 0.275}}},
}


def main() -> None:
    """Make the candidates, score them, and write the tables as packed bits."""
    packed = {f"{group}_{task}": table for group, how in GROUPS.items() for task, table in _tables(how).items()}
    np.savez_compressed(TABLE, allow_pickle=False, **packed)
    print(f"{TABLE}: {TABLE.stat().st_size} bytes")


def read_table(group: str) -> dict[str, npt.NDArray[np.bool_]]:
    """Return which items are right, by task: bool [candidates, items]."""
    with np.load(TABLE, allow_pickle=False) as file:
        found = {task: np.unpackbits(file[f"{group}_{task}"], axis=1) for task in TASKS}
    return {task: bits[:, :CANDIDATES].T.astype(bool) for task, bits in found.items()}


def _tables(how: Mapping[str, Any]) -> dict[str, npt.NDArray[np.uint8]]:
    """Return packed bits by task, uint8 [items, candidates / 8]: an item's answers lie together, which compresses better."""
    data, zoo = Path(os.environ["MERGEOPT_DATA"]), Path(os.environ["MERGEOPT_ZOO"]) / "vit_images"
    pool = mo.Pool(base=str(zoo / "base"), experts={name: str(zoo / name) for name in TASKS})
    problem = mo.MergeProblem(pool, "task_arithmetic", [_objective(name, data) for name in TASKS], threads=1, **how)
    genomes = np.random.default_rng(0).random((CANDIDATES, problem.info.space.dim))
    recipes = [problem.decode(genome) for genome in genomes]
    right: dict[str, list[list[npt.NDArray[Any]]]] = {name: [[] for _ in recipes] for name in TASKS}
    for part in PARTS:
        for index, outcome in enumerate(problem.evaluator.evaluate(recipes, part)):
            for name, score in outcome.scores.items():
                right[name][index].append(score.records["prediction"] == score.records["label"])
    return {name: np.packbits(np.stack([np.concatenate(parts) for parts in rows], axis=1), axis=1) for name, rows in right.items()}


def _objective(name: str, data: Path) -> mo.TaskObjective:
    source = {"path": str(data / f"open/images/{name}.parquet"), "search": "val", "report": "test", "image": "pixels", "shape": [28, 28]}
    task = ImageClassification(data=source, classes=f"{name}:.*", preprocess={"mean": 0.3, "std": 0.35}, batch=250, name=name)
    return mo.TaskObjective(name, task, Accuracy())


if __name__ == "__main__":
    main()
