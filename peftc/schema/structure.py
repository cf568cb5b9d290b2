"""Plain data held to a JSON Schema: every difference as a located problem, in the words of our rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.config.places import Location
from peftc.config.problems import Problem, shorten
from peftc.schema.parts import Schema

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator, ValidationError

_REQUIRED = re.compile(r"'(.*)' is a required property", re.DOTALL)


def structure_problems(data: Any, schema: Schema, exact: bool = False) -> Iterator[Problem]:
    """What JSON Schema has to say, located. If `exact`, `8.0` is no integer, which it is for JSON Schema."""
    for error in (inner for outer in _validator(exact)(schema).iter_errors(data) for inner in _told_by_branch(outer)):
        location: Location = tuple(error.absolute_path)
        value: Any = error.instance
        missing = _REQUIRED.match(error.message) if error.validator == "required" else None
        if error.validator == "additionalProperties" and isinstance(error.schema, Mapping):
            known = error.schema.get("properties", {})
            for key in value:
                if key not in known:
                    what = f"`{shorten_key(key)}` is not an option"
                    yield Problem((*location, key), rules.UNKNOWN_KEY(what, fix="Remove it."), on_key=True)
        elif error.validator == "uniqueItems":
            yield from _repeated(value, location)
        elif missing is not None:
            yield Problem((*location, missing[1]), rules.MISSING_KEY(f"`{missing[1]}` is missing", fix="Add it."))
        else:
            what = f"`{shorten(value)}` does not fit: {_reason(error)}"
            yield Problem(location, rules.BAD_VALUE(what, fix="`peftc schema` shows what fits."))


@cache
def _validator(exact: bool) -> type[Draft202012Validator]:
    from jsonschema import Draft202012Validator  # here: it costs as much as pydantic, and most commands need none
    from jsonschema.validators import extend

    types = Draft202012Validator.TYPE_CHECKER
    if exact:
        types = types.redefine("integer", lambda _, value: type(value) is int)
    made: type[Draft202012Validator]
    made = extend(Draft202012Validator, {"uniqueItems": _unique}, type_checker=types)  # type: ignore[no-untyped-call]
    return made


def _unique(validator: Any, wanted: bool, value: Any, schema: Schema) -> Iterator[ValidationError]:
    """`uniqueItems` in linear time: jsonschema's own compares every item with every other where types are mixed."""
    from jsonschema import ValidationError

    if wanted and isinstance(value, list) and any(_repeated(value, ())):
        yield ValidationError("an entry is given twice")


def shorten_key(key: str) -> str:
    """A key, cut to what fits on a line."""
    return key if len(key) <= 60 else f"{key[:59]}…"


def _reason(error: ValidationError) -> str:
    """Why it does not fit, without the value, which may be long."""
    said, shown = error.message, repr(error.instance)
    return shorten_key(said.removeprefix(shown).strip()) if said.startswith(shown) else said[:200]


def _told_by_branch(error: ValidationError) -> list[ValidationError]:
    """The error, or if a branch of alternatives fits but for entries given twice, the errors of that branch."""
    branches: dict[str | int, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    twice = [b for b in branches.values() if all(inner.validator == "uniqueItems" for inner in b)]
    return twice[0] if twice else [error]


def _repeated(items: list[Any], location: Location) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, item in enumerate(items):
        text = json.dumps(item, sort_keys=True)
        if text in seen:
            what = f"`{shorten(item)}` is listed twice"
            yield Problem((*location, index), rules.DUPLICATE_MEMBER(what, fix="Remove one of them."))
        seen.add(text)
