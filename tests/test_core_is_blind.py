"""The core serves every strategy alike: it imports none, names none, and never asks which one it has before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mergeopt
from mergeopt import registry

CORE = Path(mergeopt.__file__).parent
ALLOWED = {
    "nsga2": {"config/run_file.py", "study/optimize.py"},  # what is searched with where nobody says anything
    "random": {"config/build.py", "config/run_file.py", "report/summary.py", "study/launch.py"},  # the baseline of that name
    "evolver": {"lineage.py", "evaluation/mutation.py"},  # a mutation is called so, after the code that it is the rule of
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(CORE.rglob("*.py")):
        yield file.relative_to(CORE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def words(tree: ast.Module) -> Iterator[str]:
    """Yield what code can compare or look up: text constants (docstrings left out), names, attributes and imports."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    documented = {id(n.body[0].value) for n in nodes if n.body and isinstance(n.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr != "random":  # of numpy and its generators
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def test_no_strategy_is_named_in_the_core() -> None:
    """Beyond the default of a run file and the random baseline, no registered strategy's name or class stands anywhere in the code."""
    names = set(registry.names("strategies"))
    assert {"evolver", "evolver-joint", "adamerging", "pareto-set", "nsga2", "random", "sobol"} <= names
    classes = {registry.load("strategies", name).__name__ for name in names}
    for place, tree in sources():
        for word in words(tree):
            assert word not in names or place in ALLOWED.get(word, set()), f"{place} names the strategy {word!r}"
            assert word not in classes - names, f"{place} names the strategy class {word!r}"


def test_nothing_in_the_core_asks_what_a_strategy_is() -> None:
    """`isinstance` of a strategy asks for a capability of the contract only, and its name is never compared."""
    for place, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                subject, kind = ast.unparse(node.args[0]), ast.unparse(node.args[1])
                assert "strategy" not in subject or kind in {"Strategy", "Learner"}, f"{place}: {ast.unparse(node)}"
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "strategy.info.name" not in text, f"{place}: {text}"
