"""The core knows no method: no registered type, class name or slot prefix stands in `peftc/`.

In `tests/` only end-to-end tests, programs written for the reference, and a method's own tests may name one, so that a
new method edits no existing test.
"""

from __future__ import annotations

import re
import tokenize
from functools import cache

from peftc.registry.manager import Registry, installed
from tests.architecture.tree import Source, of_every, sources

#: the last one names the example plugin, whose name begins with a method's
MAY_NAME_METHODS = ("tests/e2e/", "tests/ecosystem/", "tests/methods/", "tests/packaging/test_plugins.py")


@cache
def bundled() -> Registry:
    """The methods that this distribution brings."""
    return Registry([claim for claim in installed() if claim.distribution == "peftc"], blocked=frozenset())


@cache
def public_words() -> set[str]:
    """Types and public class names."""
    registry = bundled()
    methods = [registry.get(name) for name in registry.names]
    return {*registry.names, *registry.public_names(), *(type(m.tuner).__name__ for m in methods)} - {
        "function",
        "tuple",
    }


@cache
def code_words() -> set[str]:
    """Entry-point names, which in lower case could be ordinary words of a sentence, but not of code."""
    return {name.lower() for name in bundled().names}


@cache
def prefixes() -> tuple[str, ...]:
    registry = bundled()
    return tuple(sorted({registry.get(name).prefix for name in registry.names} - {""}))


@cache
def anywhere() -> re.Pattern[str]:
    """What may stand nowhere."""
    return re.compile(rf"\b({'|'.join(sorted(public_words()))})\b")


@cache
def in_code() -> re.Pattern[str]:
    """What may not stand in code."""
    return re.compile(rf"\b({'|'.join(sorted(code_words()))})\b|\b({'|'.join(prefixes())})")


def offences(source: Source) -> list[str]:
    """Places where a method is named."""
    if not anywhere().search(source.text) and not in_code().search(source.text):
        return []  # nothing to be told apart
    found = []
    for token in source.tokens():
        documents = token.type == tokenize.COMMENT or token.start in source.docstrings
        hit = anywhere().search(token.string) or (None if documents else in_code().search(token.string))
        if hit:
            found.append(f"{source.name}:{token.start[0]} names `{hit.group(0)}`")
    return found


CORE = sources("peftc")
TESTS = [s for s in sources("tests") if not s.name.startswith(MAY_NAME_METHODS)]


@of_every(CORE)
def test_the_core_names_no_method(source: Source) -> None:
    assert offences(source) == []


@of_every(TESTS)
def test_shared_tests_name_no_method(source: Source) -> None:
    assert offences(source) == []
