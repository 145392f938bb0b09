"""The options of Pareto-set learning, checked, with what a preset says where the user says nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeopt.errors import ConfigError
from mergeopt.learned import FEATURES
from mergeopt_strategies.learner_options import choice, number, whole
from mergeopt_strategies.scalarizers import SCALARIZERS

__all__ = ["PRESETS", "ParetoOptions"]

NAME = "pareto-set"
STARTS = ("zero", "hooi")
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mergeopt": {"rank": 16, "scalarizer": "linear", "target_scale": 1.0, "decay": True},
    "paper": {"rank": 4, "scalarizer": "stch", "start": "zero", "weight": 0.3, "decay": False},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoOptions:
    """The options of `mergeopt_strategies.pareto_set.ParetoSet`, which documents them; None where only the problem decides."""

    preset: str
    rank: int
    targets: str
    phi: str
    loss: str | Mapping[str, str] | None
    scalarizer: str
    smoothing: float
    normalise: bool | None
    alpha: float
    preferences_per_step: int
    batch: int
    learning_rate: float
    coefficient_rate: float | None
    weight: float | None
    target_scale: float | None
    start: str | None
    decay: bool
    points: int

    @classmethod
    def of(cls, preset: str, given: Mapping[str, Any]) -> ParetoOptions:
        """Return options, those given as None taken from the preset.

        Raises:
            ConfigError: an option is not what it must be.
        """
        said = PRESETS[choice(NAME, "preset", preset, PRESETS)]
        filled: dict[str, Any] = {name: said.get(name) if value is None else value for name, value in given.items()}
        options = cls(preset=preset, **filled)
        options._check()
        return options

    def _check(self) -> None:
        for name, known in (("phi", FEATURES), ("scalarizer", SCALARIZERS)):
            choice(NAME, name, getattr(self, name), known)
        if self.start is not None:
            choice(NAME, "start", self.start, STARTS)
        for name in ("rank", "preferences_per_step", "batch", "points"):
            whole(NAME, name, getattr(self, name), 1)
        for name in ("smoothing", "alpha", "learning_rate"):
            number(NAME, name, getattr(self, name), above=0.0)
        for name in ("coefficient_rate", "target_scale"):
            if getattr(self, name) is not None:
                number(NAME, name, getattr(self, name), least=0.0)
        if self.weight is not None:
            number(NAME, "weight", self.weight)
        for name in ("normalise", "decay"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(f"{NAME}: expected option {name!r} to be true or false, got {getattr(self, name)!r}")
        if self.loss is not None and not isinstance(self.loss, str | Mapping):
            raise ConfigError(f"{NAME}: expected option 'loss' to be a name, or names by objective, got {self.loss!r}")
        try:
            re.compile(self.targets)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{NAME}: option 'targets' is no regular expression: {self.targets!r} ({error})") from error
