"""Which pymoo algorithms can be asked and told, what each needs, and how one is made ready from plain options."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.util.ref_dirs import get_reference_directions

from mergeopt.errors import ConfigError, PluginError, nearest

__all__ = ["ALGORITHMS", "Algorithm", "check_options", "find", "start"]

DIRECTIONS = 40  # reference directions where neither `ref_dirs` nor `pop_size` says how many
OWNED = frozenset({"self", "args", "kwargs", "termination", "output", "display", "callback", "archive", "save_history", "verbose", "seed"})
OWNED_TOO = frozenset({"evaluator", "return_least_infeasible", "cmaes_verbose", "verb_log", "advance_after_initial_infill"})
ARRAYS = frozenset({"ref_dirs", "ref_points", "sampling", "x0"})


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A pymoo algorithm that works behind ask and tell.

    Args:
        name: of the class.
        module: below `pymoo.algorithms`.
        objectives: fewest and most objectives, None for any number.
        constraints: whether it ranks by constraint violation itself.
        directions: whether it wants reference directions, and whether it has a `pop_size` beside them.
        requires: a package that pymoo needs for it, or options that must be given.
    """

    name: str
    module: str
    objectives: tuple[int, int | None]
    constraints: bool = True
    directions: str = "none"  # none | sized | fixed
    package: str | None = None
    required: tuple[str, ...] = ()

    def load(self) -> Any:
        """Import the class.

        Raises:
            PluginError: it needs a package that is not installed.
        """
        if self.package is not None and find_spec(self.package) is None:
            raise PluginError(f"pymoo's {self.name} needs the package {self.package!r}, which is not installed; install it or use NSGA2")
        return getattr(importlib.import_module(f"pymoo.algorithms.{self.module}"), self.name)


MANY, ONE = (1, None), (1, 1)
SEVERAL = (2, None)
ALGORITHMS: Mapping[str, Algorithm] = {
    entry.name: entry
    for entry in (
        Algorithm("AGEMOEA", "moo.age", SEVERAL, package="numba"),
        Algorithm("AGEMOEA2", "moo.age2", SEVERAL, package="numba"),
        Algorithm("BIPOPCMAES", "soo.nonconvex.cmaes", ONE, constraints=False),
        Algorithm("BRKGA", "soo.nonconvex.brkga", ONE),
        Algorithm("CMAES", "soo.nonconvex.cmaes", ONE, constraints=False),
        Algorithm("CMOPSO", "moo.cmopso", SEVERAL),
        Algorithm("CTAEA", "moo.ctaea", SEVERAL, directions="fixed"),
        Algorithm("DE", "soo.nonconvex.de", ONE),
        Algorithm("EPPSO", "soo.nonconvex.pso_ep", ONE),
        Algorithm("ES", "soo.nonconvex.es", ONE),
        Algorithm("G3PCX", "soo.nonconvex.g3pcx", ONE),
        Algorithm("GA", "soo.nonconvex.ga", ONE),
        Algorithm("GDE3", "moo.gde3", MANY),
        Algorithm("GDE32NN", "moo.gde3", SEVERAL),
        Algorithm("GDE3MNN", "moo.gde3", MANY),
        Algorithm("GDE3PCD", "moo.gde3", MANY),
        Algorithm("ISRES", "soo.nonconvex.isres", ONE),
        Algorithm("MOEAD", "moo.moead", SEVERAL, constraints=False, directions="fixed"),
        Algorithm("NRBO", "soo.nonconvex.nrbo", ONE),
        Algorithm("NSDE", "moo.nsde", MANY),
        Algorithm("NSDER", "moo.nsder", SEVERAL, directions="sized"),
        Algorithm("NSGA2", "moo.nsga2", MANY),
        Algorithm("NSGA3", "moo.nsga3", SEVERAL, directions="sized"),
        Algorithm("NelderMead", "soo.nonconvex.nelder", ONE),
        Algorithm("NicheGA", "soo.nonconvex.ga_niching", ONE),
        Algorithm("OmniOptimizer", "moo.omni", SEVERAL),
        Algorithm("PSO", "soo.nonconvex.pso", ONE),
        Algorithm("ParallelMOEAD", "moo.moead", SEVERAL, constraints=False, directions="fixed"),
        Algorithm("PatternSearch", "soo.nonconvex.pattern", ONE),
        Algorithm("RNSGA2", "moo.rnsga2", SEVERAL, required=("ref_points",)),
        Algorithm("RNSGA3", "moo.rnsga3", SEVERAL, required=("ref_points", "pop_per_ref_point")),
        Algorithm("SMSEMOA", "moo.sms", SEVERAL),
        Algorithm("SRES", "soo.nonconvex.sres", ONE),
        Algorithm("UNSGA3", "moo.unsga3", SEVERAL, directions="sized"),
    )
}
UNUSABLE = {
    "BGA": "it searches bit strings",
    "DIRECT": "it divides boxes around points of its own, so it can neither be seeded nor start from given points",
    "DNSGA2": "it is for problems that change over time",
    "KGB": "it is for problems that change over time",
    "MOPSO_CD": "it evaluates candidates by itself",
    "Optuna": "its candidates come from Optuna",
    "PINSGA2": "it asks a person",
    "RVEA": "it must know its number of generations beforehand",
    "RandomSearch": "strategy 'random' does the same",
    "SPEA2": "it stops with an error on tied values, and its choices cannot be replayed",
    "SimpleCMAES": "CMAES does the same",
}


def find(name: str) -> Algorithm:
    """Return the algorithm of a name.

    Raises:
        PluginError: there is none, it cannot be asked and told, or a package it needs is missing.
    """
    if name in UNUSABLE:
        raise PluginError(f"pymoo's {name} cannot be used as a strategy: {UNUSABLE[name]}; {nearest(name, ALGORITHMS)}")
    if name not in ALGORITHMS:
        spelling = {known.lower(): known for known in ALGORITHMS}.get(name.lower(), name)
        raise PluginError(f"unknown pymoo algorithm {name!r}; {nearest(spelling, ALGORITHMS)}")
    ALGORITHMS[name].load()
    return ALGORITHMS[name]


def check_options(algorithm: Algorithm, options: Mapping[str, Any]) -> None:
    """Check the options of an algorithm; pymoo itself swallows unknown ones.

    Raises:
        ConfigError: an option is unknown, a required one is missing, or a size is not a usable number.
    """
    known = _option_names(algorithm)
    for name in options:
        if name not in known:
            raise ConfigError(f"pymoo:{algorithm.name}: unknown option {name!r}; {nearest(name, known)}")
    missing = [name for name in algorithm.required if name not in options]
    if missing:
        raise ConfigError(f"pymoo:{algorithm.name}: expected a value for {', '.join(missing)}, got only {sorted(options)}")
    for name, least in (("pop_size", 4), ("n_offsprings", 1)):
        value = options.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"pymoo:{algorithm.name}: expected {name} to be a whole number >= {least}, got {value!r}")


def start(algorithm: Algorithm, options: Mapping[str, Any], *, dim: int, objectives: int, seed: int) -> Any:
    """Return the pymoo algorithm, seeded and set up for the unit cube, never stopping of its own criteria.

    Args:
        algorithm: which.
        options: of its constructor.
        dim: length d of a genome.
        objectives: number of objectives m.
        seed: of all its choices, >= 0.

    Raises:
        ConfigError: pymoo refuses the options.
    """
    arguments: dict[str, Any] = {
        name: np.asarray(value) if name in ARRAYS and isinstance(value, list | tuple) else value for name, value in options.items()
    }
    if algorithm.directions != "none" and arguments.get("ref_dirs") is None:
        size = arguments.pop("pop_size", None) if algorithm.directions == "fixed" else arguments.get("pop_size")
        arguments["ref_dirs"] = _directions(algorithm, objectives, DIRECTIONS if size is None else size)
    constraints = 1 if algorithm.constraints else 0
    problem = Problem(n_var=dim, n_obj=objectives, n_ieq_constr=constraints, xl=np.zeros(dim), xu=np.ones(dim))
    try:
        # The defaults of pymoo's constructors are objects shared by all algorithms of a process; a copy has its own.
        made = copy.deepcopy(algorithm.load()(**arguments))
        made.setup(problem, termination=NoTermination(), seed=seed)
    except PluginError:
        raise
    except Exception as error:  # pymoo raises bare exceptions
        raise ConfigError(f"pymoo:{algorithm.name} refuses the options {dict(options)} for {objectives} objective(s): {error}") from error
    if algorithm.module.endswith("cmaes"):
        made.options.update(randn=_normal(np.random.default_rng([seed, 1])), seed=math.nan)
    return made


def _normal(rng: np.random.Generator) -> Any:
    """Return a normal sampler for pycma, which would otherwise seed and use numpy's global one."""
    return lambda *shape: rng.standard_normal(shape)


def _directions(algorithm: Algorithm, objectives: int, size: int) -> npt.NDArray[np.float64]:
    """Return the finest Das-Dennis directions [<= size, m] (Das and Dennis, SIAM J. Optim. 8, 1998)."""
    if size < objectives:
        raise ConfigError(f"pymoo:{algorithm.name}: expected pop_size >= {objectives}, the number of objectives, got {size}")
    partitions = 1
    while math.comb(partitions + objectives, objectives - 1) <= size:
        partitions += 1
    return np.asarray(get_reference_directions("das-dennis", objectives, n_partitions=partitions), dtype=np.float64)


def _option_names(algorithm: Algorithm) -> list[str]:
    cls = algorithm.load()
    classes = [each for each in cls.__mro__ if "__init__" in vars(each) and each is not object]
    if algorithm.module.endswith("cmaes"):  # what its parents would take goes to pycma instead, which refuses it
        classes = [each for each in classes if each.__module__ == cls.__module__]
    if algorithm.name == "DE":
        variant = importlib.import_module(cls.__module__).Variant
        classes += [each for each in variant.__mro__ if "__init__" in vars(each) and each is not object]
    names = {name for each in classes for name in inspect.signature(each.__init__).parameters}
    if algorithm.directions != "none":
        names.add("pop_size")
    return sorted(names - OWNED - OWNED_TOO)
