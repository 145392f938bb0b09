"""Run files as data: what is read, what is overridden, and what a plug-in is called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeopt.config import RunFile, read_yaml, strategy_from
from mergeopt.config.run_file import Budgeted, call, named, option_names
from mergeopt.errors import ConfigError, PluginError

PLAIN = {"problem": "digits"}


def test_what_is_not_said_has_its_documented_default() -> None:
    """A run file that names a problem alone is complete but for budget and folder."""
    run_file = RunFile.parse(PLAIN)
    assert (run_file.strategy, run_file.seed, run_file.batch, run_file.device, run_file.budget, run_file.out) == (
        "nsga2",
        0,
        8,
        "auto",
        None,
        None,
    )
    assert run_file.baselines == ["base", "experts", "uniform"]
    assert run_file.merge.groups == "model"
    assert run_file.model.carry == {}


@given(st.integers(1, 10**9))
def test_a_budget_is_a_number_or_a_section(evaluations: int) -> None:
    """`budget: N` and `budget: {evaluations: N}` say the same."""
    short, long = RunFile.parse({**PLAIN, "budget": evaluations}), RunFile.parse({**PLAIN, "budget": {"evaluations": evaluations}})
    assert short.budget == long.budget == Budgeted(evaluations=evaluations)


@given(st.one_of(st.booleans(), st.floats(), st.text(), st.lists(st.integers())))
def test_a_budget_of_another_kind_is_refused(value: Any) -> None:
    """A truth value, a fraction, a text or a list is no budget."""
    with pytest.raises(ConfigError, match="budget: expected a whole number of evaluations"):
        RunFile.parse({**PLAIN, "budget": value})


def test_a_stored_run_file_is_read_back_as_it_was() -> None:
    """What the store keeps of a run file is the same run file again."""
    given_data = {
        "base": "b",
        "experts": {"x": "e/x", "y": "e/y"},
        "merge": {"operator": "ties", "groups": {"head": "classifier", "rest": ".*"}, "exclude": ["pooler"], "parameters": {"weight": 0.3}},
        "objectives": ["a", {"name": "o", "function": "f.py:f", "direction": "minimize"}],
        "strategy": {"name": "nsga2", "pop_size": 8},
        "budget": 12,
        "model": {"tokenizer": "x"},
        "out": "runs/one",
    }
    run_file = RunFile.parse(given_data)
    assert RunFile.parse(run_file.model_dump(mode="json")) == run_file
    assert run_file.model.carry == {"tokenizer": "x"}


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500 MB", 500 * 10**6), (4 << 20, 4 << 20), (None, None)])
def test_prefixes_are_a_size(text: Any, size: int | None) -> None:
    """A size in words or bytes is so many bytes; left out, nothing is kept and candidates are scored one by one."""
    memory = RunFile.parse({**PLAIN, "memory": {"prefixes": text}}).memory
    assert (memory.prefixes, memory.scoring) == (size, "candidates")


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"prefixes": "much"}, "memory.prefixes: expected a size such as 8GiB, 500MB or a number of bytes, got 'much'"),
        ({"limit": 8}, "memory.limit: expected 1MiB or more, got 8, which is 8 bytes; write the unit, such as 8GiB"),
        ({"limit": "512kB"}, "memory.limit: expected 1MiB or more, got '512kB'"),
        ({"stack": "memory", "folder": "stacks"}, "memory: folder: nothing is kept in a file with stack: memory"),
        ({"scoring": "layer"}, "memory.scoring: "),
        ({"prefix": "1GB"}, "unknown key 'memory.prefix'"),
    ],
)
def test_what_is_wrong_with_memory_is_told(memory: Any, message: str) -> None:
    """A size that is none, another way of scoring, and an unknown key are told with their place."""
    with pytest.raises(ConfigError, match=message):
        RunFile.parse({**PLAIN, "memory": memory})


@pytest.mark.parametrize(("text", "rule"), [("off", None), ("anytime", "anytime"), ("{rule: sequential, z: 2}", "sequential")])
def test_racing_is_off_a_rule_or_a_mapping(tmp_path: Path, text: str, rule: str | None) -> None:
    """`racing` is off (which YAML reads as false), a rule's name, or a mapping; what is stored of it is read back as it was."""
    (tmp_path / "run.yaml").write_text(f"problem: digits\nracing: {text}\n")
    read = RunFile.load(tmp_path / "run.yaml")
    assert (None if read.racing is None else read.racing["rule"]) == rule
    assert RunFile.parse(read.model_dump(mode="json")) == read


def test_overrides_take_the_place_of_what_the_file_says(tmp_path: Path) -> None:
    """Given values replace the file's, None leaves them."""
    (tmp_path / "run.yaml").write_text("problem: digits\nseed: 3\nbudget: {evaluations: 7}\nout: a\n")
    run_file = RunFile.load(tmp_path / "run.yaml", {"seed": 4, "budget": 9, "out": None, "device": "cpu"})
    assert (run_file.seed, run_file.budget, run_file.out, run_file.device) == (4, Budgeted(evaluations=9), "a", "cpu")


@pytest.mark.parametrize("text", ["1e-3", "-2E+1", "1e5", "0.5", ".5", "1.5e-3", "3"])
def test_numbers_are_numbers_however_they_are_written(tmp_path: Path, text: str) -> None:
    """`1e-3` is the number that it is everywhere else, not a text."""
    (tmp_path / "a.yaml").write_text(f"a: {text}\nb: [{text}]\nc: '{text}'\n")
    data = read_yaml(tmp_path / "a.yaml")
    assert data == {"a": float(text), "b": [float(text)], "c": text}
    assert not isinstance(data["a"], str)


@pytest.mark.parametrize("text", ["e3", "1e", "1e-", "a1e3", "1e3x", "0x1e3", "2024-01-01e"])
def test_texts_that_look_a_little_like_numbers_stay_texts(tmp_path: Path, text: str) -> None:
    """Only what is a number as a whole is read as one."""
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    assert isinstance(read_yaml(tmp_path / "a.yaml")["a"], str) or text.startswith("0x")


def test_anchors_and_merges_are_read_and_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    """`<<` takes over what an anchor holds; a key of one's own counts more and is not called double."""
    (tmp_path / "a.yaml").write_text("one: &one {low: 0, high: 1}\ntwo: {<<: *one, high: 2}\n")
    assert read_yaml(tmp_path / "a.yaml")["two"] == {"low": 0, "high": 2}


def test_every_mistake_of_a_file_is_told_at_once() -> None:
    """Mistakes in several keys are told together, each on a line of its own."""
    with pytest.raises(ConfigError) as caught:
        RunFile.parse({**PLAIN, "seed": -1, "batch": "x", "merg": {}}, "my.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("my.yaml: ") for line in lines)
    assert "unknown key 'merg'; did you mean 'merge'?" in lines[0]


def test_a_plug_in_gets_its_options_and_nothing_else() -> None:
    """Options are checked against the factory's keywords; what it needs must be there; wrong types are the caller's mistake."""

    def factory(*, size: int, scale: float = 1.0) -> float:
        return [1, 2, 3][size] * scale

    def open_factory(**options: int) -> dict[str, int]:
        return options

    assert call(factory, {"size": 1, "scale": 2.0}, "it") == 4.0
    assert call(open_factory, {"anything": 3}, "it") == {"anything": 3}
    assert option_names(factory) == ["size", "scale"]
    assert option_names(factory, needed=True) == ["size"]
    assert option_names(open_factory) is None
    with pytest.raises(ConfigError, match=r"it has no option 'siz'; did you mean 'size'\?"):
        call(factory, {"siz": 1}, "it")
    with pytest.raises(ConfigError, match="it needs 'size'; its options are size, scale"):
        call(factory, {}, "it")
    with pytest.raises(ConfigError, match=r"it cannot use its options \{'size': 'x'\}"):
        call(factory, {"size": "x"}, "it")


def test_a_defect_of_a_plug_in_without_options_is_not_called_the_users() -> None:
    """What a factory without options raises is its own."""

    def broken() -> None:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        call(broken, {}, "it")


def test_a_name_or_a_mapping_with_a_name() -> None:
    """Both forms of naming a plug-in give name and options; the mapping is left as it was."""
    spec = {"name": "nsga2", "pop_size": 8}
    assert named("random", "strategy") == ("random", {})
    assert named(spec, "strategy") == ("nsga2", {"pop_size": 8})
    assert spec == {"name": "nsga2", "pop_size": 8}
    with pytest.raises(ConfigError, match="strategy: expected a name"):
        named({"pop_size": 8}, "strategy")


def test_families_of_strategies_are_reached_by_prefix() -> None:
    """`pymoo:NAME` is the algorithm of that name, with its options."""
    assert strategy_from("pymoo:NSGA3").info.name == "pymoo:NSGA3"
    assert strategy_from({"name": "random"}).info.name == "random"
    with pytest.raises(PluginError, match="unknown strategy 'pimoo:NSGA2'"):
        strategy_from("pimoo:NSGA2")


@pytest.mark.parametrize(
    ("key", "given_data"),
    [
        ("batch", {"batch": True}),
        ("threads", {"threads": True}),
        ("seed", {"seed": False}),
        ("merge.statistics.items", {"merge": {"statistics": {"items": True}}}),
        ("merge.statistics.seed", {"merge": {"statistics": {"seed": False}}}),
        ("budget.evaluations", {"budget": {"evaluations": True}}),
        ("budget.gradient_steps", {"budget": {"evaluations": 1, "gradient_steps": True}}),
    ],
)
def test_a_truth_value_is_no_number(key: str, given_data: Any) -> None:
    """Where a whole number is expected, true is not taken for 1, nor false for 0; where a truth value is, it still is one."""
    with pytest.raises(ConfigError, match=f"{key}: expected a whole number, got (True|False)"):
        RunFile.parse({**PLAIN, **given_data})
    assert RunFile.parse({**PLAIN, "recall": False}).recall is False
