"""A problem that is measured item by item without models, for tests of races; the race itself is the real one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.errors import CandidateError
from mergeopt.evaluation.censored import Censored
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.race import Heat, Race
from mergeopt.evaluation.racing import Racing
from mergeopt.genomes.space import Float, Space
from mergeopt.problem import Evaluation, ProblemInfo, Proposal
from mergeopt.recipe import Recipe, content_hash
from mergeopt.task import Part, Records
from mergeopt_problems.metrics import Accuracy

Genome = npt.NDArray[np.float64]
CPU = torch.device("cpu")


class Questions:
    """Items that a point of the cube answers right when it lies near enough to the item's place, scattered around a centre."""

    parts: tuple[Part, ...] = ("search",)

    def __init__(self, name: str, centre: Sequence[float], count: int) -> None:
        rng = np.random.default_rng([count, *name.encode()])
        self.name, self.hash = name, f"{name}:{count}"
        self._places = np.asarray(centre) + 0.2 * rng.standard_normal((count, len(centre)))
        self._reach = 1.2 * rng.random(count)
        self.asked = 0

    def __len__(self) -> int:
        return len(self._reach)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"place": self._places[index], "label": 1}

    def items(self, part: Part) -> Questions:
        return self

    def check(self, model: torch.nn.Module) -> None:
        return

    def records(self, model: Any, part: Part, device: torch.device, items: Sequence[int] | None = None) -> Records:
        chosen = np.arange(len(self)) if items is None else np.asarray(items)
        self.asked += len(chosen)
        right = np.linalg.norm(model - self._places[chosen], axis=1) < self._reach[chosen]
        return {"prediction": right.astype(np.int64), "label": np.ones(len(chosen), np.int64)}


@dataclass
class Quiz:
    """One or two kinds of questions; a point right of `fail` in its first coordinate fails, in a race only once it has come some way."""

    kinds: int = 2
    count: int = 400
    fail: float = 2.0
    seconds: float = 0.0
    parts: tuple[Part, ...] = ("search",)
    tasks: list[Questions] = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = [Questions("near", [0.2, 0.3, 0.2], self.count), Questions("far", [0.7, 0.6, 0.7], self.count // 2)][: self.kinds]
        self.objectives = [TaskObjective(task.name, task, Accuracy()) for task in self.tasks]

    @property
    def info(self) -> ProblemInfo:
        space = Space([Float(f"x{i}", 0.0, 1.0) for i in range(3)])
        return ProblemInfo("quiz", space, tuple(o.info for o in self.objectives), content_hash([self.kinds, self.count, self.fail]))

    def decode(self, genome: Genome) -> Recipe | None:
        return None

    def baselines(self) -> list[Proposal]:
        return [Proposal("corner", np.zeros(3)), Proposal("good", np.array([0.45, 0.45, 0.45]))]

    def provenance(self) -> Mapping[str, Any]:
        return {"made": "analytically"}

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        for proposal in proposals:
            model: Any = proposal.genome
            if model[0] > self.fail:
                yield Evaluation({}, "too far to the right")
            else:
                yield Evaluation({o.info.name: o.score(model, part, CPU, {}) for o in self.objectives}, seconds={"score": 0.0})

    def race(self, racing: Racing, *, seed: int) -> Race:
        return Race(racing, self.objectives, seed=seed)

    def run_heat(self, proposals: Sequence[Proposal], heat: Heat) -> Iterator[Evaluation]:
        failed: set[int] = set()
        for index in range(len(proposals)):
            while not heat.finished(index):
                for other in heat.todo():
                    try:
                        self._measure(proposals[other].genome, heat, other)
                    except CandidateError:
                        failed.add(other)
                        heat.fail(other)
                heat.decide()
            if index in failed:
                yield Evaluation({}, "too far to the right")
                continue
            result = heat.result(index)
            yield Evaluation({}, censored=result) if isinstance(result, Censored) else Evaluation(result)

    def _measure(self, model: Any, heat: Heat, index: int) -> None:
        time.sleep(self.seconds)
        wanted = heat.wanted(index)
        if model[0] > self.fail and max(map(len, wanted)) > 60:  # it fails late, after it has beaten others
            raise CandidateError("too far to the right")
        heat.add(
            index, [task.records(model, "search", CPU, items) if items else {} for task, items in zip(self.tasks, wanted, strict=True)]
        )
