"""Functions that make optimisers for adapters, as installed methods bring them: `from peftc.optimizers import create_…_optimizer`.

Nothing is imported until a name is asked for.
"""

from __future__ import annotations

from typing import Any

from peftc.diagnostics import did_you_mean
from peftc.registry.manager import default_registry

#: how the names of such functions end
SUFFIX = "_optimizer"


def __getattr__(name: str) -> Any:
    found = default_registry().find_name(name) if name.endswith(SUFFIX) else None
    if found is not None and name in found[0].exports:
        return found[0].exports[name]
    hint = did_you_mean(name, __dir__())
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`. {hint}".rstrip(), name=name)


def __dir__() -> list[str]:
    return sorted(name for m in default_registry().load_all() for name in m.exports if name.endswith(SUFFIX))
