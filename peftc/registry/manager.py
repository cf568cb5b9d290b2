"""Which methods exist and how one is loaded: by entry-point name, on first use, without importing any other.

Closes pluggy's traps: two claims to one name are an error, a plugin that raises breaks only itself, a misspelt hook is an
error, nothing is loaded before it is asked for. `PEFTC_BLOCK=a,b` hides plugins, `PEFTC_TRACE=1` prints every hook call.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

import pluggy

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean, nearest
from peftc.registry import hookspecs
from peftc.tuner.method import TunerMethod


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
    """All plugins that installed distributions claim, sorted; the same distribution listed twice counts once."""
    found = {
        Claim(e.name, e.value, e.dist.name if e.dist else "?", e.dist.version if e.dist else "?")
        for e in entry_points(group=hookspecs.GROUP)
    }
    return tuple(sorted(found, key=lambda claim: (claim.name, claim.module)))


def blocked_names() -> frozenset[str]:
    """Names in `PEFTC_BLOCK`."""
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
        names = {c.peft_type for c in self.claims if c.name not in self.blocked} | set(self._methods)
        return tuple(sorted(names))

    def claims_for(self, peft_type: str) -> Sequence[Claim]:
        return [c for c in self.claims if c.peft_type == peft_type]

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

    def register(self, plugin: object, name: str) -> TunerMethod:
        """Add a plugin object (a module, or anything with the hook) without installing it. Raises `PeftcError`."""
        claim = Claim(name, getattr(plugin, "__name__", type(plugin).__name__), "this process", "0")
        method = self._accept(claim, plugin)
        self._methods[method.peft_type] = method
        return method

    def forget(self, peft_type: str) -> None:
        """Take a method out again that `register` added; one that is installed is loaded anew when it is asked for."""
        self._methods.pop(peft_type, None)

    def find_name(self, public_name: str) -> tuple[TunerMethod, str] | None:
        """The method that declares a public name and what it is (`"config"`, `"model"`, `"layer"`, `"encoder"`, `"export"`).

        Plugins are tried by likeness of name, so the usual name imports its own plugin and no other.
        """
        stem = public_name.lower()
        for role in ("config", "model", "layer"):
            stem = stem.removesuffix(role)
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

    def _only_claim(self, peft_type: str) -> Claim:
        claims = self.claims_for(peft_type)
        if not claims:
            raise PeftcError(self._unknown(peft_type))
        if claims[0].name in self.blocked:
            fix = f"Take `{claims[0].name}` out of PEFTC_BLOCK."
            raise PeftcError(rules.PLUGIN_BLOCKED(f"`{peft_type}` is installed but blocked", fix=fix))
        if len(claims) > 1:
            who = "; ".join(map(str, claims))
            fix = f"Uninstall all but one of them, or set PEFTC_BLOCK={claims[0].name} to do without."
            raise PeftcError(rules.PLUGIN_CONFLICT(f"`{peft_type}` is claimed by {who}", fix=fix))
        return claims[0]

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
        except Exception as error:  # the plugin boundary: whatever a stranger's module does becomes a diagnostic
            fix = f"Repair or uninstall {claim.distribution}; other methods work meanwhile."
            what = f"Importing {claim} raised {type(error).__name__}: {error}"
            raise PeftcError(rules.PLUGIN_BROKEN(what, fix=fix)) from error
        return self._accept(claim, plugin)

    def _accept(self, claim: Claim, plugin: object) -> TunerMethod:
        manager = _manager()
        try:
            manager.register(plugin, claim.name)
            manager.check_pending()
            method = manager.hook.peftc_tuner()
        except Exception as error:  # the plugin boundary
            what = f"{claim} failed while registering: {type(error).__name__}: {error}"
            raise PeftcError(
                rules.PLUGIN_BROKEN(what, fix="The hook is `peftc_tuner()`, marked `@hookimpl`.")
            ) from error
        problem = _contract_problem(claim, method)
        if problem:
            raise PeftcError(rules.PLUGIN_INVALID(f"{claim}: {problem}", fix="Correct the plugin's record."))
        accepted: TunerMethod = method
        return accepted


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("PEFTC_TRACE"):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return manager


def _contract_problem(claim: Claim, method: object) -> str:
    if method is None:
        return "no function is marked `@hookimpl` and called `peftc_tuner`"
    if not isinstance(method, TunerMethod):
        return f"`peftc_tuner` returned a `{type(method).__name__}`, not a `TunerMethod`"
    if method.peft_type != claim.peft_type:
        return f"the record says `{method.peft_type}`, the entry point `{claim.peft_type}`"
    if not (isinstance(method.config, type) and issubclass(method.config, PeftConfig)):
        return "`config` is not a subclass of `PeftConfig`"
    default = method.config.model_fields["peft_type"].default
    if default != method.peft_type:
        return f"`{method.config.__name__}.peft_type` is `{default}`, not `{method.peft_type}`"
    if not method.is_prompt and method.call_tuner is None and not (method.prefix and method.layer_names):
        return "a method on layers needs a `prefix` and `layer_names`"
    stray = [n for n in method.layer_names if not n.startswith(method.prefix)]
    return f"slots {stray} do not begin with the prefix `{method.prefix}`" if stray else ""


@cache
def default_registry() -> Registry:
    """The registry of installed plugins, made on first use."""
    return Registry()
