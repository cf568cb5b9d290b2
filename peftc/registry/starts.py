"""Which starts there are: entry-point group `peftc.starts`, the entry's name is the value of the option that names one.

The bundled ones come through the same door as those of any other package. A value may go on after the name: `pissa_niter_4` is
`pissa` with the argument `niter_4`; of several names that fit, the longest counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from peftc import rules
from peftc.config.base import ConfigModel, PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError, Where, did_you_mean
from peftc.graph.nodes import Kind
from peftc.registry import hookspecs
from peftc.registry.boundary import boundary
from peftc.registry.door import Door
from peftc.tuner.method import TunerMethod
from peftc.tuner.start import Chosen, Reads, Start


class Starts(Door[Start]):
    """The starts of one process."""

    group: ClassVar[str] = hookspecs.STARTS_GROUP
    hook: ClassVar[str] = "peftc_start"
    record: ClassVar[type[Any]] = Start

    def key_of(self, record: Start) -> str:
        return record.name

    def problem(self, key: str, answer: object) -> str:
        if answer is None:
            return "no function is marked `@hookimpl` and called `peftc_start`"
        if not isinstance(answer, Start):
            return f"`peftc_start` returned a `{type(answer).__name__}`, not a `Start`"
        return "; ".join(_wrong(answer, key))

    def unknown(self, key: str) -> Diagnostic:
        hint = did_you_mean(key, self.names)
        install = f"Install the package that brings it: one with an entry point `{key}` in the group `{self.group}`."
        what = f"No start is called `{key}`; there are {', '.join(self.names)}"
        return rules.START_UNKNOWN(what, fix=f"{hint} {install}".strip())

    def named(self, value: str) -> Chosen:
        """The start that a value means. Raises `PeftcError` (unknown, blocked, conflict or broken)."""
        text = value.lower()
        known = {self.key(claim.name) for claim in self.claims} | set(self._records)
        name = max((name for name in known if f"{text}_".startswith(f"{name}_")), key=len, default=text)
        return Chosen(self.get(name), text[len(name) + 1 :])


def _wrong(start: Start, key: str) -> Iterator[str]:
    name = getattr(start, "name", None)
    if not isinstance(name, str) or name != name.lower() or not name:
        yield f"`name` is {name!r:.60}, not a text in lower case"
    elif key and name != key:
        yield f"the record says `{name}`, the entry point `{key}`"
    if not isinstance(start.kinds, frozenset) or not all(isinstance(kind, Kind) for kind in start.kinds):
        yield f"`kinds` is {start.kinds!r:.60}, not a frozenset of `Kind`"
    if not isinstance(start.reads, Reads):
        yield f"`reads` is {start.reads!r:.60}, not one of `Reads`"
    if not (start.how is None or (isinstance(start.how, type) and issubclass(start.how, ConfigModel))):
        yield f"`how` is {start.how!r:.60}, not a subclass of `ConfigModel`"
    if not isinstance(start.arguments, tuple) or not all(isinstance(text, str) for text in start.arguments):
        yield f"`arguments` is {start.arguments!r:.60}, not a tuple of texts"
    if not isinstance(start.needs, Mapping):
        yield f"`needs` is {start.needs!r:.60}, not options by name"
    if start.frozen not in ("", "A", "B"):
        yield f"`frozen` is {start.frozen!r:.60}, not `A`, `B` or empty"


@cache
def default_starts() -> Starts:
    """The starts that are installed, made on first use."""
    return Starts()


def start_of(method: TunerMethod, config: PeftConfig) -> Chosen | None:
    """The start that an adapter's options name, or that of the variant that they choose; None where the method begins by
    itself. Raises `PeftcError`."""
    variant = method.variant_for(config)
    if variant is not None and variant.start is not None:
        return Chosen(variant.start, "", along=variant.option)
    return _named(method, config)


def _named(method: TunerMethod, config: PeftConfig) -> Chosen | None:
    if not method.start_option:
        return None
    value = getattr(config, method.start_option)
    if not isinstance(value, str) or value.lower() in method.own_starts:
        return None
    return default_starts().named(value)


def start_problems(method: TunerMethod, config: PeftConfig, loading: bool = False) -> Iterator[Diagnostic]:
    """What is wrong with the start that options name, before any layer is looked at. Where all is loaded, what factors began
    with does not matter."""
    try:
        chosen = start_of(method, config)
        if chosen is None:
            return
        with boundary(f"the start `{chosen.start.name}`", "check"):
            yield from chosen.start.check(config, chosen.argument)
        other = _named(method, config) if chosen.along else None
        if other is not None and (other.start.changes_base or not loading):
            what = f"`{chosen.along}` has a start of its own, and {other.said(method.start_option)} names another"
            fix = f"Set `{method.start_option}: true`, or remove `{chosen.along}`."
            yield rules.CONTRADICTION(what, fix=fix, where=method.start_option)
        if chosen.start.changes_base and not any(tuner.lowerings & {"thin", "rescaled"} for tuner in method.map_tuners):
            what = f"{chosen.said(method.start_option)} takes what the factors add out of the base weight"
            why = f"What {method.peft_type} adds is not the product of its factors."
            fix = f"Choose another `{method.start_option}`, or a method that adds such a product."
            yield rules.START_UNFIT(what, why=why, fix=fix, where=method.start_option)
    except PeftcError as error:
        where = Where(path=method.start_option)
        yield from (told if told.where.path else replace(told, where=where) for told in error.diagnostics)


def known_start(method: TunerMethod, config: PeftConfig) -> Chosen | None:
    """The same as `start_of`, and None for one that cannot be used: that is told by `start_problems`."""
    with suppress(PeftcError):
        return start_of(method, config)
    return None
