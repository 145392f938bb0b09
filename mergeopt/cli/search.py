"""`mergeopt run`, `mergeopt check` and `mergeopt front`: searching, and showing what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from mergeopt.cli.screen import Follow, errors, results
from mergeopt.config import RunFile, build_problem, build_strategy
from mergeopt.evaluation.racing import Racing
from mergeopt.memory import size_text, status_bytes
from mergeopt.merge_problem import MergeProblem
from mergeopt.problem import FrugalProblem, Problem, Proposal
from mergeopt.report.flaws import with_flaws
from mergeopt.report.summary import RANDOM, Summary, summarise
from mergeopt.report.table import render
from mergeopt.strategy import Budget, Strategy
from mergeopt.study.interrupt import Interrupted
from mergeopt.study.launch import Launch, cached_random_search, starting_points
from mergeopt.study.optimize import opened, race_of
from mergeopt.study.run import LEARNED_SETS, Run

__all__ = ["check_run_file", "run_search", "show_front"]

PICTURE = "front.png"
MOST_LABELS = 8  # of a head that `check` names
INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def run_search(file: Path, overrides: Mapping[str, Any], *, resume: bool, as_json: bool) -> None:
    """Search as a run file says, print the front, and say where everything was written.

    Args:
        file: the run file.
        overrides: values in place of the file's; None leaves the file's.
        resume: go on with the run in the folder.
        as_json: print the front as JSON on standard output.

    Raises:
        UserError: the file, its sources or the folder cannot be used.
        Failure: the search itself went wrong.
    """
    run_file = RunFile.load(file, overrides)
    launch = Launch(run_file, file.parent)
    try:
        with Follow(errors()) as follow:
            run = launch.run(resume=resume, progress=follow)
    except Interrupted as stop:
        run = Run.open(stop.folder)
    summary = summarise(run, _random_search(launch, run))
    picture = _drawn(summary)
    if as_json:
        typer.echo(json.dumps(_document(run, summary), indent=2))
    else:
        _show(summary, whole=False)
        _show_ways_on(run, file, picture)
    if run.status == "interrupted":
        errors().print(f"stopped by {run.header['reason']}; go on with: mergeopt run {file} --out {run.folder} --resume", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)


def _random_search(launch: Launch, run: Run) -> Run | None:
    if run.status != "finished":
        return None
    try:
        with Follow(errors(), label="random search, to compare with") as follow:
            return launch.random_search(run, progress=follow)
    except Interrupted as stop:
        errors().print(f"the random search was stopped by {stop.reason}; --resume goes on with it", soft_wrap=True)
        return None


def show_front(folder: Path, *, as_json: bool, plot: Path | None) -> None:
    """Print the front of a run as a table or as JSON, and draw it when asked.

    Raises:
        StoreError: there is no run in the folder.
        ConfigError: the picture cannot be drawn.
    """
    run = Run.open(folder)
    summary = summarise(run, cached_random_search(run))
    if plot is not None:
        from mergeopt.report.plot import draw

        draw(summary, plot)
    if as_json:
        typer.echo(json.dumps(_document(run, summary), indent=2))
        return
    _show(summary, whole=True)
    if run.status != "finished":
        typer.echo(f"the run is {run.status}; {run.evaluations} of {run.header['budget']} evaluations are done")
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def check_run_file(file: Path, overrides: Mapping[str, Any], *, measure: bool = False) -> None:
    """Print what a run file would search, and what memory that would take; nothing is written.

    Args:
        file: the run file.
        overrides: values in place of the file's; None leaves the file's.
        measure: load the models and score two candidates, to know the time, too.

    Raises:
        UserError: the file or its sources cannot be used.
    """
    run_file = RunFile.load(file, overrides)
    strategy = build_strategy(run_file)
    problem = build_problem(run_file, file.parent)
    points = starting_points(problem, run_file.init, file.parent)
    given = run_file.budget
    budget = Budget(1) if given is None else Budget(given.evaluations, given.gradient_steps)
    if isinstance(problem, FrugalProblem):
        problem.expect(strategy.info.needs, strategy.info.together)
    strategy.setup(opened(problem, strategy, None), seed=run_file.seed, budget=budget, batch=run_file.batch)
    race = race_of(problem, Racing.of(run_file.racing), run_file.seed)
    for line in [*_description(problem), *_memory(problem, strategy)]:
        typer.echo(line)
    typer.echo(f"strategy    {strategy.info.name} ({strategy.info.version}); starts from {len(points)} given points")
    if race is not None:
        after = ", ".join(map(str, race.rungs(run_file.batch)[:-1])) or "no"
        typer.echo(f"racing      {race.racing.rule}: a candidate may be dropped after {after} items")
    if measure:
        typer.echo(f"time        {_time(problem, run_file)}")
    for warning in getattr(problem, "warnings", ()):
        typer.echo(f"warning     {warning}")


def _time(problem: Problem, run_file: RunFile) -> str:
    """Say what a candidate takes, by scoring two, and what all of the budget's take, racing left aside."""
    seconds = _seconds_per_candidate(problem)
    spent = (
        "; the file has no budget"
        if run_file.budget is None
        else f"; {run_file.budget.evaluations} evaluations take about {_duration(seconds * run_file.budget.evaluations)}"
    )
    return f"{_duration(seconds)} a candidate{spent}"


def _memory(problem: Problem, strategy: Strategy) -> list[str]:
    """Say what memory a search takes when it takes most: what this process holds already, weights, and what a batch takes besides."""
    if not isinstance(problem, MergeProblem):
        return []
    held, there = status_bytes("VmRSS") if problem.device.type == "cpu" else 0, problem.room
    batch = problem.activations(getattr(strategy, "items", None) if "gradients" in strategy.info.needs else None)
    parts = {"this process": held or 0, **problem.memory(), "batch": batch or 0}
    needed = sum(parts.values())
    details = ", ".join(f"{what} {size_text(count)}" for what, count in parts.items() if count)
    lines = [f"memory      {size_text(needed)}: {details}", f"            {size_text(there.bytes)} are to be had ({there.bound})"]
    lines += [f"            {line}" for line in _places(problem)]
    if needed - (held or 0) > there.bytes:
        lines.append(
            "            that is too little: a smaller `batch` of the objectives takes less, and `memory: {scoring: layers}` least"
        )
    return lines


def _places(problem: MergeProblem) -> list[str]:
    """Say how many candidates are made at a time, where base and experts are meanwhile, and what is kept of those asked for."""
    if problem.scoring == "layers":
        return [f"{problem.batch} candidates at a time, layer by layer; base and experts are read from their own files"]
    fit = problem.fit
    where = "in memory" if fit.folder is None else f"in a file in {fit.folder}"
    lines = [f"{fit.candidates} candidate{'s' if fit.candidates > 1 else ''} at a time; base and experts {where}"]
    if problem.prefixes is not None and fit.prefixes < problem.prefixes:
        lines.append(f"prefixes get {size_text(fit.prefixes)} of {size_text(problem.prefixes)}: what is left beside these")
    return lines


def _document(run: Run, summary: Summary) -> dict[str, Any]:
    """Return the front as JSON-able data, the random search among its baselines when there was one."""
    data = {**with_flaws(run.front_json(), summary.flaws), "warnings": list(summary.warnings)}
    if RANDOM in summary.hypervolumes and RANDOM not in data["baselines"]:
        search, report = summary.hypervolumes[RANDOM]
        data["baselines"][RANDOM] = {"hypervolume": search, "report_hypervolume": report, "report_failed": summary.report_failed[RANDOM]}
    return data


def _drawn(summary: Summary) -> Path | None:
    from mergeopt.report.plot import MOST_OBJECTIVES, draw

    if not summary.front or len(summary.objectives) > MOST_OBJECTIVES:
        return None
    draw(summary, summary.folder / PICTURE)
    return summary.folder / PICTURE


def _show(summary: Summary, *, whole: bool) -> None:
    console = results()
    console.print(render(summary, width=console.width, whole=whole))


def _show_ways_on(run: Run, file: Path, picture: Path | None) -> None:
    written = [str(run.folder / "run.db"), *([] if picture is None else [str(picture)])]
    typer.echo(f"\nwritten     {', '.join(written)}")
    every = " --head all" if run.header.get("provenance", {}).get("heads", {}).get("mode") == "separate" else ""
    typer.echo(f"export      mergeopt export {run.folder} --knee{every} --to merged/")
    for learned in sorted((run.folder / LEARNED_SETS).glob("*")):
        typer.echo(f"            mergeopt export {learned} --prefer {run.objectives[0].name}=1{every} --to merged/   (any preference)")
    if run.status == "finished" and not run.header["strategy"].get("needs_budget"):
        typer.echo(f"extend      mergeopt run {file} --out {run.folder} --budget {2 * int(run.header['budget'])} --resume")


def _description(problem: Problem) -> list[str]:
    info = problem.info
    lines = [f"problem     {info.name}"]
    lines += [f"objective   {o.name} ({o.direction}{'' if o.constraint is None else f', within {o.constraint}'})" for o in info.objectives]
    lines.append(f"parts       {', '.join(problem.parts)}")
    if isinstance(problem, MergeProblem):
        coverage = problem.pool.coverage
        counts = ", ".join(f"{count} {kind}" for kind, count in coverage.counts.items() if count)
        lines.append(f"tensors     {coverage.total}: {counts}; {problem.layout.elements:,} parameters are merged")
        lines += _heads(problem)
        lines.append(f"operator    {problem.operator.name} ({problem.operator.variant})")
        lines += [f"            {line}" for line in problem.coefficients.describe()]
    lines.append(f"dimensions  {info.space.dim}")
    return lines


def _heads(problem: MergeProblem) -> list[str]:
    """Describe heads that stay apart: whose each is, what of, and which objectives are measured with it."""
    lines = []
    for expert, head in problem.pool.heads.items():
        labels = ", ".join(head.labels[:MOST_LABELS]) + (", ..." if len(head.labels) > MOST_LABELS else "")
        measured = ", ".join(o.name for o in problem.info.objectives if o.expert == expert) or "no objective"
        lines.append(
            f"head        {expert}: {', '.join(head.own) or 'no tensors'}; {len(head.labels)} labels ({labels}); measures {measured}"
        )
    if (labelled := problem.pool.labelled) is not None:
        known = {label: [key for key, own in labelled.known.items() if label in own] for label in labelled.labels}
        told = "; ".join(f"{label} ({', '.join(experts)})" for label, experts in known.items())
        lines.append(f"head        one, with {len(known)} labels of those that know them: {told}")
    if unused := problem.pool.coverage.heads.get("base"):
        lines.append(f"            {len(unused)} tensors of the base's own head are not used: {', '.join(unused[:MOST_LABELS])}")
    return lines


def _seconds_per_candidate(problem: Problem) -> float:
    """Return the seconds that the second of two candidates takes; the first also pays for loading and preparing."""
    genome = problem.info.space.sample(_fixed_rng(), 2)
    evaluations = list(problem.evaluate([Proposal(f"sample {i}", row) for i, row in enumerate(genome)], "search"))
    return sum(evaluations[-1].seconds.values())


def _fixed_rng() -> Any:
    import numpy as np

    return np.random.default_rng(0)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
