"""`init: {kind: NAME, samples: N, …}` in documents: a start with its options in one place.

It stands for the option that names a start, the nested options of that start where the method has them, and the number of
examples of a training that the start reads. All of it follows from the start's record, so that those of other packages have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from peftc import rules
from peftc.config.base import ConfigModel
from peftc.config.places import Location
from peftc.config.problems import Problem, models_below, problems_of, shorten
from peftc.diagnostics import PeftcError, did_you_mean
from peftc.registry.starts import default_starts
from peftc.tuner.method import TunerMethod
from peftc.tuner.start import Reads, Start

#: The key, and those in it that are no options of the start.
INIT, KIND, SAMPLES = "init", "kind", "samples"


@dataclass(frozen=True)
class Spelt:
    """Options without the shorthand, and what was wrong with it."""

    options: Mapping[str, Any]
    #: how many examples the start reads, if it is said
    samples: int | None = None
    found: tuple[Problem, ...] = ()
    #: where the document says what stands for these options
    said: Mapping[str, Location] = field(default_factory=dict)

    def place(self, location: Location) -> Location:
        """Where the document says what is at this place in the options."""
        own = self.said.get(str(location[0])) if location else None
        return location if own is None else (*own, *location[1:])


def spelt(data: Mapping[str, Any], method: TunerMethod) -> Spelt | None:
    """The options of an adapter with the shorthand spelt out; None where it has none, or the method takes no starts."""
    if INIT not in data or not takes(method):
        return None
    rest = {key: value for key, value in data.items() if key != INIT}
    given = {KIND: data[INIT]} if isinstance(data[INIT], str) else data[INIT]
    if given is None:
        return Spelt(rest)
    misshapen = tuple(_misshapen(given))
    if misshapen:
        return Spelt(rest, found=misshapen)
    kind, samples = given[KIND], given.get(SAMPLES)
    options = {key: value for key, value in given.items() if key not in (KIND, SAMPLES)}
    start = _named(kind, method)
    found = tuple(contradictions(data, given, start, method))
    if found:
        return Spelt(rest, samples, found)
    said: dict[str, Location] = {method.start_option: (INIT, KIND)}
    made = {**rest, method.start_option: kind}
    if start is not None and options:
        made[start.options] = options
        said[start.options] = (INIT,)
    return Spelt(made, samples, said=said)


def takes(method: TunerMethod) -> bool:
    """Whether adapters of the method may have the shorthand: it names starts, and has no option of that name."""
    return bool(method.start_option) and INIT not in method.config.model_fields


def schema() -> dict[str, Any]:
    """The JSON Schema of the key."""
    return {
        "description": "A start with its options: its name as `kind`, `samples` for how many examples of the training it reads, and "
        "its own options beside. In place of the option that names a start.",
        "anyOf": [
            {"type": "null"},
            {"type": "string"},
            {
                "type": "object",
                "required": [KIND],
                "properties": {KIND: {"type": "string"}, SAMPLES: {"type": ["integer", "null"], "minimum": 1}},
            },
        ],
    }


def options_model(start: Start, method: TunerMethod) -> type[ConfigModel] | None:
    """The model of a start's nested options, where the method has them."""
    if start.options not in method.config.model_fields:
        return None
    if start.how is not None:
        return start.how
    models = models_below(method.config)((start.options,))
    return next((model for model in models if issubclass(model, ConfigModel)), None)


def _named(kind: str, method: TunerMethod) -> Start | None:
    """The start of a name; None for the method's own, and for one that is not there, which is told with the other options."""
    if kind.lower() not in method.own_starts:
        with suppress(PeftcError):
            return default_starts().named(kind).start
    return None


def _misshapen(given: Any) -> Iterator[Problem]:
    """What is no shorthand at all."""
    if not isinstance(given, Mapping):
        what = f"`{INIT}` cannot be `{shorten(given)}`: it is the name of a start, or a mapping with its options"
        yield Problem((INIT,), rules.BAD_VALUE(what, fix="Write `init: {kind: NAME}`."))
        return
    if KIND not in given:
        what = f"`{KIND}` is missing: which start is meant"
        fix = f"Give one of {', '.join(default_starts().names)}."
        yield Problem((INIT, KIND), rules.MISSING_KEY(what, fix=fix))
    elif not isinstance(given[KIND], str):
        what = f"`{KIND}` cannot be `{shorten(given[KIND])}`: should be the name of a start"
        yield Problem((INIT, KIND), rules.BAD_VALUE(what, fix=f"Give one of {', '.join(default_starts().names)}."))
    samples = given.get(SAMPLES)
    if samples is not None and (type(samples) is not int or samples < 1):
        what = f"`{SAMPLES}` cannot be `{shorten(samples)}`: should be a number of examples, at least 1"
        yield Problem((INIT, SAMPLES), rules.BAD_VALUE(what, fix="Give a whole number."))


def contradictions(
    data: Mapping[str, Any], given: Mapping[str, Any], start: Start | None, method: TunerMethod
) -> Iterator[Problem]:
    """What is wrong between the shorthand and the start that it names, and the other options."""
    kind = given[KIND]
    if data.get(method.start_option) is not None:
        what = f"`{INIT}` and `{method.start_option}` both say how the adapter begins"
        yield Problem((method.start_option,), rules.CONTRADICTION(what, fix="Keep one of them."), on_key=True)
    unknown = start is None and kind.lower() not in method.own_starts
    if unknown:
        return  # told where the name is looked up
    if given.get(SAMPLES) is not None and (start is None or start.reads is Reads.NOTHING):
        what = f"`{kind}` reads no data, and `{SAMPLES}` says how much"
        yield Problem((INIT, SAMPLES), rules.CONTRADICTION(what, fix="Remove it."), on_key=True)
    model = None if start is None else options_model(start, method)
    own = {key: value for key, value in given.items() if key not in (KIND, SAMPLES)}
    if start is not None and own and data.get(start.options):
        what = f"`{INIT}` and `{start.options}` both have options of `{start.name}`"
        yield Problem((start.options,), rules.CONTRADICTION(what, fix="Give them in one place."), on_key=True)
    known = set() if model is None else {*model.model_fields}
    names = sorted(known | ({SAMPLES} if start is not None and start.reads is not Reads.NOTHING else set()))
    for key in own.keys() - known:
        fix = did_you_mean(str(key), names) or (f"Its options are {', '.join(names)}." if names else "It has none.")
        what = f"The start `{kind}` has no option `{key}`"
        yield Problem((INIT, key), rules.UNKNOWN_KEY(what, fix=fix), on_key=True)
    if model is not None:
        for problem in problems_of(model, {key: value for key, value in own.items() if key in known}):
            yield Problem((INIT, *problem.location), problem.diagnostic, problem.on_key)
