"""Mistakes in a run file: a message that names them, status 2, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import Commands, listing, refused, write

NAN = float("nan")
RANGE = {"low": 0.0, "high": 1.0}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"budgets": 3}, "run.yaml: unknown key 'budgets'; did you mean 'budget'?"),
    ({"merge": {"operatr": "ties"}}, "unknown key 'merge.operatr'; did you mean 'operator'?"),
    ({"model": {"tokeniser": "base"}}, "unknown key 'model.tokeniser'; did you mean 'tokenizer'?"),
    ({"budget": {"evaluation": 3}}, "unknown key 'budget.evaluation'; did you mean 'evaluations'?"),
    ({"budget": 0}, "budget.evaluations: input should be greater than 0, got 0"),
    ({"budget": {"evaluations": -1}}, "greater than 0, got -1"),
    ({"budget": 1.5}, "budget: expected a whole number of evaluations, or {evaluations: N, gradient_steps: M}, got 1.5"),
    ({"budget": True}, "budget: expected a whole number of evaluations, or {evaluations: N, gradient_steps: M}, got True"),
    ({"budget": None}, "budget: a search needs one"),
    ({"out": None}, "out: a search needs a folder to write to"),
    ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1"),
    ({"batch": True}, "batch: expected a whole number, got True"),
    ({"memory": {"limit": 8}}, "memory.limit: expected 1MiB or more, got 8, which is 8 bytes; write the unit, such as 8GiB"),
    ({"memory": {"limit": "2MiB"}}, "memory: limit: 2.0 MiB is too little: this process holds "),
    ({"memory": {"limit": "2MiB", "scoring": "layers"}}, "memory: limit: 2.0 MiB is too little: this process holds "),
    ({"memory": {"folder": "run.yaml/stacks"}}, "run.yaml/stacks cannot be made: "),
    ({"batch": 0}, "batch: input should be greater than 0, got 0"),
    ({"strategy": 3}, "strategy: expected a name, or a mapping with the key 'name', got 3"),
    ({"strategy": {"pop_size": 8}}, "strategy: expected a name or a mapping with the key 'name'"),
    ({"strategy": "nsga22"}, "unknown strategy 'nsga22'; did you mean 'nsga2'?"),
    ({"strategy": {"name": "nsga2", "popsize": 8}}, "unknown option 'popsize'; did you mean 'pop_size'?"),
    ({"strategy": {"name": "random", "size": 8}}, "strategy 'random' has no option 'size'"),
    ({"strategy": {"name": "nsga2", "pop_size": 0}}, "expected pop_size to be a whole number >= 4, got 0"),
    ({"strategy": "pymoo:NSGA22"}, "unknown pymoo algorithm 'NSGA22'; did you mean 'NSGA2'?"),
    ({"strategy": "pymoo:GA"}, "'pymoo:GA' takes 1 to 1 objectives, the problem has 2"),
    ({"problem": "digit"}, "unknown problem 'digit'; did you mean 'digits'?"),
    ({"problem": {"name": "digits", "task": ["upright"]}}, "problem 'digits' has no option 'task'; did you mean 'tasks'?"),
    ({"problem": {"name": "digits", "tasks": ["uprigt"]}}, "digits: unknown task 'uprigt'; did you mean 'upright'?"),
    ({"problem": {"name": "digits", "tasks": 3}}, "problem 'digits' cannot use its options {'tasks': 3}"),
    ({"problem": {"name": "digits", "metric": "acuracy"}}, "unknown metric 'acuracy'; did you mean 'accuracy'?"),
    ({"base": "b"}, "problem: stands in place of base and experts; give one or the other"),
    ({"problem": None}, "expected base and experts (or problem: NAME)"),
    ({"device": "tpu"}, "device: expected auto, cpu, cuda or cuda:0, got 'tpu'"),
    ({"model": {"dtype": "int8"}}, "model.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'int8'"),
    ({"model": {"tokenizer": "upright"}}, "model: tokenizer: 'upright'"),
    ({"merge": {"operator": "tie"}}, "unknown operator 'tie'; did you mean 'ties'?"),
    ({"merge": {"operator": "ties", "variant": "papr"}}, "has no variant 'papr'; did you mean 'paper'?"),
    ({"merge": {"groups": {"a": "no_such_tensor", "rest": ".*"}}}, "groups: no tensor falls into 'a'"),
    ({"merge": {"groups": {"a": "classifier"}}}, "tensors are in no group"),
    ({"merge": {"groups": {"a": "("}}}, "groups: the pattern of 'a' is no regular expression: '('"),
    ({"merge": {"groups": "layers"}}, "groups: expected model, layer, tensor"),
    ({"merge": {"groups": {"blocks": 99}}}, "groups: expected 1 to 6 blocks"),
    ({"merge": {"exclude": ["nothing"]}}, "exclude: the pattern 'nothing' matches no tensor"),
    ({"merge": {"exclude": "classifier"}}, "merge.exclude: expected a list, got 'classifier'"),
    ({"merge": {"parameters": {"wieght": 1}}}, "has no parameter 'wieght'; did you mean 'weight'?"),
    ({"merge": {"parameters": {"weight": {"lo": 0, "high": 1}}}}, "weight: unknown key 'lo'; did you mean 'low'?"),
    ({"merge": {"parameters": {"weight": {"low": 0.5}}}}, "weight: expected low and high"),
    ({"merge": {"parameters": {"weight": {"low": 2, "high": 1}}}}, "expected finite bounds with low < high, got low = 2.0, high = 1.0"),
    ({"merge": {"parameters": {"weight": {"low": 0, "high": NAN}}}}, "expected a finite number, got nan"),
    ({"merge": {"parameters": {"weight": [1, 2, 3]}}}, "weight: expected 2 numbers, one per expert, got [1, 2, 3]"),
    ({"merge": {"parameters": {"weight": {"upright": RANGE, "turnd": 1}}}}, "weight: unknown key 'upright'"),
    ({"merge": {"parameters": {"weight": 1}}}, "one or more dimensions to search, got none"),
    ({"merge": {"operator": "ties", "parameters": {"density": {"low": 0.1, "high": 1.5}}}}, "expected a value in [0.0, 1.0], got 1.5"),
    ({"merge": {"operator": "ties", "parameters": {"density": -1}}}, "density: expected a value in [0.0, 1.0], got -1"),
    ({"baselines": ["bse"]}, "unknown baseline 'bse'; did you mean 'base'?"),
    ({"init": ["expert"]}, "init: expected experts, uniform, a recipe file or a run folder, got 'expert'; did you mean 'experts'?"),
    ({"init": ["absent.json"]}, "cannot read the recipe absent.json"),
    ({"init": ["experts"], "budget": 1}, "a budget of 1 evaluations cannot pay for 2 starting points"),
    ({"objectives": []}, "objectives: expected one or more, got none"),
    ({"objectives": ["uprigt"]}, "there is no objective 'uprigt' to refer to; did you mean 'upright'?"),
    ({"objectives": ["upright", "upright"]}, "objectives: the name 'upright' stands twice"),
    ({"objectives": [{"task": "image_classification"}]}, "objectives: each needs a name"),
    ({"objectives": [{"name": "a"}]}, "objectives: a: expected a task or a function"),
    ({"objectives": [{"name": "a", "functon": "f.py:f"}]}, "objectives: a: unknown key 'functon'; did you mean 'function'?"),
    ({"objectives": [{"name": "a", "task": "image_clasification"}]}, "unknown task 'image_clasification'; did you mean"),
    ({"objectives": [{"name": "a", "task": "image_classification", "metrc": "accuracy"}]}, "unknown key 'metrc'; did you mean 'metric'?"),
    ({"objectives": [{"name": "a", "task": "image_classification"}]}, "task 'image_classification' needs 'data'"),
    ({"objectives": [{"name": "a", "task": "image_classification", "worst": 0}]}, "worst is a key of a function"),
    ({"objectives": [{"name": "a", "task": "image_classification", "direction": "max"}]}, "direction: did you mean 'maximize'?"),
    ({"objectives": [{"name": "a", "task": "image_classification", "expert": "up"}]}, "no expert is called 'up'"),
    ({"objectives": [{"name": "a", "task": "image_classification", "constraint": {"max": NAN}}]}, "max: expected a finite number, got nan"),
    (
        {"objectives": [{"name": "a", "task": "image_classification", "constraint": {"most": 1}}]},
        "constraint: expected {min: ..}, {max: ..}",
    ),
    ({"objectives": [{"name": "a", "function": "f.py:f", "metric": "accuracy"}]}, "metric is a key of a metric on a task"),
    ({"objectives": [{"name": "a", "function": "f.py:f"}]}, "a function needs a direction: maximize or minimize"),
    ({"objectives": [{"name": "a", "function": "f.py:f", "direction": "minimize"}]}, "f.py (from 'f.py:f')"),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES, ids=[said[:60] for _, said in MISTAKES])
def test_a_mistake_is_named_and_nothing_is_written(mergeopt: Commands, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """A run file that says something it may not ends with status 2, a message that names it, and no new file."""
    write(tmp_path, **changes)
    refused(mergeopt(tmp_path, "run", "run.yaml"), said)
    assert listing(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("problem: digits\nproblem: digits\n", "run.yaml, line 2, column 1: the key 'problem' stands twice"),
        ("problem: digits\nmerge: {operator: ties, operator: linear}\n", "line 2, column 25: the key 'operator' stands twice"),
        ("problem: [\n", "run.yaml, line 2, column 1: expected the node content"),
        ("only text", "expected a mapping of keys to values, got str"),
        ("", "expected a mapping of keys to values, got NoneType"),
        ("1: 2\n", "run.yaml: 1: keys should be strings"),
        ("a: \x00", "run.yaml"),
        ("problem: digits\nseed: 2020-99-99\n", "run.yaml holds a value that cannot be read"),
        ("problem: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_what_is_no_run_file_is_refused(mergeopt: Commands, tmp_path: Path, text: str, said: str) -> None:
    """A key that stands twice and text that is no YAML mapping are refused with the place."""
    (tmp_path / "run.yaml").write_text(text)
    refused(mergeopt(tmp_path, "run", "run.yaml"), said)
    assert listing(tmp_path) == ["run.yaml"]


def test_a_file_that_is_not_there_or_no_text_is_refused(mergeopt: Commands, tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no text are refused by name."""
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    refused(mergeopt(tmp_path, "run", "absent.yaml"), "cannot read absent.yaml: No such file or directory")
    refused(mergeopt(tmp_path, "run", "."), "cannot read .: Is a directory")
    refused(mergeopt(tmp_path, "run", "bytes.yaml"), "cannot read bytes.yaml: it is no text file")
    assert listing(tmp_path) == ["bytes.yaml"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent.py:f", "function: no such file"),
        ("own.py:brigtness", "defines no 'brigtness'; did you mean 'brightness'?"),
        ("own.py", "expected 'path/to/file.py:name'"),
        ("own.py:NUMBER", "is a int, not a function"),
        ("own.py:no_arguments", "cannot be called with (model, items, device)"),
        ("broken.py:f", "importing"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(mergeopt: Commands, tmp_path: Path, spec: str, said: str) -> None:
    """A function whose file or name is missing, or that cannot be called as one, is refused before anything is scored."""
    (tmp_path / "own.py").write_text("NUMBER = 3\ndef brightness(model, items, device): return 1.0\ndef no_arguments(): return 1.0\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    write(tmp_path, objectives=["upright", {"name": "own", "function": spec, "direction": "minimize"}])
    refused(mergeopt(tmp_path, "run", "run.yaml"), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["run.yaml", "run.yaml/below", "/proc/mergeopt/run", "/sys/mergeopt"])
def test_a_folder_that_cannot_be_made_is_refused(mergeopt: Commands, tmp_path: Path, out: str) -> None:
    """A run folder in the place of a file, below a file, or where nothing can be written is refused by name."""
    write(tmp_path)
    refused(mergeopt(tmp_path, "run", "run.yaml", "--out", out), f"the run folder {out}")
    assert listing(tmp_path) == ["run.yaml"]


def test_another_runs_folder_is_refused_and_left_as_it_is(mergeopt: Commands, finished: Path, tmp_path: Path) -> None:
    """Without --resume a folder that holds a run is refused, and none of its bytes change."""
    write(tmp_path, seed=6)
    before = {name: (finished / "run" / name).read_bytes() for name in listing(finished / "run")}
    refused(mergeopt(tmp_path, "run", "run.yaml", "--out", finished / "run"), "already holds a run", "--resume", "another folder")
    assert {name: (finished / "run" / name).read_bytes() for name in listing(finished / "run")} == before
