"""Two validators, one list: JSON Schema for what editors see, pydantic for what the program does.

They agree but for two differences that are meant: the schema takes `8.0` for an integer, where pydantic does not, and
reports an entry given twice in a set, which pydantic does not. A property test holds them to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.config.files import class_for, place
from peftc.config.kinds import kind_of
from peftc.config.places import Document
from peftc.config.problems import Problem, by_place, capped
from peftc.config.spec import AdapterSpec, Reading, check_plain, is_config, read_spec
from peftc.diagnostics import Diagnostic, Severity, Where
from peftc.limits import MAX_ADAPTERS
from peftc.registry.manager import Registry, default_registry
from peftc.schema.generate import structure_of, structure_of_spec
from peftc.schema.parts import Schema
from peftc.schema.structure import structure_problems

#: A key or an index of a place as text.
_PART = re.compile(r'\.[\w-]+|\[\d+\]|\["(?:[^"\\]|\\.)*"\]')


@dataclass(frozen=True)
class Verdict:
    """What a document is and what is wrong with it. `spec` or `config` is set if there is no error."""

    document: Document
    diagnostics: tuple[Diagnostic, ...]
    spec: AdapterSpec | None = None
    config: PeftConfig | None = None

    @property
    def ok(self) -> bool:
        return all(d.severity is not Severity.ERROR for d in self.diagnostics)


def check_document(document: Document, registry: Registry | None = None) -> Verdict:
    """Check a spec, or a plain adapter config, with both validators."""
    registry = registry or default_registry()
    if is_config(document):
        config, told = check_plain(document, registry)
        merged = _merge(document, told, list(_of_adapter(document.data, registry, {})))
        return Verdict(document, merged, config=config)
    reading: Reading = read_spec(document, registry)
    structure = (
        [] if kind_of(document.data) in ("a plan", "a module graph") else list(_of_spec(document.data, registry))
    )
    return Verdict(document, _merge(document, reading.diagnostics, structure), spec=reading.spec)


def _of_spec(data: Any, registry: Registry) -> Iterator[Problem]:
    yield from structure_problems(data, structure_of_spec())
    adapters = data.get("adapters") if isinstance(data, Mapping) else None
    if isinstance(adapters, Mapping) and len(adapters) <= MAX_ADAPTERS:
        known: dict[str, Schema] = {}
        for name, options in adapters.items():
            for problem in _of_adapter(options, registry, known):
                yield Problem(("adapters", name, *problem.location), problem.diagnostic, problem.on_key)


def _of_adapter(options: Any, registry: Registry, known: dict[str, Schema]) -> Iterator[Problem]:
    """What the schema of its method says; `known` keeps schemas that were made."""
    if isinstance(class_for(options, registry), Problem):
        return
    peft_type = options["peft_type"]
    if peft_type not in known:
        known[peft_type] = structure_of(registry.get(peft_type))
    yield from structure_problems(options, known[peft_type])


def _merge(document: Document, told: tuple[Diagnostic, ...], structure: list[Problem]) -> tuple[Diagnostic, ...]:
    """What has been told, and what only the schema found; where both speak of one place, the first knows more."""
    if any(d.code == rules.MORE_PROBLEMS.code for d in told):
        return told  # what the schema would say more of is what is counted there
    covered = _Covered(told)
    placed = [place(document, problem) for problem in structure]
    more = capped([d for d in placed if not covered.speaks_of(d.where.path or "$")], Where(document.file))
    return tuple(sorted(dict.fromkeys([*told, *more]), key=by_place))


class _Covered:
    """Which places diagnostics speak of: a warning of its own place, an error of all around it. Asked in constant time."""

    def __init__(self, told: Iterable[Diagnostic]) -> None:
        self._own: set[str] = set()
        self._errors: set[tuple[str, ...]] = set()
        self._above: set[tuple[str, ...]] = set()
        for diagnostic in told:
            path = diagnostic.where.path or "$"
            self._own.add(path)
            if diagnostic.severity is Severity.ERROR:
                parts = tuple(_PART.findall(path))
                self._errors.add(parts)
                self._above.update(parts[:length] for length in range(len(parts) + 1))

    def speaks_of(self, path: str) -> bool:
        """Whether a diagnostic covers the path: there, inside it or around it."""
        parts = tuple(_PART.findall(path))
        around = (parts[:length] in self._errors for length in range(len(parts)))
        return path in self._own or parts in self._above or any(around)
