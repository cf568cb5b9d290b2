"""Which methods exist and how one is loaded, and with it the variants of it that others bring: doors are in
`peftc.registry.door`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, cached_property
from typing import Any, ClassVar

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.config.types import PeftType
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean, nearest
from peftc.registry import hookspecs
from peftc.registry.contract import contract_problem
from peftc.registry.door import OWN, Claim, Door, blocked_names, installed
from peftc.registry.variants import Variants, variant_key
from peftc.tuner.method import TunerMethod
from peftc.tuner.variant import Variant, named_variant

__all__ = ["OWN", "Claim", "Registry", "blocked_names", "default_registry", "installed"]


class Registry(Door[TunerMethod]):
    """The methods of one process. Tests make their own with `Registry(claims)` and `register`."""

    group: ClassVar[str] = hookspecs.GROUP
    hook: ClassVar[str] = "peftc_tuner"
    record: ClassVar[type[TunerMethod]] = TunerMethod

    def __init__(self, claims: Iterable[Claim] | None = None, blocked: frozenset[str] | None = None) -> None:
        super().__init__(claims, blocked)
        self._given = claims is not None
        self._with: dict[str, tuple[TunerMethod, Variant[Any], TunerMethod]] = {}

    @cached_property
    def variants(self) -> Variants:
        """The door of variants that others bring; looked for when a config first names one."""
        return Variants(() if self._given else None, self.blocked)

    def key(self, name: str) -> str:
        return name.upper()

    def key_of(self, record: TunerMethod) -> str:
        return record.peft_type

    def problem(self, key: str, answer: object) -> str:
        own = str(answer.peft_type).upper() if isinstance(answer, TunerMethod) else ""
        return contract_problem(key or own, answer)

    def method_of(self, config: PeftConfig) -> TunerMethod:
        """The method that a config belongs to, with the variant that it names. Raises `PeftcError` as `get` does, for a
        variant too."""
        method, name = self.get(str(config.peft_type)), named_variant(config)
        if not name:
            return method
        key = variant_key(method.peft_type, name)
        variant, known = self.variants.get(key), self._with.get(key)
        if known is None or known[0] is not method or known[1] is not variant:
            known = self._with[key] = (method, variant, method.with_variant(variant))
        return known[2]

    def find_name(self, public_name: str) -> tuple[TunerMethod, str] | None:
        """The method that declares a public name and what it is (`"config"`, `"model"`, `"layer"`, `"encoder"`, `"export"`).

        Plugins are tried by likeness of name, so the usual name imports its own plugin and no other.
        """
        stem = _stem(public_name)
        names = {name.replace("_", "").lower(): name for name in self.names}
        order = dict.fromkeys([*([stem] if stem in names else []), *nearest(stem, names), *names])
        for key in order:
            try:
                method = self.get(names[key])
            except PeftcError:
                continue  # broken plugins are reported when they are asked for by type
            role = method.public_names.get(public_name, "")
            if role:
                return method, role
        return None

    def public_names(self) -> list[str]:
        """Public names of the methods loaded so far; after a `find_name` that found nothing, those of all."""
        return sorted(name for method in self._records.values() for name in method.public_names)

    def reason_missing(self, public_name: str) -> PeftcError | None:
        """Why a public name that nothing declares is not there: its plugin is broken, claimed twice, or blocked.

        Which plugin would declare a name follows from the type: `FakeConfig` would be of `FAKE`.
        """
        types = {c.peft_type.replace("_", "").lower(): c.peft_type for c in self.claims}
        peft_type = types.get(_stem(public_name))
        if peft_type is None or peft_type in self._records:
            return None
        try:
            self.get(peft_type)
        except PeftcError as error:
            return error
        return None

    def unknown(self, key: str) -> Diagnostic:
        hint = did_you_mean(key.upper(), self.names)
        install = f"Install the plugin that brings it: a distribution with an entry point `{key.lower()}` in the group `{self.group}`."
        known = ", ".join(self.names)
        return rules.UNKNOWN_TYPE(
            f"No method is called `{key}`; installed are {known}", fix=f"{hint} {install}".strip()
        )


def _stem(public_name: str) -> str:
    """What a public name of a method begins with, as the name of its type would be written."""
    stem = public_name.lower()
    for role in ("config", "model", "layer"):
        stem = stem.removesuffix(role)
    return stem


@cache
def default_registry() -> Registry:
    """The registry of installed plugins, made on first use."""
    return Registry()


PeftType.known = lambda: default_registry().names
