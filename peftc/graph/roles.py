"""What a module is for, told from its name, its neighbours in the path and its kind. Names are data: `roles.json`.

Roles help readers and checks (totals by role, a router trained by accident), and say what is adapted by default in models
of a type that no table knows.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.resources import files

from peftc.graph.nodes import Kind, LayerFacts, Role

_NUMBERS = re.compile(r"\.\d+(?=\.|$)")


@cache
def _text() -> str:
    return files("peftc.graph").joinpath("roles.json").read_text(encoding="utf-8")


def digest() -> str:
    """Hash of the rules: a cached graph that was made with others is not used."""
    return hashlib.sha256(_text().encode()).hexdigest()


@cache
def _rules() -> tuple[tuple[re.Pattern[str], Role | None], ...]:
    """Patterns over a path whose numbers read `.*`, first match wins; None says that the name means nothing here."""
    data = json.loads(_text())
    return tuple((re.compile(rule["path"]), rule["role"] and Role(rule["role"])) for rule in data["rules"])


class RoleFinder:
    """Roles in one model. Repeated blocks ask once: the answer depends on the path without its numbers and the kind."""

    def __init__(self, output_embeddings: str | None = None) -> None:
        self._head = output_embeddings
        self._known: dict[tuple[str, Kind], Role | None] = {}

    def role_of(self, path: str, facts: LayerFacts) -> Role | None:
        """The role of the module at `path`, None where names do not tell."""
        if path == self._head and path:
            return Role.HEAD
        if facts.kind is Kind.NORM:
            return Role.NORM
        key = (_NUMBERS.sub(".*", path), facts.kind)
        if key not in self._known:
            self._known[key] = _match(*key)
        return self._known[key]


def _match(path: str, kind: Kind) -> Role | None:
    if kind is Kind.EMBEDDING:
        return Role.EMBEDDING
    return next((role for pattern, role in _rules() if pattern.search(path)), None)
