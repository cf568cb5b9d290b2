"""Which variants of methods other packages bring."""

from __future__ import annotations

from typing import Any, ClassVar

from peftc import rules
from peftc.diagnostics import Diagnostic, did_you_mean
from peftc.registry import hookspecs
from peftc.registry.contract import variant_problem
from peftc.registry.door import Door
from peftc.tuner.variant import Variant


class Variants(Door[Variant[Any]]):
    """The variants of one process, by `<peft type>.<name>` in lower case."""

    group: ClassVar[str] = hookspecs.VARIANTS
    hook: ClassVar[str] = "peftc_variant"
    record: ClassVar[type[Any]] = Variant

    def key(self, name: str) -> str:
        return name.lower()

    def key_of(self, record: Variant[Any]) -> str:
        return variant_key(record.peft_type, record.name)

    def problem(self, key: str, answer: object) -> str:
        return variant_problem(key, answer)

    def unknown(self, key: str) -> Diagnostic:
        peft_type, _, name = key.partition(".")
        known = [other.partition(".")[2] for other in self.names if other.startswith(f"{peft_type}.")]
        hint = did_you_mean(name, known)
        install = f"Install the package that brings it: a distribution with an entry point `{key}` in the group `{self.group}`."
        there = f"installed are {', '.join(known)}" if known else "no package brings any"
        what = f"{peft_type.upper()} has no variant `{name}`; {there}"
        return rules.UNKNOWN_VARIANT(what, fix=f"{hint} {install}".strip(), where="variant")


def variant_key(peft_type: str, name: str) -> str:
    """What a variant of a method is asked for by."""
    return f"{peft_type}.{name}".lower()
