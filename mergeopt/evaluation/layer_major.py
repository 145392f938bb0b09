"""Scores candidates of models that do not fit into memory: layer by layer, all candidates at once.

One layer of all candidates is made, all items of all tasks go through it for each of them, and what comes out waits for the next layer,
which takes the first one's place. Weights in memory are thus those of one layer and of what lies outside of layers (embeddings, head), each
times the candidates, and what is merged is read once for all of them. The activations of all items are kept, times the candidates.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mergeopt.batched_task import BatchedTask, Columns
from mergeopt.errors import CandidateError, ConfigError
from mergeopt.evaluation.arena import Live
from mergeopt.evaluation.compared_task import ComparedTask
from mergeopt.evaluation.correction import corrected, open_learned
from mergeopt.evaluation.evaluator import OVERFLOW, FindOperator
from mergeopt.evaluation.fingerprint import fingerprint
from mergeopt.evaluation.materialize import TensorMaker
from mergeopt.evaluation.objectives import TaskObjective
from mergeopt.evaluation.outcome import Outcome
from mergeopt.evaluation.recipe_values import kind_of, recipe_values
from mergeopt.evaluation.score import guarded
from mergeopt.evaluation.stages import Stages, State, find_stages
from mergeopt.evaluation.threads import computing_threads
from mergeopt.forward import evaluating, forward
from mergeopt.learned import LearnedSet
from mergeopt.models.groups import Grouping
from mergeopt.models.hollow import hollow_tensor
from mergeopt.models.layout import Layout, Segment
from mergeopt.recipe import Recipe
from mergeopt.task import Objective, Part, Records, Score

__all__ = ["LayerMajor"]

SWITCH = "memory: scoring: layers"
METADATA = {"device", "dtype", "is_cuda", "is_leaf", "is_meta", "is_sparse", "layout", "names", "ndim", "requires_grad", "shape"}
SHAPES = (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.stride)
"""What a tensor says of itself without its numbers: attributes by name, and methods."""
Correction = Callable[[Segment], torch.Tensor | None]
_Key = tuple[int, str | None]


class LayerMajor:
    """Hollow live models, and the objectives that are measured on them.

    Args:
        layout: what is made.
        objectives: what is measured: metrics of tasks that ask a model once per batch.
        find_operator: gives the operator of a name and variant.
        dtype: of the weights.
        device: where models run.
        batch: candidates at a time.
        threads: that torch computes with.

    Raises:
        ConfigError: an objective cannot be measured this way, or a model cannot be cut at its layers.
        DataError: an objective cannot be measured on this model.
    """

    def __init__(
        self,
        layout: Layout,
        objectives: Sequence[Objective],
        find_operator: FindOperator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        threads: int,
    ) -> None:
        self.layout, self.objectives, self.find_operator = layout, [_checked(objective) for objective in objectives], find_operator
        self.dtype, self.device, self.batch, self.threads = dtype, device, batch, threads
        heads = dict.fromkeys(layout.pool.head_of(objective.info.expert) for objective in self.objectives)
        self._lives = {head: Live(layout, head, dtype, device, hollow=True) for head in heads}
        self._hollow = [hollow_tensor(segment.shape, dtype, device) for segment in layout.segments]
        self._stages: dict[_Key, Stages] = {}
        self._groupings: dict[str, Grouping] = {}
        self._learned: dict[str, LearnedSet] = {}
        with computing_threads(threads):
            for objective in self.objectives:
                self._look_at(objective)

    @staticmethod
    def needs(layout: Layout, dtype: torch.dtype, candidates: int) -> int:
        """Return the bytes of the weights that are in memory at once: those outside of layers and of the largest layer, by candidate."""
        by_layer: dict[str, int] = {}
        for segment in layout.segments:
            by_layer[segment.layer] = by_layer.get(segment.layer, 0) + segment.end - segment.start
        outside = by_layer.pop("embeddings", 0) + by_layer.pop("head", 0)
        return candidates * (outside + max(by_layer.values(), default=0)) * dtype.itemsize

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What besides recipe and data can change a score's last bits; JSON-able."""
        return fingerprint(self.device, self.dtype, self.threads, next(iter(self._lives.values())).model)

    def keep(self, learned: LearnedSet) -> None:
        """Know a learned set by its content hash, so that recipes can ask it."""
        self._learned[learned.hash] = learned

    def evaluate(self, recipes: Sequence[Recipe], part: Part) -> Iterator[Outcome]:
        """Make and score recipes, yielding outcomes in order, those of neighbours of a kind together.

        Raises:
            ConfigError: a recipe is of members that evolved, which are kept in memory as a whole.
        """
        for _, alike in groupby(recipes, key=kind_of):
            together = list(alike)
            for start in range(0, len(together), self.batch):
                yield from self._together(together[start : start + self.batch], part)

    def _together(self, recipes: Sequence[Recipe], part: Part) -> Iterator[Outcome]:
        began = time.perf_counter()
        with computing_threads(self.threads), torch.no_grad():
            made = self._candidates(recipes)
            records = self._records(made, part)
        share = (time.perf_counter() - began) / len(recipes)
        seconds = {"make": made.seconds / len(recipes), "score": share - made.seconds / len(recipes)}
        for row, error in enumerate(made.errors):
            scores: dict[str, Score] = {}
            try:
                for objective in self.objectives if error is None else ():
                    scores[objective.info.name] = objective.score_records(records[self._key(objective)][row], part)
            except CandidateError as failure:
                scores, error = {}, str(failure)
            yield Outcome(scores, error, seconds)

    def _candidates(self, recipes: Sequence[Recipe]) -> _Candidates:
        first = recipes[0]
        if first.lineage is not None:
            raise ConfigError(f"{SWITCH}: members that evolve are kept in memory as a whole; use another strategy, or scoring: candidates")
        operator = self.find_operator(first.operator, first.variant)
        values = [recipe_values(operator, recipe, self.layout, self._groupings) for recipe in recipes]
        maker = TensorMaker(self.layout, operator, values, self.device)
        return _Candidates(self.layout, maker, [self._correction(recipe) for recipe in recipes], self.dtype)

    def _correction(self, recipe: Recipe) -> Correction | None:
        if recipe.learned is None:
            return None
        learned = self._learned.get(recipe.learned.hash) or open_learned(recipe.learned)
        return corrected(self.layout, learned, recipe.learned, self.device)

    def _records(self, made: _Candidates, part: Part) -> dict[_Key, list[Records]]:
        """Return the records of all candidates, by pass over data; those of one that fails on the way are not all there."""
        passes = {self._key(objective): self._pass(objective, part, len(made.errors)) for objective in self.objectives}
        outside = {place for one in passes.values() for place in one.used(None)}
        everywhere = made.tensors(outside)
        for layer in range(max(one.depth for one in passes.values()) + 1):
            own = made.tensors({place for one in passes.values() for place in one.used(layer)} - outside)
            self._advance(layer, everywhere | own, passes.values(), made, part)
            del own  # before the next layer's are made
        return {key: [columns.records for columns in one.columns] for key, one in passes.items()}

    def _advance(self, layer: int, tensors: Mapping[int, torch.Tensor], passes: Collection[_Pass], made: _Candidates, part: Part) -> None:
        """Run all candidates through a layer, where these tensors are; nothing holds them after that."""
        for row in [row for row, error in enumerate(made.errors) if error is None]:
            views = [tensors[at][row].view(s.shape) if at in tensors else self._hollow[at] for at, s in enumerate(self.layout.segments)]
            try:
                for one in passes:
                    one.advance(row, layer, views, part)
            except CandidateError as failure:
                made.errors[row] = str(failure)
        for live in self._lives.values():
            live.hold(self._hollow)

    def _key(self, objective: TaskObjective) -> _Key:
        return id(objective.task), self.layout.pool.head_of(objective.info.expert)

    def _pass(self, objective: TaskObjective, part: Part, candidates: int) -> _Pass:
        key = self._key(objective)
        return _Pass(objective, self._lives[key[1]], self._stages[key], part, candidates, self.device)

    def _look_at(self, objective: TaskObjective) -> None:
        """Check an objective and cut its model at its layers, with the base's weights, each read when it is used."""
        key = self._key(objective)
        live, task = self._lives[key[1]], _batched(objective)
        with _Reading(live, self.layout, self.dtype, self.device):
            objective.check(live.model)
            if key not in self._stages:
                batch = next(iter(task.batches(live.model, "search")))
                with evaluating(live.model):
                    stages = find_stages(live.model, functools.partial(forward, live.model, batch.inputs, self.device))
                if stages is None:
                    raise ConfigError(f"{SWITCH}: {type(live.model).__name__} cannot be cut at its layers; use scoring: candidates")
                self._stages[key] = stages


class _Candidates:
    """Recipes of a kind, made tensor by tensor."""

    def __init__(self, layout: Layout, maker: TensorMaker, corrections: Sequence[Correction | None], dtype: torch.dtype) -> None:
        self._layout, self._maker, self._corrections, self._dtype = layout, maker, corrections, dtype
        self.seconds = 0.0

    @property
    def errors(self) -> list[str | None]:
        """What is wrong with each, None where nothing is so far."""
        return self._maker.errors

    def tensors(self, places: Collection[int]) -> dict[int, torch.Tensor]:
        """Return some tensors of all candidates, [n, elements] each, by place of the segment."""
        began = time.perf_counter()
        made = {place: self._tensor(place) for place in sorted(places)}
        self.seconds += time.perf_counter() - began
        return made

    def _tensor(self, place: int) -> torch.Tensor:
        wide = self._maker.make(place)
        for row, correct in enumerate(self._corrections):
            if correct is not None and (correction := correct(self._layout.segments[place])) is not None:
                wide[row].add_(correction.reshape(-1))
        made = wide.to(self._dtype)
        if self._dtype == torch.float16:
            for row in (~torch.isfinite(made).all(dim=1)).nonzero().flatten().tolist():
                self.errors[row] = self.errors[row] or OVERFLOW
        return made


class _Pass:
    """All candidates on their way through a live model, on all items of a part of a task."""

    def __init__(self, objective: TaskObjective, live: Live, stages: Stages, part: Part, candidates: int, device: torch.device) -> None:
        self._name, self._task, self._live, self._stages, self._device = objective.info.name, _batched(objective), live, stages, device
        self._batches = list(self._task.batches(live.model, part))
        self._states: list[list[State | None]] = [[None] * len(self._batches) for _ in range(candidates)]
        self.columns = [Columns(len(self._task.items(part)), None) for _ in range(candidates)]

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return len(self._stages.layers)

    def used(self, layer: int | None) -> list[int]:
        """Return the tensors that are used in a layer, or outside of layers, by place of the segment."""
        return [place for place, name in enumerate(self._live.names) if layer in self._stages.inside[name]]

    def advance(self, row: int, layer: int, views: Sequence[torch.Tensor], part: Part) -> None:
        """Run one candidate through a layer, or, after the last, to the end, and record what comes out.

        Raises:
            CandidateError: it cannot be; the message names an objective.
        """
        model = self._live.model
        self._live.hold(views)
        with guarded(self._name), evaluating(model):
            for number, batch in enumerate(self._batches):
                call = functools.partial(forward, model, batch.inputs, self._device)
                state, self._states[row][number] = self._states[row][number], None
                if layer < self.depth:
                    self._states[row][number] = self._stages.run(call, state, stop=layer + 1)
                elif layer == self.depth:
                    with self._stages.passing(state):
                        logits = call()
                    self.columns[row].add(batch.items, self._task.record(model, part, batch.items, logits))


class _Reading(TorchFunctionMode):
    """Has a hollow model compute with the base's weights, each read from its file when it is used and forgotten then."""

    def __init__(self, live: Live, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._layout, self._dtype, self._device = layout, dtype, device
        self._names = {id(home.tensor): segment.name for home, segment in zip(live.homes, layout.segments, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        getter = getattr(func, "__name__", None) == "__get__" and getattr(func.__self__, "__name__", None) in METADATA
        if getter or func in SHAPES:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, self._read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names.get(id(tensor))
        return tensor if name is None else self._layout.pool.read_base(name).to(self._device, self._dtype)


def _checked(objective: Objective) -> TaskObjective:
    name = objective.info.name
    if not isinstance(objective, TaskObjective):
        raise ConfigError(f"{SWITCH}: the objective {name!r} is a function of a whole model; use scoring: candidates")
    if isinstance(objective.task, ComparedTask):
        raise ConfigError(f"{SWITCH}: the objective {name!r} compares with an expert, which is loaded as a whole; use scoring: candidates")
    _batched(objective)
    return objective


def _batched(objective: TaskObjective) -> BatchedTask:
    if not isinstance(objective.task, BatchedTask):
        raise ConfigError(
            f"{SWITCH}: the task {objective.task.name!r} of the objective {objective.info.name!r} asks a model more than once per batch; "
            "use scoring: candidates"
        )
    return objective.task
