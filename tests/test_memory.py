"""How much memory there is, held against limits that are really set."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeopt.errors import ConfigError
from mergeopt.memory import parse_size, room, status_bytes

CPU = torch.device("cpu")
UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9, "G": 10**9}
CHILD = """
import json, resource, sys
import torch
from mergeopt.memory import room, status_bytes
used = status_bytes(sys.argv[2])
limit = used + (200 << 20)
resource.setrlimit(getattr(resource, sys.argv[1]), (limit, limit))
found = room(torch.device("cpu"))
def fits(count):
    try:
        torch.empty(count, dtype=torch.uint8)
    except RuntimeError:
        return False
    return True
print(json.dumps([found.bytes, found.bound, fits(found.bytes - (8 << 20)), fits(found.bytes + (8 << 20))]))
"""


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.booleans())
def test_sizes_are_read_as_they_are_written(count: int, unit: str, spaced: bool) -> None:
    """A number and a unit give as many bytes, with or without a space and in any case."""
    text = f"{count}{' ' if spaced else ''}{unit}"
    assert parse_size(text) == parse_size(text.upper()) == count * UNITS[unit]


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 XB", "0", "1.5.2MB", "all"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Anything else is an error that shows how sizes are written."""
    with pytest.raises(ConfigError, match="expected a size such as 8GiB"):
        parse_size(text)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell how much of a limit is used")
@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")])
def test_a_limit_of_the_process_is_the_room(limit: str, used: str) -> None:
    """What room says is left under a limit can be allocated, and not much more."""
    done = subprocess.run([sys.executable, "-c", CHILD, limit, used], capture_output=True, text=True, check=True)
    left, bound, less, more = json.loads(done.stdout)
    assert bound == limit
    assert 150 << 20 < left <= 200 << 20
    assert (less, more) == (True, False)


def test_a_users_limit_counts_what_is_held() -> None:
    """What a user allows is counted from nothing: memory that the process holds already is not there to be taken."""
    held = status_bytes("RssAnon") or 0
    assert room(CPU, held + (64 << 20)).bound == "memory: limit"
    assert 32 << 20 < room(CPU, held + (64 << 20)).bytes < 96 << 20
    assert room(CPU, 1).bytes == 0
    assert room(CPU).bytes > 0
