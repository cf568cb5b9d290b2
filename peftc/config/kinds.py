"""Which of its documents one is that stands where another is expected: a plan given for a spec, a spec for a plan.

The programs differ in what they read; a document that says what it is should not be told the mistakes of another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What a plan says that it is.
PLAN_FORMAT = "peftc.plan"

#: What a document is -> what it is for.
_USES = {
    "a plan": "`peftc apply FILE` carries it out; its spec is where changes belong",
    "a module graph": "`peftc plan SPEC --graph FILE` reads it",
    "a spec": "`peftc plan FILE --out PLAN` makes a plan of it",
    "an adapter's config": "`peftc plan FILE --base MODEL --out PLAN` makes a plan of it",
}


def kind_of(data: Any) -> str:
    """What a document is, by the keys that no other kind has; empty for one that nothing tells."""
    if not isinstance(data, Mapping):
        return ""
    if data.get("format") == PLAN_FORMAT:
        return "a plan"
    if {"facts", "nodes"} <= data.keys():
        return "a module graph"
    if {"base", "adapters"} <= data.keys():
        return "a spec"
    return "an adapter's config" if "peft_type" in data else ""


def use_of(kind: str) -> str:
    """What one does with a document of that kind."""
    return f"{_USES[kind]}."


def hint_of(data: Any) -> str:
    """What the document is instead, to be put after what it is not; empty if nothing tells."""
    kind = kind_of(data)
    return f"; it is {kind}: {_USES[kind]}" if kind else ""
