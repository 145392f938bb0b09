"""`mergeopt list`: what is registered, and the parameters of operators."""

from __future__ import annotations

import inspect
import json
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mergeopt import registry
from mergeopt.cli.screen import results

__all__ = ["show"]


def show(kind: str, *, as_json: bool) -> None:
    """Print what is registered under a kind, as a table or as JSON.

    Args:
        kind: one of `registry.GROUPS`.
        as_json: print `[{"name": ...}, ...]`.

    Raises:
        PluginError: the kind is unknown, or an operator cannot be loaded.
    """
    rows = [{"name": name, **(_operator(name) if kind == "operators" else {})} for name in registry.names(kind)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif kind == "operators":
        for row in rows:
            results().print(_sheet(row))
    else:
        for row in rows:
            typer.echo(_plain(row["name"]))


def _plain(name: str) -> str:
    return f"{name}NAME" if name.endswith(":") else name


def _operator(name: str) -> dict[str, Any]:
    operator = registry.load("operators", name)()
    return {
        "version": operator.version,
        "variants": list(operator.variants),
        "statistics": list(operator.requires.statistics),
        "doc": (inspect.getdoc(operator) or "").split("\n", 1)[0],
        "parameters": [
            {
                "name": param.name,
                "kind": param.kind,
                "default": param.default,
                "low": param.low,
                "high": param.high,
                "search": list(param.search) if param.search is not None else None,
                "options": list(param.options),
                "per_expert": param.per_expert,
                "differentiable": param.differentiable,
                "doc": param.doc,
            }
            for param in operator.params
        ],
    }


def _sheet(operator: dict[str, Any]) -> RenderableType:
    """Return an operator's headline, its variants and its parameters."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("  parameter", "kind", "default", "allowed", "searched", "per expert", "gradient", "what it is"):
        table.add_column(title, no_wrap=title != "what it is")
    for param in operator["parameters"]:
        table.add_row(*_cells(param))
    lines: list[RenderableType] = [Text.assemble((operator["name"], "bold"), f"  {operator['doc']}")]
    if len(operator["variants"]) > 1:
        lines.append(Text(f"  variants: {', '.join(operator['variants'])}"))
    if operator["statistics"]:
        lines.append(Text(f"  measures each expert ({', '.join(operator['statistics'])}) on the data of objectives that say `expert:`"))
    return Group(*lines, table, Text(""))


def _cells(param: dict[str, Any]) -> list[str]:
    if param["kind"] == "choice":
        allowed = ", ".join(str(option) for option in param["options"])
    elif param["low"] is None and param["high"] is None:
        allowed = "any"
    else:
        allowed = f"{_end(param['low'], '-inf')}..{_end(param['high'], 'inf')}"
    searched = "" if param["search"] is None else f"{param['search'][0]:g}..{param['search'][1]:g}"
    flags = ["yes" if param["per_expert"] else "no", "yes" if param["differentiable"] else "no"]
    return [escape(str(text)) for text in (f"  {param['name']}", param["kind"], param["default"], allowed, searched, *flags, param["doc"])]


def _end(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:g}"
