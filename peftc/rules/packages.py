"""PC8xx: the alias `peft`, and the packages beside peftc."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import ImportRule

REAL_PEFT_IMPORTED = ImportRule(
    "PC801", "The real `peft` is imported already", "Who has its classes would not recognise those of peftc."
)
ALIAS_TOO_LATE = ImportRule(
    "PC802", "Alias comes too late", "The library looked for `peft` while it was imported and will not look again."
)
ALIAS_TWICE = ImportRule("PC803", "Two versions of the alias", "Classes of one peftc are not recognised by the other.")
ALIAS_OUTDATED = Rule(
    "PC804", "Alias is not what a library asks for", "The library looks at the version of `peft` and refuses."
)
RELEASE_OUTSIDE = ImportRule(
    "PC810",
    "Release outside the bounds",
    "peftc relies on how the package works; in other releases it works otherwise.",
)
REQUIREMENT_MISSING = ImportRule("PC811", "Required package is missing", "What needs it cannot be done without.")
