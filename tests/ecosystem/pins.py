"""What installed libraries ask of `peft`, read from their metadata and from the text of their modules.

Whatever a library does with the version of `peft` has to name a version: a constant, an entry of a table, or a comparison.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

_VERSION = re.compile(r"\d+(\.\d+)+")
_NEEDS = re.compile(r"peft\s*[<>=!~]=?.*\d")
_PEFT = re.compile("peft", re.IGNORECASE)
#: helpers for the libraries' own tests
_ASIDE = re.compile(r"(^|/)(testing_utils|test_utils)")


def askers() -> list[str]:
    """Distributions whose metadata name `peft`, for themselves or for an extra."""
    found = {d.name for d in distributions() if any(requirement.name == "peft" for requirement in _requirements(d))}
    return sorted(found - {"peftc"})


def in_metadata(library: str) -> set[str]:
    """The releases that a library's metadata ask for, such as `>=0.13.0`; extras too."""
    return {
        str(requirement.specifier)
        for requirement in _requirements(distribution(library))
        if requirement.name == "peft" and requirement.specifier
    }


@cache
def in_code(library: str) -> dict[str, set[str]]:
    """Expressions of a library's code that name a version of `peft`, as Python writes them, and the files they are in."""
    found: dict[str, set[str]] = {}
    package = library.replace("-", "_")
    folder = Path(str(distribution(library).locate_file(package)))
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        text = path.read_text(encoding="utf-8")
        if _PEFT.search(text) and not _ASIDE.search(name):
            for expression in _expressions(ast.parse(text)):
                found.setdefault(expression, set()).add(f"{package}/{name}")
    return found


def _requirements(found: Distribution) -> Iterator[Requirement]:
    return map(Requirement, found.requires or ())


def _expressions(tree: ast.AST) -> Iterator[str]:
    """The largest expressions that speak of `peft` and have a version in them; calls to print or raise are not among them."""
    for node in ast.walk(tree):
        if _compares(node) or _is_constant(node):
            yield ast.unparse(node)
        elif isinstance(node, ast.Dict):
            entries = (v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str))
            yield from (entry for entry in entries if _NEEDS.fullmatch(entry))


def _compares(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Compare) or (isinstance(node, ast.Call) and _asks(node))):
        return False
    versions = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and _is_version(n.value)]
    return bool(versions) and bool(_PEFT.search(ast.unparse(node)))


def _asks(node: ast.Call) -> bool:
    """Whether a call answers a question, by its name; `Version("…")` alone is part of a comparison."""
    name = ast.unparse(node.func).rpartition(".")[2]
    return bool(re.search(r"version|greater|below|least|require", name)) and name not in ("Version", "parse")


def _is_constant(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign):
        return False
    names = " ".join(ast.unparse(target) for target in node.targets)
    return isinstance(node.value, ast.Constant) and _is_version(node.value.value) and bool(_PEFT.search(names))


def _is_version(value: object) -> bool:
    return isinstance(value, str) and bool(_VERSION.fullmatch(value))
