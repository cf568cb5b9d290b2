"""Which methods exist and how one is loaded: by entry-point name, on first use, without importing any other.

Closes pluggy's traps: two claims to one name are an error, a plugin that raises breaks only itself, a misspelt hook is an
error, nothing is loaded before it is asked for. `PEFTC_BLOCK=a,b@distribution` hides
plugins, or those of one distribution, `PEFTC_TRACE=1` prints every hook call.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from types import FunctionType, SimpleNamespace
from typing import Any

import pluggy

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.config.types import PeftType
from peftc.diagnostics import Diagnostic, PeftcError, Severity, did_you_mean, nearest, warn
from peftc.registry import hookspecs
from peftc.registry.boundary import is_of_user, is_out_of_memory, line_that_raised
from peftc.registry.contract import contract_problem
from peftc.tuner.method import TunerMethod

#: The distribution whose methods come with peftc.
OWN = "peftc"
#: What importlib raises on metadata that was damaged.
_DAMAGE = (AttributeError, OSError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Claim:
    """An installed plugin, known from metadata alone: nothing has been imported."""

    name: str
    module: str
    distribution: str
    version: str

    @property
    def peft_type(self) -> str:
        return self.name.upper()

    def __str__(self) -> str:
        return f"{self.module} from {self.distribution} {self.version}"


def installed() -> tuple[Claim, ...]:
    """All plugins that installed distributions claim, sorted; the same distribution listed twice counts once.

    One whose metadata cannot be read is warned of, and hides no other.
    """
    found = {Claim(entry.name, entry.value, *_named(entry)) for entry in _entries()}
    return tuple(sorted(found, key=lambda claim: (claim.name, claim.module)))


def _entries() -> Iterable[EntryPoint]:
    try:
        return entry_points(group=hookspecs.GROUP)
    except _DAMAGE:  # of some distribution: each by itself, which takes longer
        return [entry for distribution in distributions() for entry in _entries_of(distribution)]


def _entries_of(distribution: Distribution) -> Iterable[EntryPoint]:
    try:
        return distribution.entry_points.select(group=hookspecs.GROUP)
    except _DAMAGE as error:
        what = f"The entry points of a distribution in `{distribution.locate_file('')}` cannot be read: {error}"
        fix = "Install it again, or remove what is left of it."
        warn([rules.PLUGIN_BROKEN(what, fix=fix, severity=Severity.WARNING)])
        return ()


def _named(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution, as far as they can be read."""
    if entry.dist is None:
        return "?", "?"
    try:
        return str(entry.dist.name), str(entry.dist.version)
    except (*_DAMAGE, KeyError):
        return f"a distribution with damaged metadata in {entry.dist.locate_file('')}", "?"


def blocked_names() -> frozenset[str]:
    """What `PEFTC_BLOCK` names: plugins as `name`, or only one distribution's as `name@distribution`."""
    return frozenset(n.strip().lower() for n in os.environ.get("PEFTC_BLOCK", "").split(",") if n.strip())


class Registry:
    """The methods of one process. Tests make their own with `Registry(claims)` and `register`."""

    def __init__(self, claims: Iterable[Claim] | None = None, blocked: frozenset[str] | None = None) -> None:
        self.claims = installed() if claims is None else tuple(claims)
        self.blocked = blocked_names() if blocked is None else blocked
        self._methods: dict[str, TunerMethod] = {}
        self._broken: dict[str, PeftcError] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """PEFT types that can be asked for, sorted; registered in this process or installed, and not blocked."""
        names = {c.peft_type for c in self.claims if not self._blocks(c)} | set(self._methods)
        return tuple(sorted(names))

    def claims_for(self, peft_type: str) -> Sequence[Claim]:
        """Who claims the type, but for those that are blocked."""
        return [c for c in self.claims if c.peft_type == peft_type and not self._blocks(c)]

    def _blocks(self, claim: Claim) -> bool:
        return not self.blocked.isdisjoint({claim.name, f"{claim.name}@{claim.distribution}".lower()})

    def get(self, peft_type: str) -> TunerMethod:
        """The method of that type, loaded on first use. Raises `PeftcError` (unknown, blocked, conflict or broken)."""
        method = self._methods.get(peft_type)
        if method is None:
            if peft_type in self._broken:
                raise self._broken[peft_type]
            try:
                method = self._methods[peft_type] = self._load(self._only_claim(peft_type))
            except PeftcError as error:
                self._broken[peft_type] = error
                raise
        return method

    def method_of(self, config: PeftConfig) -> TunerMethod:
        """The method that a config belongs to."""
        return self.get(str(config.peft_type))

    def register(self, plugin: object, name: str = "", over: bool = True) -> TunerMethod:
        """Add a method without installing it: that of a plugin object (a module, or anything with the hook), of a hook, or of a
        record.

        Without a name for the entry point it is the one that follows from the record. Raises `PeftcError`, unless `over` also
        for a type that an installed plugin has.
        """
        claim = Claim(name, getattr(plugin, "__name__", type(plugin).__name__), "this process", "0")
        if isinstance(plugin, FunctionType):
            plugin = SimpleNamespace(peftc_tuner=plugin)
        method = self._accept(claim, plugin)
        if not over:
            self._refuse_installed(method.peft_type)
        self._methods[method.peft_type] = method
        return method

    def forget(self, peft_type: str) -> None:
        """Take a method out again that `register` added; one that is installed is loaded anew when it is asked for."""
        self._methods.pop(peft_type, None)

    def unregister(self, peft_type: str) -> None:
        """The same. Raises `PeftcError` if there is none that `register` added beside those that are installed."""
        if peft_type not in self._methods:
            raise PeftcError(self._unknown(peft_type))
        self._refuse_installed(peft_type)
        self.forget(peft_type)

    def _refuse_installed(self, peft_type: str) -> None:
        claims = self.claims_for(peft_type)
        if claims:
            what = f"`{peft_type}` is claimed by {'; '.join(map(str, claims))}, which is installed"
            fix = f"Give your method another type, or hide the installed one: `PEFTC_BLOCK={peft_type.lower()}`."
            raise PeftcError(rules.PLUGIN_CONFLICT(what, fix=fix))

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
        return sorted(name for method in self._methods.values() for name in method.public_names)

    def load_all(self) -> list[TunerMethod]:
        """Every method that can be loaded; what is wrong with another is told when it is asked for."""
        for name in self.names:
            with suppress(PeftcError):
                self.get(name)
        return [self._methods[name] for name in self.names if name in self._methods]

    def _only_claim(self, peft_type: str) -> Claim:
        claims = self.claims_for(peft_type)
        if not claims and any(c.peft_type == peft_type for c in self.claims):
            fix = f"Take `{peft_type.lower()}` out of PEFTC_BLOCK."
            raise PeftcError(rules.PLUGIN_BLOCKED(f"`{peft_type}` is installed but blocked", fix=fix))
        if not claims:
            raise PeftcError(self._unknown(peft_type))
        if len(claims) > 1:
            who = "; ".join(map(str, claims))
            fix = f"Uninstall all but one of them, or hide the others: `PEFTC_BLOCK={_hiding(claims)}`."
            raise PeftcError(rules.PLUGIN_CONFLICT(f"`{peft_type}` is claimed by {who}", fix=fix))
        return claims[0]

    def reason_missing(self, public_name: str) -> PeftcError | None:
        """Why a public name that nothing declares is not there: its plugin is broken, claimed twice, or blocked.

        Which plugin would declare a name follows from the type: `FakeConfig` would be of `FAKE`.
        """
        types = {c.peft_type.replace("_", "").lower(): c.peft_type for c in self.claims}
        peft_type = types.get(_stem(public_name))
        if peft_type is None or peft_type in self._methods:
            return None
        try:
            self.get(peft_type)
        except PeftcError as error:
            return error
        return None

    @property
    def out_of_order(self) -> tuple[Diagnostic, ...]:
        """What is wrong with the plugins that were asked for and could not be loaded."""
        claimed = {c.peft_type for c in self.claims}
        return tuple(d for name, error in self._broken.items() if name in claimed for d in error.diagnostics)

    def _unknown(self, peft_type: str) -> Diagnostic:
        hint = did_you_mean(peft_type.upper(), self.names)
        install = f"Install the plugin that brings it: a distribution with an entry point `{peft_type.lower()}` in the group `{hookspecs.GROUP}`."
        known = ", ".join(self.names)
        return rules.UNKNOWN_TYPE(
            f"No method is called `{peft_type}`; installed are {known}", fix=f"{hint} {install}".strip()
        )

    def _load(self, claim: Claim) -> TunerMethod:
        try:
            plugin = importlib.import_module(claim.module)
        except BaseException as error:  # the plugin boundary: whatever a stranger's module does becomes a diagnostic
            if is_of_user(error) or is_out_of_memory(error):
                raise
            fix = f"{_at(error)}Repair or uninstall {claim.distribution}; other methods work meanwhile."
            what = f"Importing {claim} raised {type(error).__name__}: {error}"
            raise PeftcError(rules.PLUGIN_BROKEN(what, fix=fix)) from error
        return self._accept(claim, plugin)

    def _accept(self, claim: Claim, plugin: object) -> TunerMethod:
        method = plugin if isinstance(plugin, TunerMethod) else self._asked(claim, plugin)
        own = str(method.peft_type).upper() if isinstance(method, TunerMethod) else ""
        problem = contract_problem(claim.peft_type or own, method)
        if problem:
            raise PeftcError(rules.PLUGIN_INVALID(f"{claim}: {problem}", fix="Correct the plugin's record."))
        accepted: TunerMethod = method
        return accepted

    def _asked(self, claim: Claim, plugin: object) -> Any:
        """What the hook of a plugin object returns."""
        manager = _manager()
        try:
            manager.register(plugin, claim.name or claim.module)
            manager.check_pending()
            return manager.hook.peftc_tuner()
        except BaseException as error:  # the plugin boundary
            if is_of_user(error) or is_out_of_memory(error):
                raise
            what = f"{claim} failed while registering: {type(error).__name__}: {error}"
            told = rules.PLUGIN_BROKEN(what, fix=f"{_at(error)}The hook is `peftc_tuner()`, marked `@hookimpl`.")
            raise PeftcError(told) from error


def _at(error: BaseException) -> str:
    """The line of the plugin that raised, as a sentence before others."""
    line = line_that_raised(error)
    return f"The line that raised: {line}. " if line else ""


def _stem(public_name: str) -> str:
    """What a public name of a method begins with, as the name of its type would be written."""
    stem = public_name.lower()
    for role in ("config", "model", "layer"):
        stem = stem.removesuffix(role)
    return stem


def _hiding(claims: Sequence[Claim]) -> str:
    """What to block so that one of the claims is left: that of peftc itself if there is one, else the first."""
    kept = next((claim for claim in claims if claim.distribution == OWN), claims[0])
    return ",".join(f"{claim.name}@{claim.distribution}" for claim in claims if claim is not kept)


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("PEFTC_TRACE"):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return manager


@cache
def default_registry() -> Registry:
    """The registry of installed plugins, made on first use."""
    return Registry()


PeftType.known = lambda: default_registry().names
