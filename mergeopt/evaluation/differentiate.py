"""Gradients of losses with respect to an operator's coefficients and to learned sets, in three passes over one candidate.

`put` makes the weights without any graph, by the very code that makes candidates; `loss` runs the live model with its parameters as
leaves, and gathers their gradient in one flat buffer; `pull` lowers the plans again, this time with their graph, and carries the gradient
back tensor by tensor. No graph ever spans more than one objective's forward pass or one run of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mergeopt.differentiable import Coefficients, LossValue, Weights
from mergeopt.errors import CandidateError, ConfigError, nearest
from mergeopt.evaluation.coefficients import LearnedCoefficients
from mergeopt.evaluation.elementwise import chunk
from mergeopt.evaluation.evaluator import Evaluator
from mergeopt.evaluation.expert_logits import ExpertLogits, expert_model
from mergeopt.evaluation.materialize import Materializer
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.evaluation.threads import computing_threads
from mergeopt.learned import LearnedSet
from mergeopt.models.layout import Layout
from mergeopt.operators.contract import Dense, Linear, MergeOperator, Plan, Rational
from mergeopt.recipe import Argument, Learned, Recipe
from mergeopt.task import DifferentiableTask, Objective, Predictions

__all__ = ["ModelGradients"]

MakeRecipe = Callable[[MergeOperator, Mapping[str, Argument]], Recipe]
ROW = 0  # of the candidate arena: the model that is learned


class ModelGradients:
    """The door of `mergeopt.differentiable.DifferentiableProblem` to a pool of models.

    Args:
        layout: what is made.
        objectives: what is measured.
        evaluator: returns what holds the live model and the first row that are used, once the first loss is asked for.
        operator: the problem's.
        begin: returns the coefficients to learn, as `MergeProblem` documents it.
        make_recipe: returns the recipe of an operator with arguments.
        folder: where learned sets are kept, None to keep them in memory.
    """

    def __init__(
        self,
        layout: Layout,
        objectives: Sequence[Objective],
        evaluator: Callable[[], Evaluator],
        begin: Callable[[str | None, str, object, float | None], LearnedCoefficients],
        make_recipe: MakeRecipe,
        folder: Path | None,
    ) -> None:
        self._layout, self._load = layout, evaluator
        self._objectives = {objective.info.name: objective for objective in objectives}
        self._begin, self._make_recipe = begin, make_recipe
        self._folder = folder
        self._teachers: dict[str, ExpertLogits] = {}

    @cached_property
    def _evaluator(self) -> Evaluator:
        return self._load()

    @cached_property
    def _gradient(self) -> torch.Tensor:
        return torch.zeros(self._layout.size, dtype=self._evaluator.dtype, device=self._evaluator.device)

    @staticmethod
    def needs(layout: Layout, dtype: torch.dtype) -> int:
        """Return the bytes of the one buffer that gradients are gathered in."""
        return layout.size * dtype.itemsize

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self._objectives)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names, in order."""
        return self._layout.pool.expert_names

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Merged tensors by stored name, in the model's order."""
        return {segment.name: segment.shape for segment in self._layout.segments}

    def expert_of(self, objective: str) -> str | None:
        """Return the expert that an objective refers to, None where it names none."""
        return self._objectives[objective].info.expert

    def losses(self, objective: str) -> tuple[str, ...]:
        """Return the losses that an objective can give, the one to take by default first."""
        found = self._objectives[objective]
        given: tuple[str, ...] = ()
        if isinstance(found, FunctionObjective) and found.differentiable is not None:
            given = ("own",)
        elif _task_of(found) is not None:
            given = ("cross_entropy", "entropy", *(("kl",) if found.info.expert else ()))
        return (*given, *(("distance",) if found.info.expert else ()))

    def items(self, objective: str) -> int:
        """Return how many items an objective has on the search part."""
        return self._objectives[objective].info.items or 0

    def coefficients(
        self, *, operator: str | None = None, variant: str = "paper", groups: object = None, weight: float | None = None
    ) -> LearnedCoefficients:
        """Return coefficients to learn.

        Raises:
            ConfigError: what is to be learned has no useful gradient.
        """
        return self._begin(operator, variant, groups, weight)

    def tensors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one tensor of the base, [*shape], and of the experts, [K, *shape]; float32."""
        pool = self._layout.pool
        return pool.read_base(name), pool.stack(name)

    def merged(self, coefficients: Coefficients, name: str) -> torch.Tensor:
        """Return one tensor of the merge alone, [*shape] float32."""
        segment = next(segment for segment in self._evaluator.layout.segments if segment.name == name)
        self._evaluator.model(self._plain(Weights(coefficients)))  # asked for the next tensor, it finds the row made
        return self._evaluator.arena.rows[ROW, segment.start : segment.end].view(segment.shape).to(torch.float32, copy=True)

    def put(self, weights: Weights) -> None:
        """Make the weights in the live model; the gradient gathered so far is dropped."""
        self._gradient.zero_()
        self._evaluator.model(self._plain(weights))
        if weights.learned is not None and weights.preference is not None:
            with torch.no_grad(), self._threads():
                self._correct(_own(weights.coefficients), weights.learned, weights.preference.to(self._evaluator.device))

    def loss(self, objective: str, loss: str, items: Sequence[int], *, weight: float | None = None, target_scale: float = 1.0) -> LossValue:
        """Take one loss of the model that was put, and gather `weight` times its gradient.

        Raises:
            ConfigError: the objective cannot give this loss.
            CandidateError: the loss is not finite.
        """
        if loss not in self.losses(objective):
            raise ConfigError(f"objective {objective!r} has no loss {loss!r}; {nearest(loss, self.losses(objective))}")
        with self._threads():
            if loss == "distance":
                found = LossValue(self._distance(objective, weight, target_scale))
            else:
                found = self._model_loss(self._objectives[objective], loss, items, weight)
        if not np.isfinite(found.value):
            raise CandidateError(
                f"objective {objective!r}: the loss {loss} is {found.value}, expected a finite number; lower the learning rate"
            )
        return found

    def pull(self, weights: Weights) -> None:
        """Carry the gathered gradient back: adds to `.grad` of the parameters that require it."""
        with self._threads():
            self._pull_coefficients(_own(weights.coefficients))
            if weights.learned is not None and weights.preference is not None:
                preference = weights.preference.to(self._evaluator.device)
                for segment in self._targets(weights.learned):
                    correction = weights.learned.delta(segment.name, preference)
                    if correction.requires_grad:
                        torch.autograd.backward(correction, self._gradient[segment.start : segment.end].view(segment.shape).to(correction))

    def recipe(self, weights: Weights) -> Recipe:
        """Return the recipe that makes these weights again."""
        plain = self._plain(weights)
        if weights.learned is None or weights.preference is None:
            return plain
        shares = dict(zip(weights.learned.objectives, weights.preference.tolist(), strict=True))
        path = "" if self._folder is None else str((self._folder / weights.learned.hash[:32]).absolute())
        return replace(plain, learned=Learned(path, weights.learned.hash, shares))

    def keep(self, learned: LearnedSet) -> None:
        """Store a learned set under its content hash; keeping it again changes nothing."""
        self._evaluator.keep(learned)
        if self._folder is not None and not (self._folder / learned.hash[:32]).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            learned.save(self._folder / learned.hash[:32])

    def _correct(self, coefficients: LearnedCoefficients, learned: LearnedSet, preference: torch.Tensor) -> None:
        """Add a learned set to the merge in the live model: in float32, and rounded once, as a recipe's is."""
        row = wide = self._evaluator.arena.rows[ROW]
        if row.dtype != torch.float32:
            wide = torch.zeros_like(row, dtype=torch.float32)
            self._materializer(coefficients)([coefficients.values()], wide[None])
        for segment in self._targets(learned):
            wide[segment.start : segment.end] += learned.delta(segment.name, preference).reshape(-1)
        self._evaluator.forget(ROW)
        if wide is not row:
            row.copy_(wide)

    def _plain(self, weights: Weights) -> Recipe:
        coefficients = _own(weights.coefficients)
        return self._make_recipe(coefficients.operator, coefficients.arguments())

    def _threads(self) -> Any:
        return computing_threads(self._evaluator.threads)

    def _targets(self, learned: LearnedSet) -> list[Any]:
        segments = {segment.name: segment for segment in self._evaluator.layout.segments}
        return [segments[name] for name in learned.targets]

    def _materializer(self, coefficients: LearnedCoefficients) -> Materializer:
        return self._evaluator.prepare(self._make_recipe(coefficients.operator, coefficients.arguments()))

    def _pull_coefficients(self, coefficients: LearnedCoefficients) -> None:
        learned = [leaf for leaf in coefficients.parameters() if leaf.requires_grad]
        if not learned:
            return
        materializer = self._materializer(coefficients)
        arguments_at = coefficients.graph(self._evaluator.device)
        outputs: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for state, runs in materializer.cells(coefficients.values()):
            arguments = arguments_at(runs[0].tensor)
            plan = coefficients.operator.lower(state, arguments)
            for run in runs:
                rows, gradient = materializer.rows[:, run.start : run.end], self._gradient[run.start : run.end].to(torch.float32)
                for output, part in _plan_gradients(plan, rows, gradient):
                    if output.requires_grad:  # a rule may use a parameter for some tensors alone
                        outputs.append(output)
                        gradients.append(part)
        torch.autograd.backward(outputs, gradients)

    def _model_loss(self, objective: Objective, loss: str, items: Sequence[int], weight: float | None) -> LossValue:
        teacher = self._teacher(objective, items) if loss == "kl" else None
        head = self._evaluator.head_of(objective)
        model = self._evaluator.arena.bind(ROW, head)
        device = self._evaluator.device
        if weight is None:
            with torch.no_grad():
                return _value(*_loss_of(objective, loss, model, items, device, teacher))
        leaves = self._leaves(head)
        try:
            value, predictions = _loss_of(objective, loss, model, items, device, teacher)
            if not value.requires_grad:
                raise ConfigError(
                    f"objective {objective.info.name!r}: its loss {loss} does not depend on the model's weights (was it computed without "
                    "gradients?), so nothing can be learned from it"
                )
            torch.autograd.backward(weight * value)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
                leaf.grad = None
        return _value(value.detach(), predictions)

    def _leaves(self, head: str | None) -> list[torch.Tensor]:
        """Make a live model's merged parameters leaves whose gradients are views of the one buffer."""
        leaves: list[torch.Tensor] = []
        for parameter, segment in self._evaluator.arena.parameters(head):
            parameter.requires_grad_(True)
            parameter.grad = self._gradient[segment.start : segment.end].view(segment.shape)
            leaves.append(parameter)
        return leaves

    def _distance(self, objective: str, weight: float | None, target_scale: float) -> float:
        """Return ||theta - target||^2 over all merged weights, with target = theta_0 + target_scale (theta_k - theta_0)."""
        expert = self.expert_of(objective)
        sources = self._evaluator.experts()
        base, theirs = sources[0], sources[1 + self.experts.index(str(expert))]
        row, total = self._evaluator.arena.rows[ROW], 0.0
        for start in range(0, len(row), chunk(row.device)):
            part = slice(start, start + chunk(row.device))
            difference = row[part].to(torch.float32) - torch.lerp(base[part], theirs[part], target_scale)
            total += float(difference.double().square().sum())
            if weight is not None:
                self._gradient[part] += (2.0 * weight * difference).to(self._gradient)
        return total

    def _teacher(self, objective: Objective, items: Sequence[int]) -> torch.Tensor | None:
        """Return the logits of the objective's expert on some items, [n, classes]; None for an objective that predicts nothing."""
        name, task, own = objective.info.name, _task_of(objective), self._evaluator
        if task is None:
            return None
        if name not in self._teachers:
            model_of = partial(expert_model, own.layout, dtype=own.dtype, device=own.device)
            self._teachers[name] = ExpertLogits(task, str(objective.info.expert), model_of)
        return self._teachers[name]("search", items, own.device).to(own.device)


def _own(coefficients: Coefficients) -> LearnedCoefficients:
    if not isinstance(coefficients, LearnedCoefficients):
        raise ConfigError(f"expected coefficients that this problem gave (`coefficients()`), got a {type(coefficients).__name__}")
    return coefficients


def _task_of(objective: Objective) -> DifferentiableTask | None:
    task = objective.task if isinstance(objective, TaskObjective) else None
    return task if isinstance(task, DifferentiableTask) else None


def _loss_of(
    objective: Objective, loss: str, model: torch.nn.Module, items: Sequence[int], device: torch.device, teacher: torch.Tensor | None
) -> tuple[torch.Tensor, Predictions | None]:
    if isinstance(objective, FunctionObjective) and objective.differentiable is not None and loss == "own":
        given = None if objective.task is None else [objective.task.items("search")[item] for item in items]
        try:
            value = objective.differentiable(model, given, device)
        except Exception as error:  # the guard around the user's function
            raise CandidateError(f"objective {objective.info.name!r}: its loss raised {type(error).__name__}: {error}") from error
        if not isinstance(value, torch.Tensor) or value.ndim:
            raise ConfigError(f"objective {objective.info.name!r}: expected a loss that is one number (a 0-d tensor), got {value!r:.80}")
        return value, None
    task = _task_of(objective)
    if task is None:
        raise ConfigError(f"objective {objective.info.name!r} has no differentiable loss")
    predictions = task.predict(model, "search", items, device)
    if loss == "cross_entropy":
        return F.cross_entropy(predictions.logits, predictions.labels), predictions
    own = F.log_softmax(predictions.logits, dim=1)
    if teacher is None:  # entropy
        return -(own.exp() * own).sum(dim=1).mean(), predictions
    return F.kl_div(own, F.log_softmax(teacher, dim=1), log_target=True, reduction="batchmean"), predictions


def _value(value: torch.Tensor, predictions: Predictions | None) -> LossValue:
    if predictions is None:
        return LossValue(float(value))
    guesses = predictions.logits.detach().argmax(dim=1)
    return LossValue(float(value), _commonest(guesses), _commonest(predictions.labels))


def _commonest(classes: torch.Tensor) -> float:
    return float(torch.unique(classes, return_counts=True)[1].max()) / len(classes)


def _plan_gradients(plan: Plan, rows: torch.Tensor, gradient: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tensors of the plan's graph, small for a linear plan, with the gradient that reaches them from weights [S]."""
    if isinstance(plan, Linear):
        yield plan.coefficients, (rows @ gradient)[None].to(plan.coefficients)
        return
    if isinstance(plan, Rational):
        yield plan.coefficients, _quotient_gradient(plan, rows, gradient)[None].to(plan.coefficients)
        return
    if isinstance(plan, Dense):
        yield plan.apply(rows)[0], gradient
        return
    own, size = plan.own(0), chunk(rows.device)
    for start in range(0, rows.shape[1], size):
        yield plan.kernel(rows[:, start : start + size], start, *own), gradient[start : start + size]


def _quotient_gradient(plan: Rational, rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return sum_s g_s (N_ks - out_s M_ks) / d_s [K], with d the divisor; what the floor holds up does not move with the coefficients."""
    total = rows.new_zeros(len(rows) // 2)
    coefficients = plan.coefficients[0].detach().to(rows.dtype)
    size = chunk(rows.device)
    for start in range(0, rows.shape[1], size):
        numerators, denominators = rows[:, start : start + size].chunk(2)
        below = coefficients @ denominators
        divisor = below.clamp(min=plan.floor)
        scaled = gradient[start : start + size] / divisor
        out = (coefficients @ numerators) / divisor
        # The difference of the two comes first: it is small where the experts differ by little.
        total += (numerators - denominators * (out * (below > plan.floor))) @ scaled
    return total
