"""Merging as a problem: a pool of models, an operator, what may vary, and objectives measured on live models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mergeopt.cache import cache_folder
from mergeopt.differentiable import DifferentiableProblem
from mergeopt.errors import ConfigError, nearest
from mergeopt.evaluation.activations import activations
from mergeopt.evaluation.coefficients import LearnedCoefficients
from mergeopt.evaluation.compared_task import ComparedTask
from mergeopt.evaluation.device import pick_device, pick_dtype
from mergeopt.evaluation.differentiate import ModelGradients
from mergeopt.evaluation.evaluator import Evaluator
from mergeopt.evaluation.expert_logits import expert_model
from mergeopt.evaluation.footprint import Fit, Footprint
from mergeopt.evaluation.heats import run_heat
from mergeopt.evaluation.layer_major import LayerMajor
from mergeopt.evaluation.materialize import Materializer
from mergeopt.evaluation.measure import MeasuredExperts, Measuring
from mergeopt.evaluation.objectives import FunctionObjective, TaskObjective
from mergeopt.evaluation.out_of_memory import score_at_once, scored_at_once
from mergeopt.evaluation.race import Heat, Race
from mergeopt.evaluation.racing import Racing
from mergeopt.evaluation.recall import Recall
from mergeopt.evaluation.recipe_values import recipe_values
from mergeopt.evaluation.stack_file import check_folder
from mergeopt.evaluation.threads import pick_threads
from mergeopt.genomes.coefficients import CoefficientSpace
from mergeopt.lineage import Lineage
from mergeopt.memory import Frugality, Room, held, room, size_text
from mergeopt.models.groups import grouping
from mergeopt.models.layout import Layout
from mergeopt.models.pool import Pool
from mergeopt.operators.contract import MergeOperator
from mergeopt.operators.find import find_operator
from mergeopt.operators.function import FunctionOperator, OperatorFactory
from mergeopt.pool_recipe import Sources, make_recipe, sources_of
from mergeopt.problem import Evaluation, Members, ProblemInfo, Proposal
from mergeopt.recipe import Argument, Recipe, content_hash, groups_json
from mergeopt.task import Objective, Part, Records, Score

__all__ = ["BASELINES", "MergeMaterials", "MergeProblem"]

BASELINES = ("base", "experts", "uniform")
log = logging.getLogger(__name__)

Scoring = Literal["candidates", "layers"]


@dataclass(frozen=True, slots=True)
class MergeMaterials:
    """What a problem plug-in provides in place of base, experts and objectives of a run file.

    Args:
        name: of the problem, for people.
        base: path of the base model.
        experts: paths of the experts by name, in order.
        objectives: what is measured.
    """

    name: str
    base: str
    experts: Mapping[str, str]
    objectives: Sequence[Objective]


class MergeProblem:
    """Search over the parameters of a merge operator.

    Args:
        pool: base and experts.
        operator: registered name, an operator, or a function decorated with `merge_operator`.
        objectives: what is measured, one or more.
        variant: of the operator.
        groups: default grouping of searched parameters: `model`, `layer`, `tensor`, `{"blocks": n}` or a mapping of names to regexes.
        parameters: what varies, as in a run file; None searches every parameter over its declared range.
        dtype: of the merged weights, `float32` or `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.
        batch: candidates that are asked for at a time; as many of them are made at a time as one pass over memory serves and memory holds.
        threads: that torch computes with; None for one with small models, for which more only wait for each other, else torch's choice.
        prefixes: bytes of activations kept for candidates that share their first layers; None to run every pass from end to end.
        recall: answer from memory where a recipe makes the same model as an earlier one, by its exact coefficients.
        scoring: `candidates`, each from end to end, or `layers`, all candidates together layer by layer, see `LayerMajor`: for models that
            do not fit into memory.
        name: for people.
        baselines: what every result is held against, of `base`, `experts`, `uniform`.
        measuring: how experts are measured, for an operator that needs more of them than their weights.
        frugality: how much memory may be taken, and what is kept in a file; None for what there is, and as little as can be.

    Raises:
        ConfigError: the operator, its parameters, or the objectives cannot be used as asked.
        DataError: an objective cannot be measured on this model.
    """

    def __init__(
        self,
        pool: Pool,
        operator: str | MergeOperator | OperatorFactory,
        objectives: Sequence[Objective],
        *,
        variant: str = "paper",
        groups: Any = "model",
        parameters: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str = "auto",
        batch: int = 8,
        threads: int | None = None,
        prefixes: int | None = None,
        recall: bool = True,
        scoring: Scoring = "candidates",
        name: str = "merge",
        baselines: Sequence[str] = BASELINES,
        measuring: Measuring | None = None,
        frugality: Frugality | None = None,
    ) -> None:
        self.pool, self.name, self._baselines = pool, name, _known_baselines(baselines)
        self.operator = find_operator(operator, variant)
        _check_experts(self.operator, pool)
        self.coefficients = CoefficientSpace(self.operator, parameters, pool.names, pool.expert_names, groups=groups)
        self.dtype, self.device, self.batch = pick_dtype(dtype), pick_device(device), batch
        self.layout = Layout(pool)
        self.objectives = self._compared(_checked(objectives, pool))
        self.statistics = MeasuredExperts(pool.expert_names, self.objectives, measuring or Measuring())
        self.statistics.check(self.operator)
        self.threads, self.prefixes, self.scoring = pick_threads(threads, self.layout.elements), prefixes, scoring
        self._recall: Recall[dict[str, Score]] | None = Recall() if recall else None
        self._recall_partly: Recall[list[Records]] | None = Recall() if recall else None
        if scoring == "layers" and prefixes is not None:
            raise ConfigError("memory: prefixes: nothing is kept where scoring is by layers; leave one of the two out")
        if scoring == "layers" and self.operator.requires.statistics:
            raise ConfigError(f"memory: scoring: layers: operator {self.operator.name!r} measures whole experts; use scoring: candidates")
        self._scored_at_once = scored_at_once(self.objectives)
        self._candidates = batch
        self.frugality = frugality or Frugality()
        if self.frugality.folder is not None:
            check_folder(self.frugality.folder)
        self._needs: tuple[str, ...] = ()
        self._asked = batch
        if self.frugality.stack == "file" and self.device.type != "cpu":
            raise ConfigError(
                "memory: stack: a file is for searches on a CPU; use scoring: layers where base and experts do not fit on a card"
            )

    @cached_property
    def evaluator(self) -> Evaluator:
        """What makes and scores whole candidates; making it loads the models, and measures the experts where the operator needs it.

        Raises:
            ConfigError: candidates are scored layer by layer, and never whole.
        """
        self._live.prepare(self.decode(np.full(self.coefficients.space.dim, 0.5)))
        return self._live

    @cached_property
    def _live(self) -> Evaluator:
        self._check_whole()
        return Evaluator(
            self.layout,
            self.objectives,
            self._find_operator,
            dtype=self.dtype,
            device=self.device,
            batch=min(self._candidates, self.fit.candidates),
            threads=self.threads,
            prefixes=None if self.prefixes is None else self.fit.prefixes,
            folder=self.fit.folder,
        )

    @cached_property
    def _scorer(self) -> Evaluator | LayerMajor:
        if self.scoring == "candidates":
            return self.evaluator
        self.memory()  # refuses a limit that it exceeds
        return LayerMajor(
            self.layout,
            self.objectives,
            self._find_operator,
            dtype=self.dtype,
            device=self.device,
            batch=self.batch,
            threads=self.threads,
        )

    def load(self) -> None:
        """Load the models, where candidates are scored whole, and measure the experts where the operator needs it.

        Raises:
            SourceError: a model cannot be read, or holds NaN or infinities.
        """
        _ = self._scorer

    @property
    def reduced(self) -> Mapping[str, Any]:
        """What is smaller than it was meant to be since memory was short: `items` scored at a time by objective, and `candidates`."""
        now = scored_at_once(self.objectives)
        items = {name: size for name, size in now.items() if size < self._scored_at_once[name]}
        meant = min(self.batch, self.fit.candidates)
        count = min(meant, self._live.arena.candidates if "_live" in self.__dict__ else self._candidates)
        return ({"items": items} if items else {}) | ({"candidates": count} if count < meant else {})

    def expect(self, needs: Sequence[str], together: int | None = None) -> None:
        """Know, before anything is loaded, which doors to the models a strategy goes through, and how many candidates it proposes."""
        self._needs, self._asked = tuple(needs), together or self.batch
        if "members" in self._needs:
            self._asked = min(self._asked, len(self.pool.expert_names))
        if "_live" not in self.__dict__:
            self.__dict__.pop("fit", None)  # what was planned for whoever asked before

    def reduce(self, to: Mapping[str, Any]) -> None:
        """Score as another process did whose memory was short."""
        _ = self.info  # identified by what it was meant to be
        score_at_once(self.objectives, to.get("items", {}))
        self._candidates = min(self._candidates, to.get("candidates", self._candidates))

    @property
    def info(self) -> ProblemInfo:
        """The problem as data."""
        return self._info

    @cached_property
    def _info(self) -> ProblemInfo:
        objectives = tuple(objective.info for objective in self.objectives)
        return ProblemInfo(self.name, self.coefficients.space, objectives, content_hash(self._identity))

    @property
    def parts(self) -> tuple[Part, ...]:
        """`search`, and `report` when every objective holds data out."""
        held_out = all("report" in objective.parts for objective in self.objectives)
        return ("search", "report") if held_out else ("search",)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the objectives' data has to say of its own worth, each sentence once."""
        return tuple(dict.fromkeys(warning for objective in self.objectives for warning in getattr(objective, "warnings", ())))

    def decode(self, genome: npt.NDArray[np.float64]) -> Recipe:
        """Return the recipe of a genome [d]."""
        return self._recipe(self.operator, self.coefficients.decode(genome))

    def encode(self, recipe: Recipe) -> npt.NDArray[np.float64]:
        """Return the genome [d] of a recipe.

        Raises:
            ConfigError: the recipe is of another operator, other models, other statistics of them, or lies outside the space.
            RecipeError: its statistics are not there.
        """
        ours = make_recipe(self.pool, self._sources, self.operator, self._midpoint, self.dtype)
        if recipe.heads is not None:
            recipe = replace(recipe, heads=replace(recipe.heads, written=None))  # a candidate has them all
        for what in ("operator", "variant", "exclude", "dtype", "heads"):
            if getattr(recipe, what) != getattr(ours, what):
                raise ConfigError(
                    f"a starting point must be a recipe of this search: {what} is {getattr(recipe, what)!r}, here {getattr(ours, what)!r}"
                )
        if [s.hash for s in (recipe.base, *recipe.experts)] != [s.hash for s in (ours.base, *ours.experts)]:
            raise ConfigError("a starting point must be a recipe over these very models; its sources have other contents")
        self.statistics.check_same(self.operator, recipe, self.layout, self.dtype)
        return self.coefficients.encode(recipe.arguments)

    def evaluate(self, proposals: Sequence[Proposal], part: Part) -> Iterator[Evaluation]:
        """Make and score proposals in order."""
        recipes = self._recipes(proposals)
        whole = self.scoring == "candidates" and self._recall is not None
        for outcome in self.evaluator.evaluate(recipes, part, self._recall) if whole else self._scorer.evaluate(recipes, part):
            yield Evaluation(outcome.scores, outcome.error, outcome.seconds)

    def race(self, racing: Racing, *, seed: int) -> Race:
        """Return a race of this problem's candidates, with an empty archive.

        Raises:
            ConfigError: an objective cannot be raced, the rule does not fit them, or candidates are scored layer by layer.
        """
        self._check_whole()
        return Race(racing, self.objectives, seed=seed, head_of=lambda objective: self.pool.head_of(objective.info.expert))

    def run_heat(self, proposals: Sequence[Proposal], heat: Heat) -> Iterator[Evaluation]:
        """Make proposals and measure them as a heat asks."""
        for outcome in run_heat(self.evaluator, self._recipes(proposals), heat, self._recall_partly):
            yield Evaluation(outcome.scores, outcome.error, outcome.seconds, outcome.censored)

    def baselines(self) -> list[Proposal]:
        """Base, every expert (`expert:NAME`) and the uniform soup."""
        experts = self.pool.expert_names
        nothing = dict.fromkeys(experts, 0.0)
        base = [Proposal("base", recipe=self._mix("task_arithmetic", nothing))]
        single = [Proposal(f"expert:{name}", recipe=self.alone(name)) for name in experts]
        uniform = [Proposal("uniform", recipe=self._mix("linear", dict.fromkeys(experts, 1.0)))]
        found = {"base": base, "experts": single, "uniform": uniform}
        return [proposal for kind in self._baselines for proposal in found[kind]]

    def starting_points(self, kind: str) -> list[Proposal]:
        """Return starting points of a search: `experts` (each alone) or `uniform` (equal weights that add up to one).

        Raises:
            ConfigError: another kind, or the space does not hold them.
        """
        experts = self.pool.expert_names
        if kind == "uniform":
            return [Proposal("init:uniform", self.coefficients.weighted(dict.fromkeys(experts, 1.0 / len(experts))))]
        if kind == "experts":
            nothing = dict.fromkeys(experts, 0.0)
            return [Proposal(f"init:{name}", self.coefficients.weighted(nothing | {name: 1.0})) for name in experts]
        raise ConfigError(
            f"init: expected experts, uniform, a recipe file or a run folder, got {kind!r}; {nearest(kind, ['experts', 'uniform'])}"
        )

    def members(self) -> Members:
        """Return what makes recipes of members that evolved from the experts.

        Raises:
            ConfigError: there is but one expert, or candidates are scored layer by layer.
        """
        self._check_whole()
        if len(self.pool.expert_names) < 2:
            raise ConfigError(f"a population needs two or more experts, got one: {self.pool.expert_names[0]}; add experts")
        return _Members(self)

    def gradients(self, folder: Path | None) -> DifferentiableProblem:
        """Return the door to losses and their gradients; the first loss loads the models.

        Args:
            folder: where learned sets are kept, by content hash; None to keep them in memory.
        """
        self._check_whole()
        return ModelGradients(self.layout, self.objectives, lambda: self.evaluator, self._coefficients_to_learn, self._recipe, folder)

    def merged(self) -> Recipe:
        """Return this problem's merge with equal shares where its weights are searched, and defaults where anything else is.

        Raises:
            ConfigError: equal shares lie outside the searched range.
        """
        shares = dict.fromkeys(self.pool.expert_names, 1.0 / len(self.pool.expert_names))
        return self.decode(self.coefficients.weighted(shares) if self.coefficients.space.dim else np.empty(0))

    def alone(self, expert: str) -> Recipe:
        """Return the recipe of one expert as it is."""
        return self._mix("task_arithmetic", dict.fromkeys(self.pool.expert_names, 0.0) | {expert: 1.0})

    def _check_whole(self) -> None:
        if self.scoring == "layers":
            raise ConfigError(
                "memory: scoring: layers: no candidate is in memory as a whole, so there is no racing, learning by gradient or evolving of "
                "members; use scoring: candidates"
            )

    def _recipes(self, proposals: Sequence[Proposal]) -> list[Recipe]:
        return [p.recipe if p.recipe is not None else self.decode(np.asarray(p.genome)) for p in proposals]

    def _compared(self, objectives: Sequence[Objective]) -> tuple[Objective, ...]:
        """Have the objectives that compare with an expert find it here."""

        def expert(name: str) -> torch.nn.Module:
            return expert_model(self.layout, name, self.dtype, self.device)

        return tuple(one.compared(expert) if isinstance(one, TaskObjective) else one for one in objectives)

    def _coefficients_to_learn(self, operator: str | None, variant: str, groups: object, weight: float | None) -> LearnedCoefficients:
        rule = self.operator if operator is None else find_operator(operator, variant)
        experts = self.pool.expert_names
        if operator is None:
            arguments, learned = self._midpoint, self.coefficients.learnable()
        else:
            arguments, learned = _defaults(rule, experts), ["weight"]
        begun = {
            name: _begun(argument, self.pool.names, groups, weight if name == "weight" else None, experts) if name in learned else argument
            for name, argument in arguments.items()
        }
        return LearnedCoefficients(rule, recipe_values(rule, self._recipe(rule, begun), self.layout, {}), learned, experts)

    def provenance(self) -> Mapping[str, Any]:
        """What determines the scores (content hashes of models and data, operator, space), where the models are, and how they are run."""
        base, experts = self._sources
        paths = {source.name: source.path for source in (base, *experts)}
        return {**self._identity, "paths": paths, "evaluator": (self._live if self.scoring == "candidates" else self._scorer).fingerprint}

    @cached_property
    def _identity(self) -> Mapping[str, Any]:
        base, experts = self._sources
        own = {"source": self.operator.source} if isinstance(self.operator, FunctionOperator) else {}
        return {
            "base": base.hash,
            "experts": {source.name: source.hash for source in experts},
            "architecture": dict(self.pool.architecture.description),
            "operator": {"name": self.operator.name, "version": self.operator.version, "variant": self.operator.variant, **own},
            "fixed": {name: _plain(a) for name, a in self._midpoint.items() if a.static},
            "space": self.coefficients.space.describe(),
            "groups": {name: [groups_json(a.groups), a.curve] for name, a in self._midpoint.items()},
            "exclude": list(self.pool.exclude),
            "generation": self.pool.carry.digests("generation"),
            **({"statistics": told} if (told := self.statistics.describe(self.operator)) else {}),
            "dtype": str(self.dtype).removeprefix("torch."),
            **({} if self.pool.head_mode == "shared" else {"heads": self.pool.heads_described()}),
            "objectives": [{"name": o.info.name, "direction": o.info.direction, **o.fingerprint} for o in self.objectives],
        }

    def memory(self) -> Mapping[str, int]:
        """Predicted bytes of the weights that are in memory at once when most are, by what they are; activations come on top.

        Raises:
            ConfigError: they exceed the limit that the user gave, however few are in memory.
        """
        if self.scoring == "layers":
            needed = LayerMajor.needs(self.layout, self.dtype, self.batch)
            parts = {"candidates": needed, "temporary": Materializer.preparing(self.layout, self._footprint.rows)}
            self._check_limit(parts, "ask for fewer candidates at a time (batch)")
            return parts
        return self._footprint.peak(self.fit.candidates, self.fit.folder, self.fit.prefixes)

    def activations(self, learned: int | None = None) -> int | None:
        """Predicted bytes that scoring takes besides weights, found out by one batch without them; None where the system does not tell.

        Args:
            learned: items per objective and step of a strategy that learns by gradient, None for one that does not.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "threads": self.threads}
        return activations(self.layout, self.objectives, learned=learned, **options)

    @property
    def room(self) -> Room:
        """The memory there is."""
        return room(self.device, self.frugality.limit)

    @cached_property
    def fit(self) -> Fit:
        """How many candidates are in memory, and whether base and experts are; found once, before anything is loaded.

        Raises:
            ConfigError: not even one candidate fits into the limit that the user gave.
        """
        frugality = self.frugality
        if self.device.type != "cpu" and frugality.stack != "file":
            frugality = replace(frugality, stack="memory")
        most = min(self.batch, max(self._asked, len(self.baselines())))
        there = self.room
        fit = self._footprint.fit(there, most, folder=frugality.folder or cache_folder() / "stacks", stack=frugality.stack)
        least = self._footprint.peak(fit.candidates, fit.folder)
        self._check_limit(
            least,
            *(["keep base and experts in a file (stack: file)"] if self.device.type == "cpu" and frugality.stack == "memory" else []),
            "score layer by layer (scoring: layers)",
        )
        if sum(least.values()) > there.bytes:
            needed, free = size_text(sum(least.values())), size_text(there.bytes)
            log.warning("weights take %s, and only %s are to be had (%s): memory may run out", needed, free, there.bound)
        if fit.folder is not None and frugality.stack == "auto":
            log.info("base and experts do not fit into memory (%s): they are kept in a file in %s", there.bound, fit.folder)
        if self.prefixes is not None and fit.prefixes < self.prefixes:
            log.info("memory: prefixes: %s are kept at most (%s)", size_text(fit.prefixes), there.bound)
        return fit

    def _check_limit(self, parts: Mapping[str, int], *ways: str) -> None:
        """Refuse a limit of the user's that a plan exceeds, activations left aside. Free memory may grow, and refuses nothing.

        Args:
            parts: of the smallest plan, in bytes, by what they are.
            ways: to a smaller one, besides a higher limit.
        """
        limit, own, needed = self.frugality.limit, held(self.device), sum(parts.values())
        if limit is None or own + needed <= limit:
            return
        details = ", ".join(f"{what} {size_text(count)}" for what, count in parts.items() if count)
        raise ConfigError(
            f"memory: limit: {size_text(limit)} is too little: this process holds {size_text(own)} already, and weights take at least "
            f"{size_text(needed)} more ({details}); raise it above {size_text(own + needed)}, beside which a batch needs room, or "
            + " or ".join(ways)
        )

    @property
    def _footprint(self) -> Footprint:
        fixed = {name: None for name, argument in self._midpoint.items() if argument.static}
        experts, as_they_are = len(self.pool.expert_names), self.operator.expert_rows is not None
        return Footprint(
            self.layout,
            experts + 1 if as_they_are else self.operator.rows(fixed, experts),
            as_they_are,
            self.dtype,
            self.prefixes or 0,
            sum(isinstance(one, TaskObjective) and isinstance(one.task, ComparedTask) for one in self.objectives),
            any(isinstance(one, FunctionObjective) for one in self.objectives),
            "members" in self._needs,
            "gradients" in self._needs,
            self.statistics.memory(self.operator, self.layout),
        )

    @cached_property
    def _sources(self) -> Sources:
        return sources_of(self.pool)

    @cached_property
    def _midpoint(self) -> Mapping[str, Argument]:
        return self.coefficients.decode(np.full(self.coefficients.space.dim, 0.5))

    def _find_operator(self, name: str, variant: str) -> MergeOperator:
        if (name, variant) == (self.operator.name, self.operator.variant):
            return self.operator
        return find_operator(name, variant)

    def _mix(self, operator: str, weights: Mapping[str, float]) -> Recipe:
        rule = find_operator(operator, "paper")
        arguments = {
            param.name: Argument("model", None, {"model": dict(weights) if param.name == "weight" else param.default}, static=True)
            for param in rule.params
        }
        return self._recipe(rule, arguments)

    def _recipe(self, operator: MergeOperator, arguments: Mapping[str, Argument]) -> Recipe:
        measured = self.statistics.of(operator, lambda: self._live, self._sources[1], self.alone)
        return make_recipe(self.pool, self._sources, operator, arguments, self.dtype, measured)


class _Members:
    """Recipes of members that evolved from a problem's experts."""

    def __init__(self, problem: MergeProblem) -> None:
        self._problem = problem
        self.names = problem.pool.expert_names

    def merged(self, lineage: Lineage) -> Recipe:
        return replace(self._problem.merged(), lineage=_told(lineage))

    def alone(self, slot: int, lineage: Lineage) -> Recipe:
        # The other members are told too: the rows that hold them then stay what they are from one candidate to the next.
        return replace(self._problem.alone(self.names[slot]), lineage=_told(lineage))


def _told(lineage: Lineage) -> Lineage | None:
    """Return a lineage, None where it is the experts themselves, so that their recipe is that of any other merge of them."""
    return lineage if lineage.steps else None


def _defaults(operator: MergeOperator, experts: Sequence[str]) -> dict[str, Argument]:
    each = {param.name: dict.fromkeys(experts, param.default) if param.per_expert else param.default for param in operator.params}
    return {name: Argument("model", None, {"model": value}, static=True) for name, value in each.items()}


def _begun(argument: Argument, names: Sequence[str], groups: object, value: float | None, experts: Sequence[str]) -> Argument:
    """Return the argument that learning starts from: over other groups, or from another value, where these are given."""
    if groups is None and value is None and not argument.static:
        return argument
    group = grouping(argument.groups if groups is None else groups, names, curve=argument.curve if groups is None else None)
    first = next(iter(argument.values.values())) if value is None else value
    each = first if isinstance(first, Mapping) else dict.fromkeys(experts, first)
    return Argument(group.spec, group.curve, dict.fromkeys(group.knots, each), static=False)


def _check_experts(operator: MergeOperator, pool: Pool) -> None:
    count, least, most = len(pool.expert_names), operator.requires.min_experts, operator.requires.max_experts
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(f"merge: operator {operator.name!r} merges {wanted} experts, got {count}: {', '.join(pool.expert_names)}")


def _known_baselines(kinds: Sequence[str]) -> tuple[str, ...]:
    if isinstance(kinds, str):
        raise ConfigError(f"baselines: expected a list, got {kinds!r}; write [{kinds}]")
    for kind in kinds:
        if kind not in BASELINES:
            raise ConfigError(f"baselines: unknown kind {kind!r}; {nearest(str(kind), BASELINES)}")
    return tuple(kinds)


def _checked(objectives: Sequence[Objective], pool: Pool) -> tuple[Objective, ...]:
    names = [objective.info.name for objective in objectives]
    if not names:
        raise ConfigError("objectives: expected one or more, got none")
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise ConfigError(f"objectives: the name {repeated[0]!r} stands twice; names must be unique")
    for info in (objective.info for objective in objectives):
        if pool.heads and info.expert is None:
            raise ConfigError(
                f"objectives: {info.name}: heads are separate, so it needs `expert:`, the one whose head it is measured with: "
                f"{', '.join(pool.heads)}"
            )
        if info.expert is not None and info.expert not in pool.expert_names:
            known = nearest(info.expert, pool.expert_names)
            raise ConfigError(f"objectives: {info.name}: expert: no expert is called {info.expert!r}; {known}")
    return tuple(objectives)


def _plain(argument: Argument) -> dict[str, Any]:
    return {"groups": groups_json(argument.groups), "curve": argument.curve, "values": dict(argument.values)}
