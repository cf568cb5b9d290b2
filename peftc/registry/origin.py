"""Which distribution brings a method: written into an adapter's config file, compared when the file is read.

The file of a method that does not come with peftc has the key `peftc_plugin`, a requirement that pip understands. Readers
that do not know the method cannot use the file anyway, so the key is in nobody's way; what comes with peftc needs none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import InvalidVersion, Version

from peftc import rules
from peftc.diagnostics import Diagnostic
from peftc.registry.manager import OWN, Registry
from peftc.registry.variants import variant_key

#: Key of `adapter_config.json`.
PLUGIN_KEY = "peftc_plugin"

#: The name and version of a distribution; nothing else of a file may get into a command that a person is told to type.
_REQUIREMENT = re.compile(r"([A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*)==([A-Za-z0-9]+(?:[.!+_-][A-Za-z0-9]+)*)")


def requirement_of(peft_type: str, registry: Registry, variant: str = "") -> str | None:
    """What must be installed to use the method, or the variant of it, e.g. `peftc-lora-xs==0.1.0`; None for those that come
    with peftc and for those that no distribution brings."""
    claims = (
        registry.variants.claims_for(variant_key(peft_type, variant)) if variant else registry.claims_for(peft_type)
    )
    if len(claims) != 1 or claims[0].distribution == OWN:
        return None
    requirement = f"{claims[0].distribution}=={claims[0].version}"
    return requirement if _REQUIREMENT.fullmatch(requirement) else None


def named_in(options: Mapping[str, Any]) -> str | None:
    """The requirement that a config file names, if it is one."""
    named = options.get(PLUGIN_KEY)
    return named if isinstance(named, str) and _REQUIREMENT.fullmatch(named) else None


def missing(name: str, requirement: str, kind: str = "method") -> Diagnostic:
    """That the method of a file is not there, or the variant of one, and what to install."""
    distribution, wanted = requirement.split("==")
    try:
        found = f"`{distribution}` {wanted}; installed is {version(distribution)}, without it"
    except PackageNotFoundError:
        found = f"the plugin `{distribution}`, which is not installed"
    fix = f"If you trust its authors, install it: `pip install {requirement}`."
    return rules.PLUGIN_MISSING(f"`{name}` is a {kind} of {found}", fix=fix)


def outdated(peft_type: str, requirement: str, registry: Registry, variant: str = "") -> Diagnostic | None:
    """A warning if the file was written by a later version of the plugin, or by another plugin, than the one installed."""
    present = requirement_of(peft_type, registry, variant)
    if present is None or not _is_behind(present, requirement):
        return None
    what = f"The adapter was saved with `{requirement}`; installed is `{present}`"
    return rules.PLUGIN_OUTDATED(what, fix=f"If its results are not what they were: `pip install {requirement}`.")


def _is_behind(present: str, named: str) -> bool:
    (mine, my_version), (other, other_version) = present.split("=="), named.split("==")
    if _normal(mine) != _normal(other):
        return True
    try:
        return Version(my_version) < Version(other_version)
    except InvalidVersion:
        return my_version != other_version


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
