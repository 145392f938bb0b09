"""Run files and merge files: what they may say, and the problem and strategy they describe.

Paths of inputs (models, data, functions, recipes) are relative to the run file; `out` is relative to the working directory.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mergeopt.errors import ConfigError, UserError, nearest
from mergeopt.evaluation.racing import Racing
from mergeopt.memory import parse_size
from mergeopt.registry import load, names
from mergeopt.strategy import Strategy

__all__ = [
    "Budgeted",
    "Memory",
    "Merge",
    "Model",
    "RunFile",
    "build_strategy",
    "call",
    "named",
    "option_names",
    "read_yaml",
    "strategy_from",
]


LEAST = 1 << 20
"""Bytes below which a size is taken for one whose unit was forgotten."""
ALTERNATIVES = {
    "str": "a name, or a mapping with the key 'name'",
    "dict[str,any]": "a name, or a mapping with the key 'name'",
    "dict[str,str]": "a mapping of names to paths, or a list of paths",
    "list[str]": "a mapping of names to paths, or a list of paths",
}
"""What pydantic calls the alternatives of a key, and how they are told to a user."""
WANTED = {
    "dict_type": "a mapping",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
    "tuple_type": "a list",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and int in (kind, *get_args(kind)):
            raise ValueError(f"expected a whole number, got {value}")
        return value


class Model(_Section):
    """Section `model`: whose files to hand on where sources disagree, and the element type of the merged weights."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tokenizer: str | None = None
    processor: str | None = None
    chat_template: str | None = None
    generation: str | None = None

    @property
    def carry(self) -> dict[str, str]:
        """Kind -> source, as far as the user said."""
        return {kind: name for kind, name in self if kind != "dtype" and name is not None}


class Statistics(_Section):
    """Section `merge.statistics`: how experts are measured before a merge, by operators that need it."""

    items: int = Field(default=256, gt=0)
    seed: int = Field(default=0, ge=0)
    labels: Literal["model", "argmax", "data"] = "model"
    split: str | None = None


class Merge(_Section):
    """Section `merge`: the rule and what of it varies."""

    operator: str = "task_arithmetic"
    variant: str = "paper"
    groups: Any = "model"
    exclude: tuple[str, ...] = ()
    heads: str = "shared"
    head_tensors: tuple[str, ...] = ()
    parameters: dict[str, Any] | None = None
    statistics: Statistics = Statistics()


class Memory(_Section):
    """Section `memory`: how much a search takes, what it keeps between candidates, and how they are scored where they do not fit."""

    limit: int | None = None
    stack: Literal["auto", "memory", "file"] = "auto"
    folder: str | None = None
    prefixes: int | None = None
    scoring: Literal["candidates", "layers"] = "candidates"

    @field_validator("limit", "prefixes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> int | None:
        try:
            size = None if value is None else parse_size(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if size is not None and size < LEAST:
            raise ValueError(f"expected 1MiB or more, got {value!r}, which is {size} bytes; write the unit, such as {value}GiB or 500MB")
        return size

    @model_validator(mode="after")
    def _folder_is_used(self) -> Memory:
        if self.folder is not None and self.stack == "memory":
            raise ValueError("folder: nothing is kept in a file with stack: memory; leave one of the two out")
        return self


class Budgeted(_Section):
    """Section `budget`: what the search may spend."""

    evaluations: int = Field(gt=0)
    gradient_steps: int | None = Field(default=None, ge=0)


SECTIONS = (Model, Merge, Statistics, Memory, Budgeted)


class RunFile(_Section):
    """A run file. A merge file is its first part (base, experts, model, merge) with numbers in place of ranges."""

    base: str | None = None
    experts: dict[str, str] | list[str] | None = None
    problem: str | dict[str, Any] | None = None
    model: Model = Model()
    merge: Merge = Merge()
    objectives: list[str | dict[str, Any]] | None = None
    strategy: str | dict[str, Any] = "nsga2"
    budget: Budgeted | None = None
    init: list[str] = []
    baselines: list[str] = ["base", "experts", "uniform"]
    batch: int = Field(default=8, gt=0)
    racing: Any = None
    recall: bool = True
    memory: Memory = Memory()
    threads: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    out: str | None = None

    @field_validator("budget", mode="before")
    @classmethod
    def _plain_budget(cls, value: Any) -> Any:
        if isinstance(value, bool) or not (value is None or isinstance(value, int | dict | Budgeted)):
            raise ValueError(f"expected a whole number of evaluations, or {{evaluations: N, gradient_steps: M}}, got {value!r}")
        return {"evaluations": value} if isinstance(value, int) else value

    @field_validator("experts", mode="before")
    @classmethod
    def _unique_experts(cls, value: Any) -> Any:
        if isinstance(value, dict | list) and not value:
            raise ValueError("expected one or more experts, got none")
        return value

    @field_validator("racing")
    @classmethod
    def _known_rule(cls, value: Any) -> Any:
        try:
            racing = Racing.of(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("racing: ")) from error
        return None if racing is None else racing.describe()

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, value: list[str]) -> list[str]:
        known = ["base", "experts", "uniform", "random"]
        for name in value:
            if name not in known:
                raise ValueError(f"unknown baseline {name!r}; {nearest(name, known)}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> RunFile:
        if self.problem is not None and (self.base is not None or self.experts is not None):
            raise ValueError("problem: stands in place of base and experts; give one or the other")
        if self.problem is None and (self.base is None or self.experts is None):
            raise ValueError("expected base and experts (or problem: NAME)")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunFile:
        """Read a run file.

        Args:
            path: of the YAML file.
            overrides: values that take the place of the file's, None values left out.

        Raises:
            ConfigError: the file is missing, is no YAML, or says something it may not; the message names file and key.
        """
        data = read_yaml(path)
        given = {key: value for key, value in (overrides or {}).items() if value is not None}
        if isinstance(given.get("budget"), int) and isinstance(data.get("budget"), dict):
            given["budget"] = {**data["budget"], "evaluations": given["budget"]}  # gradient steps stay what the file says
        data |= given
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "run file") -> RunFile:
        """Check data as a run file's.

        Raises:
            ConfigError: a key is unknown or a value is of another kind than expected.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError("\n".join(f"{where}: {_explain(detail)}" for detail in _first_per_key(error))) from error


def build_strategy(run_file: RunFile) -> Strategy:
    """Return the strategy that a run file names, with its options.

    Raises:
        PluginError: no strategy has that name.
        ConfigError: the strategy has no such option.
    """
    return strategy_from(run_file.strategy)


def strategy_from(spec: str | Mapping[str, Any]) -> Strategy:
    """Return a strategy of a name, or of a mapping with `name` and options.

    Raises:
        PluginError: no strategy has that name.
        ConfigError: the strategy has no such option.
    """
    name, options = named(spec, "strategy")
    factory = load("strategies", name)
    family = () if name in names("strategies") else (name.partition(":")[2],)
    strategy: Strategy = call(factory, options, f"strategy {name!r}", *family)
    return strategy


def named(spec: str | Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """Split `NAME` or `{name: NAME, option: value}` into name and options.

    Raises:
        ConfigError: there is no name.
    """
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec.get("name"), str):
        raise ConfigError(f"{what}: expected a name or a mapping with the key 'name', got {dict(spec)}")
    return spec["name"], {key: value for key, value in spec.items() if key != "name"}


def call(factory: Callable[..., Any], options: Mapping[str, Any], what: str, *positional: Any) -> Any:
    """Call a plug-in's factory with options from a file.

    Raises:
        ConfigError: the factory has no such option, or needs one that is not given.
    """
    known, needed = option_names(factory), option_names(factory, needed=True)
    for key in options:
        if known is not None and key not in known:
            raise ConfigError(f"{what} has no option {key!r}; {nearest(str(key), known)}")
    for name in needed or ():
        if name not in options:
            raise ConfigError(f"{what} needs {name!r}; its options are {', '.join(known or needed or ())}")
    try:
        return factory(*positional, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # the guard around plug-ins, which may trust the types of what they are given
        if not options:
            raise
        raise ConfigError(f"{what} cannot use its options {dict(options)}: {error}") from error


def option_names(factory: Callable[..., Any], *, needed: bool = False) -> list[str] | None:
    """Return the options that a plug-in's factory takes, None where it takes any; or those that it cannot do without."""
    parameters = inspect.signature(factory).parameters.values()
    options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if needed:
        return [p.name for p in options if p.default is inspect.Parameter.empty]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return None if takes_any else [p.name for p in options]


class _UniqueLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML readers else let pass with the last one winning."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", own[index].start_mark)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 takes 1e-3 for text, since it has no point; here it is the number that everyone means.
_UniqueLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: it is missing, no YAML, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text file"
        raise ConfigError(f"cannot read {path}: {reason}") from error
    try:
        data = yaml.load(text, Loader=_UniqueLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {getattr(error, 'problem', None) or error}") from error
    except (ValueError, RecursionError) as error:  # a date that is none, say
        raise ConfigError(f"{path} holds a value that cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def _first_per_key(error: ValidationError) -> list[Any]:
    """Return one detail per key; an unknown name within it comes first, since what is missing is often what was misspelt."""
    seen: dict[Any, Any] = {}
    for detail in sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden"):
        seen.setdefault(detail["loc"][:1], detail)
    return list(seen.values())


def _explain(detail: Any) -> str:
    location = [str(part) for part in detail["loc"] if part not in ALTERNATIVES]
    key = ".".join(location) or "the file"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(location[-1], _keys(location[:-1]))}"
    if detail["type"] == "value_error":
        return f"{key}: {detail['ctx']['error']}" if location else str(detail["ctx"]["error"])
    wanted = ALTERNATIVES.get(detail["loc"][-1]) or WANTED.get(detail["type"])
    if wanted:
        return f"{key}: expected {wanted}, got {detail['input']!r}"
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"


def _keys(location: Sequence[str]) -> list[str]:
    section: Any = RunFile
    for part in location:
        annotation = section.model_fields[part].annotation
        section = next(
            (kind for kind in SECTIONS if kind is annotation or kind.__name__ in str(annotation)),
            RunFile,
        )
    return list(section.model_fields)
