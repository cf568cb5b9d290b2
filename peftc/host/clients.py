"""Libraries that ask whether `peft` is installed, and remember the answer. Imports none of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

#: Modules that look for `peft` once, while they are imported, and the name in them that says whether they found it
#: (transformers 4.31, diffusers 0.23).
LOOKED_ONCE: Final = {
    "transformers.trainer_utils": "PeftModel",
    "diffusers.utils.import_utils": "_peft_available",
}

#: Functions that remember their answer, by module (transformers 5.0).
REMEMBERED: Final = {"transformers.utils.import_utils": ("is_peft_available", "is_peft_greater_or_equal")}


def looked_in_vain() -> Iterator[str]:
    """Modules that are imported already, found no `peft`, and will not look again."""
    for name, flag in LOOKED_ONCE.items():
        if name in sys.modules and not vars(sys.modules[name]).get(flag):
            yield name


def forget_answers() -> None:
    """Clear what is remembered of the question whether `peft` can be imported."""
    for module, names in REMEMBERED.items():
        known = vars(sys.modules[module]) if module in sys.modules else {}
        for name in names:
            clear = getattr(known.get(name), "cache_clear", None)
            if clear is not None:
                clear()
