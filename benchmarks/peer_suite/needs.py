"""Which tests need a name of the reference that is not here yet, as far as their ids say it."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import peftc

_API = Path(__file__).resolve().parents[2] / "docs" / "reference_api.json"
_CLASS = re.compile(r"[A-Za-z0-9]+Config(?![A-Za-z])")


def lacking_in(test: str) -> str:
    """The test's id with a line for each class that it names and peftc lacks, as a run would log it; else nothing."""
    lacking = [name for name in _CLASS.findall(test) if name in _classes() and not _is_here(name)]
    return "\n".join([test, *(f"used peft.{name}" for name in dict.fromkeys(lacking))]) if lacking else ""


@cache
def _classes() -> frozenset[str]:
    return frozenset(json.loads(_API.read_text(encoding="utf-8"))["classes"])


@cache
def _is_here(name: str) -> bool:
    return getattr(peftc, name, None) is not None
