"""Where generated things are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder for generated things: the environment variable MERGEOPT_CACHE, else the user's cache folder of this system."""
    named = os.environ.get("MERGEOPT_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("mergeopt"))
