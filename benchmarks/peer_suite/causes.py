"""Why a test that passes on the reference does not pass here: the table in `causes.toml`, and whom each row fits.

A test without a cause is a mistake, of ours or of the table; and so is a row that fits none any more.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FILE = Path(__file__).resolve().with_name("causes.toml")
#: Who is right, by the words of the table. Tests of the first are not counted among those that touch only what exists.
TO_COME = "to come"
VERDICTS = {
    TO_COME: "needs a method or an option that peftc does not have yet",
    "ours by choice": "peftc does otherwise on purpose",
    "internals": "the test looks at private parts of the reference, or at its words",
    "ours to mend": "the reference is right, and peftc is to follow",
}
#: The state of a test without a cause.
UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Cause:
    """A row: who is right and why, and what is found in the text of a test that it explains."""

    key: str
    verdict: str
    title: str
    why: str
    match: tuple[str, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{part})" for part in self.match), re.MULTILINE)

    def explains(self, text: str) -> bool:
        """Whether the text of a test's row is of this kind."""
        return self._pattern.search(text) is not None


def causes(file: Path = FILE) -> dict[str, Cause]:
    """The table, by the keys of its rows. Raises `ValueError` for a row that is not whole."""
    rows: Mapping[str, Mapping[str, object]] = tomllib.loads(file.read_text(encoding="utf-8"))
    found = {}
    for key, row in rows.items():
        match = row.get("match")
        if not isinstance(match, list) or row.get("verdict") not in VERDICTS:
            raise ValueError(f"{file.name}: {key} needs a list `match`, and a verdict of {', '.join(VERDICTS)}")
        found[key] = Cause(key, str(row["verdict"]), str(row["title"]), str(row["why"]), tuple(map(str, match)))
    return found


def cause_of(text: str, table: Iterable[Cause]) -> str:
    """The key of the first row that explains the text, or `UNEXPLAINED`."""
    return next((cause.key for cause in table if cause.explains(text)), UNEXPLAINED)
