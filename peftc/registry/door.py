"""Doors: how records of strangers come in, whichever kind they are of. By entry-point name, on first use, importing no other.

Each kind of record (a method, a variant) is a subclass of `Door` that names its entry-point group and its hook. Closes
pluggy's traps: two claims to one name are an error, a plugin that raises breaks only itself, a misspelt hook is an error,
nothing is loaded before it is asked for. `PEFTC_BLOCK=a,b@distribution` hides plugins, or those of one distribution,
`PEFTC_TRACE=1` prints every hook call.
"""

from __future__ import annotations

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar, Generic, TypeVar

import pluggy

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError, Severity, warn
from peftc.registry import hookspecs
from peftc.registry.boundary import is_of_user, is_out_of_memory, line_that_raised

#: What comes in by a door.
R = TypeVar("R")
#: The distribution whose plugins come with peftc.
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


def installed(group: str = hookspecs.GROUP) -> tuple[Claim, ...]:
    """All plugins of a group that installed distributions claim, sorted; the same distribution listed twice counts once.

    One whose metadata cannot be read is warned of, and hides no other.
    """
    found = {Claim(entry.name, entry.value, *_named(entry)) for entry in _entries(group)}
    return tuple(sorted(found, key=lambda claim: (claim.name, claim.module)))


def _entries(group: str) -> Iterable[EntryPoint]:
    try:
        return entry_points(group=group)
    except _DAMAGE:  # of some distribution: each by itself, which takes longer
        return [entry for distribution in distributions() for entry in _entries_of(distribution, group)]


def _entries_of(distribution: Distribution, group: str) -> Iterable[EntryPoint]:
    try:
        return distribution.entry_points.select(group=group)
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


class Door(ABC, Generic[R]):
    """The records of one kind in one process. A record is asked for by its key, which follows from the entry's name."""

    #: the entry-point group
    group: ClassVar[str]
    #: the hook that gives a record
    hook: ClassVar[str]
    #: the class of records
    record: ClassVar[type[Any]]

    def __init__(self, claims: Iterable[Claim] | None = None, blocked: frozenset[str] | None = None) -> None:
        self.claims = installed(self.group) if claims is None else tuple(claims)
        self.blocked = blocked_names() if blocked is None else blocked
        self._records: dict[str, R] = {}
        self._broken: dict[str, PeftcError] = {}

    # what a kind of record says ------------------------------------------------------------------------------------

    def key(self, name: str) -> str:
        """The key of the entry of this name."""
        return name

    @abstractmethod
    def key_of(self, record: R) -> str:
        """The key of a record."""

    @abstractmethod
    def problem(self, key: str, answer: object) -> str:
        """What keeps the answer of a hook from being the record that is asked for by this key; empty if nothing does."""

    @abstractmethod
    def unknown(self, key: str) -> Diagnostic:
        """That nothing is called so."""

    # asking --------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Keys that can be asked for, sorted; registered in this process or installed, and not blocked."""
        names = {self.key(c.name) for c in self.claims if not self._blocks(c)} | set(self._records)
        return tuple(sorted(names))

    def claims_for(self, key: str) -> Sequence[Claim]:
        """Who claims the key, but for those that are blocked."""
        return [c for c in self.claims if self.key(c.name) == key and not self._blocks(c)]

    def _blocks(self, claim: Claim) -> bool:
        return not self.blocked.isdisjoint({claim.name, f"{claim.name}@{claim.distribution}".lower()})

    def get(self, key: str) -> R:
        """The record of that key, loaded on first use. Raises `PeftcError` (unknown, blocked, conflict or broken)."""
        record = self._records.get(key)
        if record is None:
            if key in self._broken:
                raise self._broken[key]
            try:
                record = self._records[key] = self._load(self._only_claim(key))
            except PeftcError as error:
                self._broken[key] = error
                raise
        return record

    def load_all(self) -> list[R]:
        """Every record that can be loaded; what is wrong with another is told when it is asked for."""
        for name in self.names:
            with suppress(PeftcError):
                self.get(name)
        return [self._records[name] for name in self.names if name in self._records]

    @property
    def out_of_order(self) -> tuple[Diagnostic, ...]:
        """What is wrong with the plugins that were asked for and could not be loaded."""
        claimed = {self.key(c.name) for c in self.claims}
        return tuple(d for name, error in self._broken.items() if name in claimed for d in error.diagnostics)

    # in this process -----------------------------------------------------------------------------------------------

    def register(self, plugin: object, name: str = "", over: bool = True) -> R:
        """Add a record without installing it: that of a plugin object (a module, or anything with the hook), of a hook, or
        the record itself.

        Without a name for the entry point it is the one that follows from the record. Raises `PeftcError`, unless `over` also
        for a key that an installed plugin has.
        """
        claim = Claim(name, getattr(plugin, "__name__", type(plugin).__name__), "this process", "0")
        if isinstance(plugin, FunctionType):
            plugin = SimpleNamespace(**{self.hook: plugin})
        record = self._accept(claim, plugin)
        key = self.key_of(record)
        if not over:
            self._refuse_installed(key)
        self._records[key] = record
        return record

    def forget(self, key: str) -> None:
        """Take a record out again that `register` added; one that is installed is loaded anew when it is asked for."""
        self._records.pop(key, None)

    def unregister(self, key: str) -> None:
        """The same. Raises `PeftcError` if there is none that `register` added beside those that are installed."""
        if key not in self._records:
            raise PeftcError(self.unknown(key))
        self._refuse_installed(key)
        self.forget(key)

    def _refuse_installed(self, key: str) -> None:
        claims = self.claims_for(key)
        if claims:
            what = f"`{key}` is claimed by {'; '.join(map(str, claims))}, which is installed"
            fix = f"Give your own another name, or hide the installed one: `PEFTC_BLOCK={claims[0].name}`."
            raise PeftcError(rules.PLUGIN_CONFLICT(what, fix=fix))

    # loading -------------------------------------------------------------------------------------------------------

    def _only_claim(self, key: str) -> Claim:
        claims = self.claims_for(key)
        hidden = [c for c in self.claims if self.key(c.name) == key]
        if not claims and hidden:
            fix = f"Take `{hidden[0].name}` out of PEFTC_BLOCK."
            raise PeftcError(rules.PLUGIN_BLOCKED(f"`{key}` is installed but blocked", fix=fix))
        if not claims:
            raise PeftcError(self.unknown(key))
        if len(claims) > 1:
            who = "; ".join(map(str, claims))
            fix = f"Uninstall all but one of them, or hide the others: `PEFTC_BLOCK={_hiding(claims)}`."
            raise PeftcError(rules.PLUGIN_CONFLICT(f"`{key}` is claimed by {who}", fix=fix))
        return claims[0]

    def _load(self, claim: Claim) -> R:
        try:
            plugin = importlib.import_module(claim.module)
        except BaseException as error:  # the plugin boundary: whatever a stranger's module does becomes a diagnostic
            if is_of_user(error) or is_out_of_memory(error):
                raise
            fix = f"{_at(error)}Repair or uninstall {claim.distribution}; other methods work meanwhile."
            what = f"Importing {claim} raised {type(error).__name__}: {error}"
            raise PeftcError(rules.PLUGIN_BROKEN(what, fix=fix)) from error
        return self._accept(claim, plugin)

    def _accept(self, claim: Claim, plugin: object) -> R:
        answer = plugin if isinstance(plugin, self.record) else self._asked(claim, plugin)
        problem = self.problem(self.key(claim.name) if claim.name else "", answer)
        if problem:
            raise PeftcError(rules.PLUGIN_INVALID(f"{claim}: {problem}", fix="Correct the plugin's record."))
        accepted: R = answer
        return accepted

    def _asked(self, claim: Claim, plugin: object) -> Any:
        """What the hook of a plugin object returns."""
        manager = _manager()
        try:
            manager.register(plugin, claim.name or claim.module)
            manager.check_pending()
            return getattr(manager.hook, self.hook)()
        except BaseException as error:  # the plugin boundary
            if is_of_user(error) or is_out_of_memory(error):
                raise
            what = f"{claim} failed while registering: {type(error).__name__}: {error}"
            told = rules.PLUGIN_BROKEN(what, fix=f"{_at(error)}The hook is `{self.hook}()`, marked `@hookimpl`.")
            raise PeftcError(told) from error


def _at(error: BaseException) -> str:
    """The line of the plugin that raised, as a sentence before others."""
    line = line_that_raised(error)
    return f"The line that raised: {line}. " if line else ""


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
