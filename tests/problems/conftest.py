from __future__ import annotations

from pathlib import Path

import pytest

from mergeopt.merge_problem import MergeMaterials
from mergeopt_problems.digits import digits


@pytest.fixture(scope="session")
def digits_materials(cache_dir: Path) -> MergeMaterials:
    """The digits problem as users get it, trained once for all test runs that share a cache folder."""
    materials = digits()
    assert Path(materials.base).is_relative_to(cache_dir)
    return materials
