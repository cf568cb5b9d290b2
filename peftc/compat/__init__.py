"""The alias: `install()` makes `import peft` mean peftc in this process, for libraries that were written for the reference.

Nothing is imported by it but what is asked for later. It must come before the first import of such a library.
"""

from __future__ import annotations

import sys
from typing import Final

from peftc import rules
from peftc._version import VERSION as _OWN
from peftc.compat.finder import ROOT, AliasFinder, AliasModule
from peftc.diagnostics import Diagnostic, PeftcError

#: what `peft.__version__` and the distribution's metadata say: the newest version that every pin in use admits
VERSION: Final = f"0.20.0+peftc.{_OWN}"

#: modules that look for `peft` once, while they are imported, and the name in them that says whether they found it
_LOOKED_ONCE = {
    "transformers.trainer_utils": "PeftModel",
    "diffusers.utils.import_utils": "_peft_available",
}

_FIX = "Call `peftc.compat.install()` first in the program, or start it with `peftc run`."


def install() -> None:
    """Make `import peft`, its submodules and the metadata of its distribution mean peftc; a second call does nothing.

    Wins over an installed `peft`. Raises `PeftcError`, with nothing changed, if the real one was imported already, or
    if a library looked for `peft` before, found none, and will not look again.
    """
    if installed():
        return
    problems = [*_real_one(), *_too_late()]
    if problems:
        raise PeftcError(problems)
    sys.meta_path.insert(0, AliasFinder(VERSION))
    _forget_answers()


def uninstall() -> None:
    """Take the alias out again. Libraries that imported from it keep what they have."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AliasFinder)]
    for name in [name for name, module in sys.modules.items() if isinstance(module, AliasModule)]:
        del sys.modules[name]
    _forget_answers()


def installed() -> bool:
    """Whether the alias is in place."""
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def _real_one() -> list[Diagnostic]:
    module = sys.modules.get(ROOT)
    if module is None or isinstance(module, AliasModule):
        return []
    version = getattr(module, "__version__", "of unknown version")
    return [rules.REAL_PEFT_IMPORTED(f"The package `peft` {version} is imported already", fix=_FIX)]


def _too_late() -> list[Diagnostic]:
    late = [
        name for name, flag in _LOOKED_ONCE.items() if name in sys.modules and not vars(sys.modules[name]).get(flag)
    ]
    return [rules.ALIAS_TOO_LATE(f"`{name}` was imported before, and found no `peft`", fix=_FIX) for name in late]


def _forget_answers() -> None:
    """Clear what transformers remembers of its question whether `peft` can be imported."""
    asked = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal"):
        answer = vars(asked).get(name) if asked is not None else None
        clear = getattr(answer, "cache_clear", None)
        if clear is not None:
            clear()
