"""A disk that fills while a search runs: what was stored stays readable and resumable."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeopt.study.run import Run
from tests.faults.commands import Commands
from tests.faults.repeats import everything


@pytest.mark.parametrize("limit", [0, 60_000, 250_000])
def test_a_run_on_a_full_disk_says_so_and_goes_on_later(mergeopt: Commands, finished: Path, tmp_path: Path, limit: int) -> None:
    """When nothing more can be written a run ends with a plain message; with room again it becomes the run it would have been."""
    done = mergeopt(tmp_path, "run", finished / "run.yaml", "--out", "run", limit=limit)
    assert done.status in (1, 2), done
    if limit:
        assert "cannot write to the run folder run" in done.err
        assert "free space" in done.err
        assert "Traceback" not in done.err
        assert "unexpected" not in done.err
    begun = (tmp_path / "run" / "run.db").exists() and mergeopt(tmp_path, "front", "run").status == 0
    kept = len(Run.open(tmp_path / "run").trials) if begun else 0
    assert begun or limit < 60_000
    if limit == 250_000:
        assert Run.open(tmp_path / "run").status == "interrupted"
        assert mergeopt(tmp_path, "export", "run", "--knee", "--to", "model").status == 0
    resume = ["--resume"] if begun else []
    again = mergeopt(tmp_path, "run", finished / "run.yaml", "--out", "run", *resume)
    assert again.status == 0, again.err
    assert kept < len(Run.open(tmp_path / "run").trials)
    assert everything(tmp_path / "run") == everything(finished / "run")
