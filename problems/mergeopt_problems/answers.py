"""What of a text counts as its answer, and when two answers are the same."""

from __future__ import annotations

import re
from typing import Any

from mergeopt.errors import ConfigError

__all__ = ["Answers"]


class Answers:
    """How answers are found and compared: without regard to white space at their ends, and any other white space being one space.

    Args:
        extract: a regex; the answer of a text is its last match, the first group of it where it has groups. None for the whole text.
        ignore_case: whether case counts for nothing.

    Raises:
        ConfigError: extract is no regex, or ignore_case is neither true nor false.
    """

    def __init__(self, extract: str | None, *, ignore_case: bool = False) -> None:
        if not isinstance(ignore_case, bool):
            raise ConfigError(f"ignore_case: expected true or false, got {ignore_case!r}")
        try:
            self._pattern = None if extract is None else re.compile(extract)
        except (re.error, TypeError) as error:
            raise ConfigError(f"extract: {extract!r} is no regular expression: {error}") from error
        self._ignore_case = ignore_case
        self.settings: dict[str, Any] = {"extract": extract, "ignore_case": ignore_case}

    def of(self, text: str) -> str | None:
        """Return the answer of a text, ready to be compared; None where the regex finds nothing."""
        if self._pattern is not None:
            *_, found = (None, *self._pattern.finditer(text))
            if found is None:
                return None
            text = (found[1] if found.re.groups else found[0]) or ""
        plain = " ".join(text.split())
        return plain.casefold() if self._ignore_case else plain
