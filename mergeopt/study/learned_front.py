"""What a user does with a learned set: ask it for models, put them into a live one, write them, and see the front it covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from mergeopt.errors import ConfigError
from mergeopt.evaluation.correction import corrected
from mergeopt.evaluation.device import pick_dtype
from mergeopt.evaluation.expert_statistics import recipe_statistics
from mergeopt.evaluation.materialize import stream
from mergeopt.evaluation.recipe_values import recipe_values
from mergeopt.genomes.preferences import spread_preferences
from mergeopt.learned import LearnedSet
from mergeopt.merge_problem import MergeProblem
from mergeopt.models.layout import Layout, Segment
from mergeopt.models.pool import Pool
from mergeopt.operators.find import find_operator
from mergeopt.operators.function import OperatorFactory
from mergeopt.problem import Proposal
from mergeopt.recipe import Learned, Recipe
from mergeopt.strategy import Status
from mergeopt.study.export import ExportReport, export_model, open_pool
from mergeopt.study.front import Front
from mergeopt.study.trial import Trial, proposal_key

__all__ = ["LearnedFront", "Preference"]

Preference = Mapping[str, float] | Sequence[float]
"""Share of each objective, by name or in order; only ratios count."""


class LearnedFront:
    """A learned set with the models it was learned for: any preference is a merged model, without searching again.

    Args:
        folder: of the learned set; a run of a strategy that learns keeps its sets under `learned/`.
        places: where its models lie now, by name; those it names itself by default.
        operator: of the merge that it corrects, where no installed package registers it.
        module: for bare safetensors files, what builds the module they are the weights of.

    Raises:
        RecipeError: the set is damaged, or a model has other contents than it was learned for.
        SourceError: a model is not where the set says.
    """

    def __init__(
        self,
        folder: str | Path,
        places: Mapping[str, str] | None = None,
        operator: OperatorFactory | None = None,
        module: Callable[[], torch.nn.Module] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.learned = LearnedSet.load(self.folder)
        self._merge = Recipe.from_json(self.learned.merge).relocated(places or {})
        self._rule = find_operator(operator or self._merge.operator, self._merge.variant)
        self.pool: Pool = open_pool(self._merge, module)
        self._layout = Layout(self.pool)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names, in the order of a preference's shares."""
        return self.learned.objectives

    def recipe(self, preference: Preference) -> Recipe:
        """Return the recipe of a preference's model.

        Raises:
            ConfigError: the preference is none: a NaN, a negative share, a wrong number of shares, an unknown name, nothing but zeros.
        """
        shares = self.learned.check_preference(preference).tolist()
        asked = Learned(str(self.folder), self.learned.hash, dict(zip(self.objectives, shares, strict=True)))
        return replace(self._merge, learned=asked)

    def sample(self, preference: Preference) -> dict[str, torch.Tensor]:
        """Return all tensors of a preference's model by stored name, those that are not merged included; separate heads are not.

        Raises:
            ConfigError: the preference is none.
        """
        dtype = pick_dtype(self._merge.dtype)
        if self.pool.heads:
            names = [*self.pool.coverage.merged, *self.pool.coverage.copied, *self.pool.coverage.excluded]
        else:
            names = list(self.pool.base.names)
        merged = {segment.name: tensor.to(dtype) for segment, tensor in self._tensors(preference)}
        return {name: merged[name] if name in merged else self.pool.base.read(self.pool.stored("base", name)) for name in sorted(names)}

    def apply(self, model: torch.nn.Module, preference: Preference) -> None:
        """Put a preference's weights into a live model of the same architecture, in place and in its own types.

        Raises:
            ConfigError: the preference is none, or the model lacks a tensor.
        """
        state = model.state_dict(keep_vars=True)
        wanted = {segment.live: (segment, tensor) for segment, tensor in self._tensors(preference)}
        for name, (segment, _) in wanted.items():
            if name not in state or tuple(state[name].shape) != segment.shape:
                raise ConfigError(f"the model has no {name} of shape {list(segment.shape)}; give one of the architecture that was merged")
        with torch.no_grad():
            for name, (_, tensor) in wanted.items():
                state[name].copy_(tensor)

    def export(self, preference: Preference, to: str | Path, head: str | None = None) -> ExportReport:
        """Write a preference's model as a folder and load it back.

        Args:
            preference: share of each objective.
            to: folder to write; it must not exist, or be empty.
            head: where heads are separate, whose to write, `all` for a folder each.

        Raises:
            ConfigError: the preference is none, or there is no such head.
            StoreError: the folder is taken or cannot be written.
        """
        return export_model(self.pool, self.recipe(preference), to, operator=self._rule, head=head)

    def front(self, n: int, problem: MergeProblem) -> Front:
        """Return the front of the models of n evenly spread preferences, scored on the search part.

        Args:
            n: preferences.
            problem: the one the set was learned for, or any over the same models.

        Raises:
            ConfigError: n is below one.
        """
        if n < 1:
            raise ConfigError(f"expected one or more points of the front, got {n}")
        proposals = [
            Proposal(", ".join(f"{name} {share:.2f}" for name, share in zip(self.objectives, row, strict=True)), recipe=self.recipe(row))
            for row in spread_preferences(len(self.objectives), n).tolist()
        ]
        trials = [
            Trial(
                number,
                "asked",
                proposal.name,
                None,
                None,
                proposal_key(proposal),
                Status.FAILED if evaluation.error else Status.OK,
                error=evaluation.error,
                charged=True,
                scores={"search": evaluation.scores},
            )
            for number, (proposal, evaluation) in enumerate(zip(proposals, problem.evaluate(proposals, "search"), strict=True))
        ]
        front = Front.of_trials(trials, problem.info.objectives, None)
        front.points = tuple(replace(point, recipe=proposals[point.trial].recipe) for point in front.points)
        return front

    @cached_property
    def _merged(self) -> list[tuple[Segment, torch.Tensor]]:
        """The merge that every preference corrects, float32, made once."""
        values = recipe_values(self._rule, self._merge, self._layout, {})
        statistics = recipe_statistics(self._rule, self._merge, self._layout)
        return list(stream(self._layout, self._rule, values, torch.device("cpu"), statistics=statistics))

    def _tensors(self, preference: Preference) -> list[tuple[Segment, torch.Tensor]]:
        asked = self.recipe(preference).learned
        if asked is None:
            return self._merged
        correct = corrected(self._layout, self.learned, asked)
        pairs = ((segment, tensor, correct(segment)) for segment, tensor in self._merged)
        return [(segment, tensor if correction is None else tensor + correction) for segment, tensor, correction in pairs]
