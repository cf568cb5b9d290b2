"""Two validators, one list: JSON Schema for what editors see, pydantic for what the program does.

They agree but for two differences that are meant: the schema takes `8.0` for an integer, where pydantic does not, and
reports an entry given twice in a set, which pydantic does not. A property test holds them to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.config.files import class_for, place
from peftc.config.places import Document, Location
from peftc.config.problems import Problem, shorten
from peftc.config.spec import AdapterSpec, Reading, check_plain, is_config, read_spec
from peftc.diagnostics import Diagnostic, Severity
from peftc.registry.manager import Registry, default_registry
from peftc.schema.generate import Schema, structure_of, structure_of_spec

if TYPE_CHECKING:
    from jsonschema import ValidationError

_REQUIRED = re.compile(r"'(.*)' is a required property")


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
        merged = _merge(document, told, list(_of_adapter(document.data, (), registry)))
        return Verdict(document, merged, config=config)
    reading: Reading = read_spec(document, registry)
    structure = list(_of_spec(document.data, registry))
    return Verdict(document, _merge(document, reading.diagnostics, structure), spec=reading.spec)


def structure_problems(data: Any, schema: Schema) -> Iterator[Problem]:
    """What JSON Schema has to say, located."""
    from jsonschema import Draft202012Validator  # here: it costs as much as pydantic, and most commands need none

    found = Draft202012Validator(schema).iter_errors(data)
    for error in (inner for outer in found for inner in _told_by_branch(outer)):
        location: Location = tuple(error.absolute_path)
        value: Any = error.instance
        missing = _REQUIRED.match(error.message) if error.validator == "required" else None
        if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
            known = error.schema.get("properties", {})
            for key in value:
                if key not in known:
                    what = f"`{key}` is not an option"
                    yield Problem((*location, key), rules.UNKNOWN_KEY(what, fix="Remove it."), on_key=True)
        elif error.validator == "uniqueItems":
            yield from _repeated(value, location)
        elif missing is not None:
            yield Problem((*location, missing[1]), rules.MISSING_KEY(f"`{missing[1]}` is missing", fix="Add it."))
        else:
            what = f"`{shorten(value)}` does not fit: {shorten(error.message, 200)}"
            yield Problem(location, rules.BAD_VALUE(what, fix="`peftc schema` shows what fits."))


def _told_by_branch(error: ValidationError) -> list[ValidationError]:
    """The error, or if a branch of alternatives fits but for entries given twice, the errors of that branch."""
    branches: dict[str | int, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    twice = [b for b in branches.values() if all(inner.validator == "uniqueItems" for inner in b)]
    return twice[0] if twice else [error]


def _repeated(items: list[Any], location: Location) -> Iterator[Problem]:
    for index, item in enumerate(items):
        if item in items[:index]:
            what = f"`{shorten(item)}` is listed twice"
            yield Problem((*location, index), rules.DUPLICATE_MEMBER(what, fix="Remove one of them."))


def _of_spec(data: Any, registry: Registry) -> Iterator[Problem]:
    yield from structure_problems(data, structure_of_spec())
    adapters = data.get("adapters") if isinstance(data, Mapping) else None
    for name, options in adapters.items() if isinstance(adapters, Mapping) else ():
        yield from _of_adapter(options, ("adapters", name), registry)


def _of_adapter(options: Any, location: Location, registry: Registry) -> Iterator[Problem]:
    if isinstance(class_for(options, registry), Problem):
        return
    for problem in structure_problems(options, structure_of(registry.get(options["peft_type"]))):
        yield Problem((*location, *problem.location), problem.diagnostic, problem.on_key)


def _merge(document: Document, told: tuple[Diagnostic, ...], structure: list[Problem]) -> tuple[Diagnostic, ...]:
    """What has been told, and what only the schema found; where both speak of one place, the first knows more."""
    placed = [place(document, problem) for problem in structure]
    more = [d for d in placed if not any(_speaks_of(known, d.where.path or "$") for known in told)]
    return tuple(sorted(dict.fromkeys([*told, *more]), key=lambda d: (d.where.line or 0, d.where.column or 0)))


def _speaks_of(known: Diagnostic, path: str) -> bool:
    """Whether the diagnostic covers the path: a warning its own place, an error all around it."""
    place_told = known.where.path or "$"
    return path == place_told or (known.severity is Severity.ERROR and _related(place_told, path))


def _related(one: str, other: str) -> bool:
    """Whether one path is the other or inside it."""
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}["))
