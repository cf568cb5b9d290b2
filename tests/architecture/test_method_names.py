"""The core knows no method: no registered type, class name or slot prefix stands in `peftc/`.

In `tests/` only end-to-end tests, programs written for the reference, and a method's own tests may name one, so that a
new method edits no existing test.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterable

import pytest

from peftc.registry.manager import Registry, installed
from tests.architecture.tree import Source, sources

#: the last one names the example plugin, whose name begins with a method's
MAY_NAME_METHODS = ("tests/e2e/", "tests/ecosystem/", "tests/methods/", "tests/packaging/test_plugins.py")


def bundled() -> Registry:
    """The methods that this distribution brings."""
    return Registry([claim for claim in installed() if claim.distribution == "peftc"], blocked=frozenset())


def public_words() -> set[str]:
    """Types and public class names."""
    registry = bundled()
    methods = [registry.get(name) for name in registry.names]
    return {*registry.names, *registry.public_names(), *(type(m.tuner).__name__ for m in methods)} - {
        "function",
        "tuple",
    }


def code_words() -> set[str]:
    """Entry-point names, which in lower case could be ordinary words of a sentence, but not of code."""
    return {name.lower() for name in bundled().names}


def prefixes() -> tuple[str, ...]:
    registry = bundled()
    return tuple(sorted({registry.get(name).prefix for name in registry.names} - {""}))


def offences(source: Source, words: Iterable[str], lower: Iterable[str], starts: tuple[str, ...]) -> list[str]:
    anywhere = re.compile(rf"\b({'|'.join(sorted(words))})\b")
    in_code = re.compile(rf"\b({'|'.join(sorted(lower))})\b|\b({'|'.join(starts)})")
    found = []
    for token in source.tokens():
        documents = token.type == tokenize.COMMENT or token.start in source.docstrings
        hit = anywhere.search(token.string) or (None if documents else in_code.search(token.string))
        if hit:
            found.append(f"{source.name}:{token.start[0]} names `{hit.group(0)}`")
    return found


CORE = sources("peftc")
TESTS = [s for s in sources("tests") if not s.name.startswith(MAY_NAME_METHODS)]


@pytest.mark.parametrize("source", CORE, ids=lambda s: s.name)
def test_the_core_names_no_method(source: Source) -> None:
    assert offences(source, public_words(), code_words(), prefixes()) == []


@pytest.mark.parametrize("source", TESTS, ids=lambda s: s.name)
def test_shared_tests_name_no_method(source: Source) -> None:
    assert offences(source, public_words(), code_words(), prefixes()) == []
