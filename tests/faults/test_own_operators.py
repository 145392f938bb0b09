"""Operators from a user's file: searched, exported, and made again only where the user names the file."""

from __future__ import annotations

from pathlib import Path

from tests.faults.commands import Commands, refused, write

OPERATOR = """
import mergeopt as mo

@mo.merge_operator("half", weight=mo.Param.real(1.0, search=(0.0, 1.0), per_expert=True))
def half(deltas, *, weight):
    return 0.5 * sum(w * delta for w, delta in zip(weight, deltas))
"""


def test_a_recipe_never_names_code_to_run(mergeopt: Commands, models: Path, tmp_path: Path) -> None:
    """A search over an operator of a file exports; its recipe is made again, to the same bytes, only with the file named."""
    (tmp_path / "own.py").write_text(OPERATOR)
    write(tmp_path, merge={"operator": "own.py:half"}, budget=4, strategy="random")
    done = mergeopt(tmp_path, "run", "run.yaml")
    assert done.status == 0, done.err
    done = mergeopt(tmp_path, "export", "run", "--knee", "--to", "model")
    assert done.status == 0, done.err
    refused(mergeopt(tmp_path, "merge", "model/recipe.json", "--out", "again"), "unknown operator 'half'", "--operator FILE.py:NAME")
    done = mergeopt(tmp_path, "merge", "model/recipe.json", "--out", "again", "--operator", "own.py:half")
    assert done.status == 0, done.err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_an_operator_edited_since_is_noticed(mergeopt: Commands, models: Path, tmp_path: Path) -> None:
    """A run does not go on with another text of its operator's function."""
    (tmp_path / "own.py").write_text(OPERATOR)
    write(tmp_path, merge={"operator": "own.py:half"}, budget=2, strategy="random")
    assert mergeopt(tmp_path, "run", "run.yaml").status == 0
    (tmp_path / "own.py").write_text(OPERATOR.replace("0.5", "0.6"))
    refused(mergeopt(tmp_path, "run", "run.yaml", "--resume", "--budget", 4), "cannot resume")
