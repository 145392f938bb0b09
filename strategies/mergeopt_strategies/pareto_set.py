"""Pareto-set learning: one low-rank structure that answers any preference among objectives with a merged model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.differentiable import Coefficients, Weights
from mergeopt.errors import ConfigError, StoreError
from mergeopt.evaluation.threads import computing_threads, pick_threads
from mergeopt.genomes.preferences import spread_preferences
from mergeopt.learned import LearnedSet
from mergeopt.problem import ProblemInfo
from mergeopt.strategy import Ask, AskState, Budget, Candidate, Result, State, StrategyInfo
from mergeopt_strategies.adam import Adam, cosine
from mergeopt_strategies.batches import Batches
from mergeopt_strategies.collapse import CollapseWatch
from mergeopt_strategies.coverage import coverage_warning, misplaced_share
from mergeopt_strategies.learner_options import chosen_losses, gradient_steps, gradients
from mergeopt_strategies.pareto_options import NAME, ParetoOptions
from mergeopt_strategies.pareto_start import experts_of, fill_with_tucker, no_correction, target_shapes
from mergeopt_strategies.preferences import draw_preference, edge_paths
from mergeopt_strategies.ranges import Ranges
from mergeopt_strategies.scalarizers import gradient_weights

__all__ = ["ParetoSet"]

Vector = npt.NDArray[np.float64]
SLICE = 1.0  # seconds of learning per ask
COEFFICIENT_RATE = 1e-3  # that of AdaMerging
REFRESHES = 10  # of the ranges, while learning
PROBE = 4  # batches of items that ranges and coverage are measured on


class ParetoSet:
    """Learns W(gamma) = W~ + A (sum_f phi_f(gamma) G_f) B^T (eq. 1 of `mergeopt.learned`) for all preferences gamma at once.

    Every step draws preferences, makes their weights, takes one objective's loss and gradient after the other, weighs them by a
    scalarization, and moves A, B, G (and the coefficients of the merge W~) with Adam. After the last step the learned set is kept, and its
    answers to evenly spread preferences are proposed. Where every loss is `distance` (no data), the scalarizer is linear and `start` is
    `hooi`, the start is already the answer, and the budget may have `gradient_steps: 0`.

    Source: Pareto Merging (Chen and Kwok, arXiv 2408.12105, ICML 2025), reimplemented from the published description: its form (eq. 1,
    smooth Chebyshev scalarization, a preference per step) is the paper's; no official code exists, and every default below is ours.

    Args:
        preset: where an option is not given. `mergeopt`: linear scalarizer, start from the experts, weights 1/K, decaying rates.
            `paper`: scalarizer stch, start zero, weights 0.3, constant rates, the loss `entropy` where an objective has it, and `distance`
            to theta_0 + K 0.3 (theta_k - theta_0). The other values are the same for both.
        rank: r, at most the smaller side of a weight (ours: 16; on digits 4 is too little to start from the experts; 4 in `paper`).
        targets: regular expression over stored names; the matrices it is found in are corrected (ours: all; `^(?!.*embed)` leaves
            embeddings out).
        phi: features of the preference, `linear` (the paper's), `quadratic` or `mlp` (both ours), see `mergeopt.learned.Features`.
        loss: a name for all objectives or names by objective, of `mergeopt.differentiable.LOSSES`; None for each objective's default.
        scalarizer: `linear`, `chebyshev` or `stch`. Linear is the best on convex fronts and reaches only the ends of concave ones with
            `phi: mlp`; stch reaches everywhere (measured on quadratics and VLMOP2).
        smoothing: mu of stch, on normalised losses (ours: 0.01).
        normalise: whether losses are scaled by running estimates of their ideal and nadir (ours): of the experts and the merge at first,
            then of the learned set at one-hot preferences. None: yes, but for distances with the linear scalarizer.
        alpha: of the symmetric Dirichlet distribution of preferences (ours: 1, uniform).
        preferences_per_step: preferences whose gradients are averaged for one step of Adam (the paper's: 1, also the best for a given
            number of gradients on quadratics); each counts as one gradient step.
        batch: items per objective and preference (ours: 16).
        learning_rate: of A, B, G and the features (ours: 1e-3; small models bear 1e-2).
        coefficient_rate: of the merge's coefficients, whose per-expert values are kept >= 0; 0 freezes them. None: 1e-3 (AdaMerging's),
            or frozen where every loss is a distance.
        weight: where the coefficients' weights start.
        target_scale: s of the targets theta_0 + s (theta_k - theta_0) of the loss `distance` and of the start.
        start: `zero`: no correction; `hooi`: the one nearest to the experts (ours; every objective must name its expert, and there is no
            training in it). None: `hooi` where it can be had.
        decay: whether rates fall to zero along a cosine.
        points: preferences whose models are proposed at the end, at most as many as the budget has evaluations (ours: 20).

    Raises:
        ConfigError: an option is not what it must be.
    """

    def __init__(
        self,
        *,
        preset: str = "mergeopt",
        rank: int | None = None,
        targets: str = ".*",
        phi: str = "linear",
        loss: str | Mapping[str, str] | None = None,
        scalarizer: str | None = None,
        smoothing: float = 0.01,
        normalise: bool | None = None,
        alpha: float = 1.0,
        preferences_per_step: int = 1,
        batch: int = 16,
        learning_rate: float = 1e-3,
        coefficient_rate: float | None = None,
        weight: float | None = None,
        target_scale: float | None = None,
        start: str | None = None,
        decay: bool | None = None,
        points: int = 20,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "preset")}  # as the options are called
        self._options = ParetoOptions.of(preset, given)
        self.info = StrategyInfo(
            name=NAME, version=f"1 (torch {version('torch')})", min_objectives=2, needs_budget=True, needs=("gradients",)
        )

    @property
    def items(self) -> int:
        """Items per objective and step."""
        return self._options.batch

    def setup(self, problem: ProblemInfo, *, seed: int, budget: Budget, batch: int) -> None:
        """Get ready for a problem.

        Args:
            problem: what to learn, with its gradients.
            seed: of starting matrices, preferences and batches, >= 0.
            budget: both of its numbers count.
            batch: candidates of an `ask` that names no number.

        Raises:
            ConfigError: there are too few objectives, no gradients, no gradient steps, no matrix to correct, or a loss that an objective
                cannot give.
        """
        options = self._options
        self._problem = gradients(NAME, problem, self.info.min_objectives)
        self._losses = chosen_losses(NAME, self._problem, options.loss, "entropy" if options.preset == "paper" else None)
        self._names = self._problem.objectives
        self._distances = set(self._losses.values()) == {"distance"}
        self._normalise = not (self._distances and options.scalarizer == "linear") if options.normalise is None else options.normalise
        self._experts = self._starting_experts()
        self._total = gradient_steps(NAME, budget)
        if self._total == 0 and not (self._distances and options.scalarizer == "linear" and self._experts):
            raise ConfigError(
                f"{NAME}: without gradient steps it can only start from the experts (loss: distance, scalarizer: linear, start: hooi); "
                "give the budget gradient_steps: 300, say"
            )
        self._seed, self._batch = seed, batch
        self._threads = pick_threads(None, sum(math.prod(shape) for shape in self._problem.shapes.values()))
        self._coefficients, self._learned = self._no_correction()
        self._optimizers = self._make_optimizers()
        self._preferences = np.random.default_rng([seed, 1])
        items = [0 if self._losses[name] == "distance" else self._problem.items(name) for name in self._names]
        self._batches = [Batches(count, options.batch, [seed, 2, i]) for i, count in enumerate(items)]
        self._probes = [_probe(count, options.batch, [seed, 3, i]) for i, count in enumerate(items)]
        self._ranges = Ranges(len(self._names))
        self._watches = [CollapseWatch(name) for name in self._names]
        self._answers = list(spread_preferences(len(self._names), min(options.points, budget.evaluations)))
        self._begun, self._taken, self._proposed = False, 0, 0
        self._said: list[str] = []
        self._untold: list[str] = []
        self._kept: LearnedSet | None = None

    def ask(self, n: int | None = None) -> Ask:
        """Learn for about a second; when everything is learned, propose the answers to n preferences (None: one batch)."""
        with computing_threads(self._threads):
            return self._ask(self._batch if n is None else n)

    def tell(self, results: Sequence[Result]) -> None:
        """Take note of nothing."""

    def state(self) -> State:
        """Return parameters, Adam's moments, the random streams, the running estimates, and what was said and proposed."""
        arrays = {name: array for i, adam in enumerate(self._optimizers) for name, array in adam.arrays(f"adam/{i}").items()}
        return arrays | {
            "strategy": NAME,
            "taken": self._taken,
            "proposed": self._proposed,
            "begun": self._begun,
            "said": list(self._said),
            "untold": list(self._untold),
            "preferences": self._preferences.bit_generator.state,
            "batches": [batches.state() for batches in self._batches],
            "ranges": self._ranges.state(),
            "watches": [watch.state() for watch in self._watches],
            **{f"frozen/{i}": p.detach().numpy().copy() for i, p in enumerate(self._coefficients.parameters())},
        }

    def load_state(self, state: State) -> None:
        """Go on from a state.

        Raises:
            StoreError: it is none of this strategy with these options.
        """
        try:
            if state["strategy"] != NAME:
                raise ValueError(f"it is one of {state['strategy']!r}")
            for i, adam in enumerate(self._optimizers):
                adam.load(f"adam/{i}", state)
            with torch.no_grad():
                for i, parameter in enumerate(self._coefficients.parameters()):
                    parameter.copy_(torch.from_numpy(np.array(state[f"frozen/{i}"])))
            self._preferences.bit_generator.state = state["preferences"]
            for batches, saved in zip(self._batches, state["batches"], strict=True):
                batches.load(saved)
            self._ranges.load(state["ranges"])
            for watch, saved in zip(self._watches, state["watches"], strict=True):
                watch.load(saved)
            self._taken, self._proposed, self._begun = int(state["taken"]), int(state["proposed"]), bool(state["begun"])
            self._said, self._untold, self._kept = list(state["said"]), list(state["untold"]), None
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(f"{NAME}: the stored state is not one of this search: {type(error).__name__}: {error}") from error

    def _ask(self, n: int) -> Ask:
        if not self._begun:
            self._begin()
        if self._taken < self._total:
            before, until = self._taken, time.monotonic() + SLICE
            while self._taken < self._total:
                self._step()
                if time.monotonic() >= until:
                    break
            return Ask((), AskState.LEARNING, self._taken - before, self._news())
        learned = self._kept or self._finish()
        wanted = self._answers[self._proposed : self._proposed + n]
        self._proposed += len(wanted)
        return Ask(tuple(self._answer(learned, g) for g in wanted), AskState.READY if wanted else AskState.DONE, 0, self._news())

    def _starting_experts(self) -> list[str] | None:
        """Return the experts to start from, one per objective; None to start from nothing."""
        if self._options.start == "zero":
            return None
        experts = experts_of(self._problem)
        if experts is None and self._options.start == "hooi":
            lacking = next(name for name in self._names if self._problem.expert_of(name) is None)
            raise ConfigError(
                f"{NAME}: start: hooi starts from the objectives' experts, but {lacking!r} names none; give it one, or start: zero"
            )
        return experts

    def _no_correction(self) -> tuple[Coefficients, LearnedSet]:
        options, count = self._options, len(self._problem.experts)
        coefficients = self._problem.coefficients(weight=1.0 / count if options.weight is None else options.weight)
        shapes = target_shapes(self._problem, options.targets)
        return coefficients, no_correction(self._names, shapes, options.rank, options.phi, np.random.default_rng([self._seed, 0]))

    def _make_optimizers(self) -> list[Adam]:
        rate = self._options.coefficient_rate
        rate = (0.0 if self._distances else COEFFICIENT_RATE) if rate is None else rate
        optimizers = [Adam(self._learned.parameters(), self._options.learning_rate)]
        if rate > 0.0:
            return [*optimizers, Adam(self._coefficients.parameters(), rate)]
        for parameter in self._coefficients.parameters():
            parameter.requires_grad_(False)
        return optimizers

    @property
    def _target_scale(self) -> float:
        """The paper's targets make task arithmetic the best answer to equal preferences: theta_0 + K lambda (theta_k - theta_0)."""
        if self._options.target_scale is not None:
            return self._options.target_scale
        return len(self._problem.experts) * (self._options.weight or 1.0)

    def _begin(self) -> None:
        self._begun = True
        if self._experts is not None:
            rng, scale, alpha = np.random.default_rng([self._seed, 4]), self._target_scale, self._options.alpha
            fill_with_tucker(self._learned, self._problem, self._coefficients, self._experts, target_scale=scale, alpha=alpha, rng=rng)
        if self._normalise:
            self._ranges.update(np.array([self._probe_losses(weights) for weights in self._starting_models()]))

    def _starting_models(self) -> list[Weights]:
        """Return the merge and every expert alone: between them, each objective has been seen good and bad."""
        models = [Weights(self._coefficients)]
        for place in range(len(self._problem.experts)):
            alone = self._problem.coefficients(operator="task_arithmetic", groups="model", weight=0.0)
            with torch.no_grad():
                for parameter in alone.parameters():
                    parameter[..., place] = 1.0
            models.append(Weights(alone))
        return models

    def _step(self) -> None:
        """Take one step of Adam, on the mean gradient of some preferences."""
        count = min(self._options.preferences_per_step, self._total - self._taken)
        for _ in range(count):
            gamma = draw_preference(self._preferences, len(self._names), self._options.alpha)
            self._gather(gamma, 1.0 / count)
        factor = cosine(self._taken, self._total) if self._options.decay else 1.0
        for adam in self._optimizers:
            adam.step(factor)
        with torch.no_grad():
            for parameter in self._coefficients.parameters():
                if parameter.requires_grad and parameter.ndim == 2:  # one value per expert
                    parameter.clamp_(min=0.0)
        self._coefficients.project()
        tenth, before = max(1, self._total // REFRESHES), self._taken
        self._taken += count
        if self._normalise and before // tenth != self._taken // tenth and self._taken < self._total:
            corners = np.eye(len(self._names))
            self._ranges.update(np.array([self._probe_losses(self._weights(self._learned, corner)) for corner in corners]))
        for warning in (watch.warning() for watch in self._watches):
            self._warn(warning)

    def _gather(self, gamma: Vector, share: float) -> None:
        """Gather the gradient of the scalarized losses at one preference, one objective at a time."""
        weights = self._weights(self._learned, gamma)
        self._problem.put(weights)
        items = [batches.draw() for batches in self._batches]
        normalised = np.zeros(len(gamma))
        if self._options.scalarizer != "linear":  # then the weights depend on the losses: a pass without gradients comes first
            losses = [self._problem.loss(*self._asked(k), items[k], target_scale=self._target_scale).value for k in range(len(gamma))]
            normalised = self._ranges.normalise(np.array(losses))
        factors = gradient_weights(self._options.scalarizer, normalised, gamma, self._options.smoothing) / self._ranges.spans
        for k, factor in enumerate(factors.tolist()):
            if factor == 0.0:
                continue
            value = self._problem.loss(*self._asked(k), items[k], weight=share * factor, target_scale=self._target_scale)
            if gamma[k] * len(gamma) >= 1.0:  # a model that was asked for other things may well neglect this one
                self._watches[k].note(value)
        self._problem.pull(weights)

    def _asked(self, k: int) -> tuple[str, str]:
        return self._names[k], self._losses[self._names[k]]

    def _probe_losses(self, weights: Weights) -> list[float]:
        """Return the losses of a model on the probe items, means over batches."""
        self._problem.put(weights)
        return [
            float(np.mean([self._problem.loss(*self._asked(k), items, target_scale=self._target_scale).value for items in probe]))
            for k, probe in enumerate(self._probes)
        ]

    def _finish(self) -> LearnedSet:
        """Look at the coverage, keep the learned set, and return it."""
        scalarizer = self._options.scalarizer
        walks = edge_paths(len(self._names), 21 if len(self._names) == 2 else 11)
        for i, j, path in walks if not self._said else ():  # what has collapsed needs no second warning
            losses = np.array([self._probe_losses(self._weights(self._learned, gamma)) for gamma in path])[:, [i, j]]
            self._warn(coverage_warning((self._names[i], self._names[j]), losses, self._misplaced(losses, path, [i, j]), scalarizer))
        merge = self._problem.recipe(Weights(self._coefficients)).to_json()
        self._kept = self._learned.finished(merge, self._how())
        self._problem.keep(self._kept)
        return self._kept

    def _misplaced(self, losses: Vector, path: Vector, pair: list[int]) -> float:
        if self._normalise:
            scaled = (losses - self._ranges.ideal[pair]) / self._ranges.spans[pair]
        else:
            scaled = losses / max(float(np.ptp(losses, axis=0).max()), 1e-300)
        return misplaced_share(scaled, path[:, pair], self._options.scalarizer, self._options.smoothing)

    def _how(self) -> dict[str, Any]:
        """Return how it was learned, for people."""
        options = {name: getattr(self._options, name) for name in ParetoOptions.__slots__}
        options["loss"] = dict(self._losses)
        return {
            "strategy": NAME,
            "version": self.info.version,
            "source": "arXiv 2408.12105, reimplemented from the published description; settings are ours",
            "how": "closed form (HOOI), no gradient steps" if self._total == 0 else f"{self._total} gradient steps",
            "start": "zero" if self._experts is None else "hooi",
            "options": options,
            "seed": self._seed,
            "gradient_steps": self._total,
            "ideal": self._ranges.ideal.tolist() if self._normalise else None,
            "nadir": self._ranges.nadir.tolist() if self._normalise else None,
            "versions": {package: version(package) for package in ("mergeopt", "numpy", "torch")},
            "warnings": list(self._said),
        }

    def _answer(self, learned: LearnedSet, gamma: Vector) -> Candidate:
        recipe = self._problem.recipe(self._weights(learned, gamma))
        return Candidate(recipe=recipe, meta={"preference": gamma.tolist()})

    def _weights(self, learned: LearnedSet, gamma: Vector) -> Weights:
        return Weights(self._coefficients, learned, learned.check_preference(gamma.tolist()))

    def _warn(self, warning: str | None) -> None:
        """Keep a warning for the next answer; what was said before is not repeated."""
        if warning is not None and warning not in self._said:
            self._said.append(warning)
            self._untold.append(warning)

    def _news(self) -> tuple[str, ...]:
        news, self._untold = tuple(self._untold), []
        return news


def _probe(items: int, batch: int, seed: list[int]) -> list[list[int]]:
    """Return fixed batches of items; one empty batch where there are none."""
    order = np.random.default_rng(seed).permutation(items)[: PROBE * batch].tolist()
    return [order[start : start + batch] for start in range(0, len(order), batch)] or [[]]
