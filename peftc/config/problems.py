"""How pydantic's errors become diagnostics: one per mistake, at the place in the data, in the words of our rules.

pydantic reports every branch of a union and marks them inside its paths; here the branches of one union are one problem,
told from the branch that went furthest, and the path holds only keys and indices of the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from peftc import rules
from peftc.config.docs import describe
from peftc.config.places import Location, json_path
from peftc.diagnostics import Diagnostic, Severity, Where, did_you_mean
from peftc.limits import MOST_TOLD

#: The models that may stand at a location, for naming the options nearest to an unknown one.
ModelsAt = Callable[[Location], Iterable[type[BaseModel]]]

_TYPE = "peftc"
_TITLE = "document"


@dataclass(frozen=True, slots=True)
class Problem:
    """A diagnostic and where it is in the data; `on_key` if the key is wrong and not its value."""

    location: Location
    diagnostic: Diagnostic
    on_key: bool = False


def as_validation_error(found: Iterable[Problem]) -> ValidationError:
    """Problems as an error to raise inside a validator; they come out of `problems`, below the validator's place."""
    return ValidationError.from_exception_data(
        _TITLE,
        [InitErrorDetails(type=as_custom_error(p.diagnostic, p.on_key), loc=p.location, input=None) for p in found],
    )


def as_custom_error(diagnostic: Diagnostic, on_key: bool = False) -> PydanticCustomError:
    """The error for the validator of one option, whose place pydantic knows."""
    what = diagnostic.what.encode("utf-8", "backslashreplace").decode()  # pydantic takes no half of a surrogate pair
    return PydanticCustomError(_TYPE, "{what}", {"what": what, "diagnostic": diagnostic, "on_key": on_key})


def problems(error: ValidationError, data: Any, models_at: ModelsAt) -> Iterator[Problem]:
    """Every mistake once; of very many, the first and their number. `data` is what was validated."""
    found = list(_mistakes(error, data))
    for location, on_key, items in found[:MOST_TOLD]:
        yield _problem(location, on_key, items, models_at)
    if len(found) > MOST_TOLD:
        yield Problem((), further(len(found) - MOST_TOLD))


def problems_of(model: type[BaseModel], data: Mapping[str, Any]) -> Iterator[Problem]:
    """Every mistake in data that is to be such a model."""
    try:
        model.__pydantic_validator__.validate_python(dict(data))
    except ValidationError as error:
        yield from problems(error, data, models_below(model))


def unknown_keys(error: ValidationError, data: Any) -> list[Location]:
    """Where the keys are that no model has: all of them."""
    return [location for location, _, items in _mistakes(error, data) if items[0]["type"] == "extra_forbidden"]


def further(number: int, where: Where | None = None, warning: bool = False) -> Diagnostic:
    """That there are so many problems besides those that are told."""
    what = f"… and {number:,} more problem{'' if number == 1 else 's'}"
    fix = "Mend those that are told first; others are often of the same kind."
    return rules.MORE_PROBLEMS(what, fix=fix, where=where, severity=Severity.WARNING if warning else None)


def capped(found: Sequence[Diagnostic], where: Where | None = None) -> list[Diagnostic]:
    """The first problems, and one more that says how many there are besides."""
    more = [further(len(found) - MOST_TOLD, where)] if len(found) > MOST_TOLD else []
    return [*found[:MOST_TOLD], *more]


def by_place(diagnostic: Diagnostic) -> tuple[bool, int, int]:
    """Sorts diagnostics by their lines; how many more there are comes last."""
    where = diagnostic.where
    return diagnostic.code == rules.MORE_PROBLEMS.code, where.line or 0, where.column or 0


def _mistakes(error: ValidationError, data: Any) -> Iterator[tuple[Location, bool, list[ErrorDetails]]]:
    """`(location, on_key, what pydantic says of it)` of every mistake."""
    groups: dict[Location, list[tuple[Location, bool, ErrorDetails]]] = {}
    indices: _Indices = {}
    for item in error.errors(include_url=False):
        location, on_key, union = _clean(item, data, indices)
        groups.setdefault(union, []).append((location, on_key, item))
    for members in groups.values():
        furthest = max(len(location) for location, _, _ in members)
        by_place: dict[tuple[Location, bool], list[ErrorDetails]] = {}
        for location, on_key, item in members:
            if len(location) == furthest:
                by_place.setdefault((location, on_key), []).append(item)
        yield from ((*place, items) for place, items in by_place.items())


def models_below(model: type[BaseModel]) -> ModelsAt:
    """Finds models at a location by following the annotations of `model`."""

    def models_at(location: Location) -> Iterable[type[BaseModel]]:
        found: list[type[BaseModel]] = [model]
        for part in location:
            fields = [m.model_fields[part] for m in found if isinstance(part, str) and part in m.model_fields]
            # an index or a free key leads into the items of the field above, whose models were found with it
            found = [m for f in fields for m in _models_in(f.annotation)] if fields else found
        return found

    return models_at


def unknown_key(models: Iterable[type[BaseModel]], name: str, where: Where | None = None) -> Diagnostic:
    """The diagnostic for a key that none of the models has."""
    known = tuple(models)
    options = [option for model in known for option in model.model_fields]
    owner = known[0].model_config.get("title") or known[0].__name__ if known else "document"
    listed = f"Remove `{name}`. " + (f"Its options are {', '.join(options)}." if options else "It has no options.")
    return rules.UNKNOWN_KEY(
        f"`{owner}` has no option `{name}`", fix=did_you_mean(name, options) or listed, where=where or Where(path=name)
    )


def _problem(location: Location, on_key: bool, items: list[ErrorDetails], models_at: ModelsAt) -> Problem:
    first = items[0]
    where = Where(path=json_path(location, root="") or None)
    if first["type"] == _TYPE:
        told: Diagnostic = first["ctx"]["diagnostic"]
        return Problem(location, replace(told, where=where), on_key or first["ctx"]["on_key"])
    name = _name(location)
    if first["type"] == "extra_forbidden":
        return Problem(location, unknown_key(models_at(location[:-1]), name, where), on_key=True)
    help_text = _help(location, models_at)
    if first["type"] == "missing":
        return Problem(location, rules.MISSING_KEY(f"`{name}` is missing", fix=help_text or "Add it.", where=where))
    reasons = "; or ".join(dict.fromkeys(_sentence(item) for item in items))
    if first["type"] == "value_error" and isinstance(first["input"], (Mapping, BaseModel)):
        what, fix = reasons[:1].upper() + reasons[1:], "Change one of the options named."
    else:
        what, fix = f"`{name}` cannot be `{shorten(first['input'])}`: {reasons}", "Give a value that fits."
        if help_text:
            fix += f" What it sets: {help_text}"
    return Problem(location, rules.BAD_VALUE(what, fix=fix, where=where), on_key)


def _name(location: Location) -> str:
    """The last key, with the indices after it: `target_modules[0]`."""
    keys = [position for position, part in enumerate(location) if isinstance(part, str)]
    return json_path(location[keys[-1] :], root="") if keys else json_path(location)


def _help(location: Location, models_at: ModelsAt) -> str:
    """The description of the option that the location is in."""
    for length in range(len(location), 0, -1):
        name = location[length - 1]
        for model in models_at(location[: length - 1]):
            if isinstance(name, str) and name in model.model_fields:
                return describe(model, name)
    return ""


#: id of a list -> id of an item -> where it first stands
_Indices = dict[int, dict[int, int]]


def _clean(item: ErrorDetails, data: Any, indices: _Indices) -> tuple[Location, bool, Location]:
    """`(location, on_key, location of the union that it is in)`: what of pydantic's path is in the data."""
    location: list[str | int] = []
    union: Location | None = None
    on_key = False
    here = data
    last = len(item["loc"]) - 1
    for position, part in enumerate(item["loc"]):
        if isinstance(here, Mapping) and part in here:
            location.append(part)
            here = here[part]
        elif isinstance(here, (list, tuple)) and isinstance(part, int):
            location.append(_index(here, part, item["input"] if position == last else None, indices))
            here = here[part] if part < len(here) else None
        elif isinstance(here, BaseModel) and part in type(here).model_fields:
            location.append(part)
            here = getattr(here, str(part))
        elif part == "[key]":
            on_key = True
        elif position == last and item["type"] in ("missing", "extra_forbidden", _TYPE):
            location.append(part)
        elif union is None:
            union = tuple(location)
    return tuple(location), on_key, tuple(location) if union is None else union


def _index(items: list[Any] | tuple[Any, ...], index: int, value: Any, indices: _Indices) -> int:
    """The index of the item; a list that became a set has lost its order."""
    if value is None or (index < len(items) and items[index] is value):
        return index
    if id(items) not in indices:
        indices[id(items)] = {id(item): i for i, item in reversed(list(enumerate(items)))}
    return indices[id(items)].get(id(value), index)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _sentence(item: ErrorDetails) -> str:
    text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def shorten(value: object, limit: int = 60) -> str:
    """The value as JSON, cut to `limit` characters."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        try:
            text = repr(value)
        except ValueError:  # a number of more digits than Python writes
            text = f"a very large {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
