"""The alias: `install()` makes `import peft` mean peftc in this process, for libraries that were written for the reference.

Nothing is imported by it but what is asked for later. It must come before the first import of such a library.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Final

from peftc import rules
from peftc._version import VERSION as _OWN
from peftc.compat.finder import ROOT, AliasFinder, AliasModule
from peftc.compat.pins import unmet, version_said
from peftc.diagnostics import Diagnostic, PeftcError, warn
from peftc.host import clients

#: what `peft.__version__` and the distribution's metadata say; `pins.json` has the reasons
VERSION: Final = f"{version_said()}+peftc.{_OWN}"

_FIX = "Call `peftc.compat.install()` first in the program, or start it with `peftc run`."


def install() -> None:
    """Make `import peft`, its submodules and the metadata of its distribution mean peftc; a second call does nothing.

    Wins over an installed `peft`. Raises `PeftcError`, with nothing changed, if the real one was imported already, if a
    library looked for `peft` before, found none, and will not look again, or if another copy of peftc has its alias in
    place. Warns of libraries here that ask for another version of `peft` than the alias can say.
    """
    found = conflicts()
    if found:
        raise PeftcError(found)
    if installed():
        return
    sys.meta_path.insert(0, AliasFinder(VERSION))
    clients.forget_answers()
    warn(unmet())


def uninstall() -> None:
    """Take the alias out again. Libraries that imported from it keep what they have."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AliasFinder)]
    for name in [name for name, module in sys.modules.items() if isinstance(module, AliasModule)]:
        del sys.modules[name]
    clients.forget_answers()


def installed() -> bool:
    """Whether the alias is in place."""
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def conflicts() -> list[Diagnostic]:
    """What in this process is in the alias' way, or beside it: the real `peft`, what holds it, another peftc's alias."""
    return [*_real_one(), *_too_late(), *_twice()]


def _real_one() -> list[Diagnostic]:
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == ROOT]
    real = [module for module in modules if not _is_alias(module)]
    if not real:
        return []
    version = getattr(real[0], "__version__", "of unknown version")
    return [rules.REAL_PEFT_IMPORTED(f"The package `peft` {version} is imported already", fix=_FIX)]


def _twice() -> list[Diagnostic]:
    others: list[Any] = [
        finder for finder in sys.meta_path if _is_of(type(finder), AliasFinder) and type(finder) is not AliasFinder
    ]
    return [
        rules.ALIAS_TWICE(
            f"Another copy of peftc has its alias in place, which says `peft` {finder.distribution.version}",
            fix="Keep one copy: `pip uninstall peftc` until none is left, then `pip install peftc`; do not import it anew.",
        )
        for finder in others
    ]


def _is_alias(module: ModuleType) -> bool:
    """Whether a module is one of an alias', be it another copy's."""
    return _is_of(type(module), AliasModule)


def _is_of(found: type, ours: type) -> bool:
    """Whether a class is ours or the same of another copy of peftc: those have the same name and are not the same."""
    return (found.__module__, found.__qualname__) == (ours.__module__, ours.__qualname__)


def _too_late() -> list[Diagnostic]:
    if installed():
        return []
    late = clients.looked_in_vain()
    return [rules.ALIAS_TOO_LATE(f"`{name}` was imported before, and found no `peft`", fix=_FIX) for name in late]
