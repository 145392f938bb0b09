"""Folders that are being written, and what dead writers left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mergeopt.partial import partial_folder

WRITER = """
import sys, time
from pathlib import Path
from mergeopt.partial import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_leftovers_of_dead_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """What a killed process left goes at the next write; what a live one writes, and anything of another name, stays."""
    (tmp_path / ".partial-notes").mkdir()
    (tmp_path / "whole").mkdir()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            theirs = tmp_path / writer.stdout.readline().strip()
            with partial_folder(tmp_path) as mine, partial_folder(tmp_path):
                assert mine.is_dir()
                assert (theirs / "half").is_file()
        finally:
            writer.kill()
    assert theirs.is_dir()
    with partial_folder(tmp_path) as mine:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, ".partial-notes", "whole"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-notes", "whole"]


def test_what_is_whole_stays_under_its_name(tmp_path: Path) -> None:
    """A folder that was renamed stays, one that was not is removed, also when writing it fails."""
    with partial_folder(tmp_path / "deep") as folder:
        folder.rename(tmp_path / "deep" / "whole")
    with pytest.raises(ValueError, match="no"), partial_folder(tmp_path / "deep"):
        raise ValueError("no")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["whole"]
