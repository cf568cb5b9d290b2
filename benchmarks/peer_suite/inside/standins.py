"""Stand-ins for names of the reference that the alias does not have, for the code of its tests alone.

Nearly every file of tests imports some name of a method that peftc does not have yet, and one such name would take the whole
file down. So the tests get a class in its place, which raises as soon as a running test calls it or asks it for anything.
What each test used of these is kept, and so is every report of an option that is still to come, also where a test swallows it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import peftc.compat
from peftc import rules
from peftc.compat import finder, names

#: The package of the reference's tests.
SUITE = "tests"
#: What the running test used of what is not here; `take_used` empties it.
_used: set[str] = set()
_state = {"running": False}


class StandInError(Exception):
    """A test used something that peftc does not have."""


def running(value: bool) -> None:
    """Say whether a test runs: outside of one, at the top of a file, a stand-in may be called."""
    _state["running"] = value


def take_used() -> list[str]:
    """What was used since the last time."""
    found = sorted(_used)
    _used.clear()
    return found


class _StandIn(type):
    """A class in the place of a name; `full` is where the reference has it."""

    full: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not _state["running"]:  # only those tests are to fail that use the result
            return _Made(cls.full)
        _used.add(cls.full)
        raise StandInError(f"{cls.full} was called, which peftc does not have")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or name == "pytestmark":
            raise AttributeError(name)
        if not _state["running"]:
            return stand_in(f"{cls.full}.{name}")
        _used.add(cls.full)
        raise AttributeError(f"{cls.full} was asked for {name}, and peftc does not have it")

    def __instancecheck__(cls, instance: object) -> bool:
        return False  # a question alone is no use of it

    def __iter__(cls) -> Any:
        _used.add(cls.full)
        raise StandInError(f"{cls.full} was iterated over, which peftc does not have")


class _Made:
    """What a stand-in gives when it is called at the top of a file."""

    def __init__(self, full: str) -> None:
        object.__setattr__(self, "full", full)

    def __getattribute__(self, name: str) -> Any:
        full = object.__getattribute__(self, "__dict__").get("full", "something")  # a copy has no name
        if name == "__class__":  # what `isinstance` asks for
            if _state["running"]:
                _used.add(full)
            return _Made
        if name.startswith("__") or name == "pytestmark" or not _state["running"]:
            return object.__getattribute__(self, name)
        _used.add(full)
        raise StandInError(f"an object of {full} was asked for {name}, and peftc does not have it")


_made: dict[str, _StandIn] = {}


def stand_in(full: str) -> _StandIn:
    """The class in the place of a name, the same each time."""
    if full not in _made:
        module, _, name = full.rpartition(".")
        _made[full] = _StandIn(name, (), {"full": full, "__module__": module})
    return _made[full]


def _asked_by_suite() -> bool:
    """Whether the code that asks is that of the tests."""
    frame = sys._getframe(2)
    own = ("importlib", __name__, "peftc.compat")
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(own):
        frame = frame.f_back
    asker = str(frame.f_globals.get("__name__", ""))
    return asker == SUITE or asker.startswith(f"{SUITE}.")


class _StandInModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _value(self.__name__, name)


def _value(module: str, name: str) -> Any:
    """Questions about installed packages are answered with no; all else is a stand-in."""
    if module == "peft.import_utils" and name.startswith("is_"):
        return lambda *args, **kwargs: False
    return stand_in(f"{module}.{name}")


class _Finder(MetaPathFinder, Loader):
    """Comes before the alias' own finder and takes the modules that the alias lacks, for imports of the tests."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{finder.ROOT}.") or names.is_module(fullname) or not _asked_by_suite():
            return None
        return ModuleSpec(fullname, self, origin=__name__, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Put the alias in place, and the stand-ins in front of it."""
    peftc.compat.install()
    sys.meta_path.insert(0, _Finder())
    own = finder.AliasModule.__getattr__

    def with_stand_ins(self: finder.AliasModule, name: str) -> Any:
        try:
            return own(self, name)
        except AttributeError:
            if name.startswith("__") or not _asked_by_suite():
                raise
            return _value(self.__name__, name)

    finder.AliasModule.__getattr__ = with_stand_ins  # type: ignore[method-assign]
    _watch_options()
    _let_fixture_look()


def _let_fixture_look() -> None:
    """Before each test of a class a fixture looks whether transformers has patched a method, which its releases from 5.18 on
    do not: what these tests test is something else."""
    wrapper = importlib.import_module("peft.tuners.lora.layer").ParamWrapper
    wrapper.update_layer = stand_in("peft.tuners.lora.layer.ParamWrapper.update_layer")


def _watch_options() -> None:
    """Note every report of an option that is to come."""
    rule = rules.OPTION_NOT_AVAILABLE
    call = type(rule).__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is rule:
            _used.add(f"option {kwargs.get('where')}")
        return call(self, *args, **kwargs)

    type(rule).__call__ = noted  # type: ignore[method-assign]
