"""The model card of an adapter folder: front matter that the hub reads, and a body that says only what is known.

An existing card is edited, not replaced: what a person wrote stays, and saving again changes nothing more. Paths of this
machine are never written, and are removed where an earlier writer left them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftc import rules
from peftc._version import REFERENCE_VERSION, VERSION
from peftc.config.hub import CARD, is_repository, parse_card
from peftc.config.reader import read_bytes
from peftc.diagnostics import PeftcError, Where
from peftc.limits import MAX_CARD

_ADAPTER_OF = "base_model:adapter:"
_VERSION_LINE = f"- PEFT {REFERENCE_VERSION} (peftc {VERSION})"
_VERSIONS = "### Framework versions"
_TRAINING = "## Training procedure"
_QUANTIZED = "The base model was quantised during training, with these options:"


@dataclass(frozen=True)
class CardFacts:
    """What is known of an adapter folder. `adapters` maps names to methods, the one at the root has the name `None`.

    `base_model` is what the base is called; it is written only if it is no path of this machine.
    """

    adapters: Mapping[str | None, str]
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)

    @property
    def public_base(self) -> str | None:
        """The base model's name on the hub."""
        return self.base_model if self.base_model and is_public(self.base_model) else None


def is_public(name: str) -> bool:
    """Whether a name can be a repository's and is no path that exists here."""
    return is_repository(name) and not os.path.exists(name)


def card_text(facts: CardFacts, existing: str | None = None) -> str:
    """The card's text, made anew or from an existing one. Raises `PeftcError` for front matter that cannot be read."""
    card = parse_card(f"---\nlibrary_name: peft\n---\n\n{_body(facts)}" if existing is None else existing)
    data = card.data
    data["library_name"] = "peft"
    before = data.get("tags") or []
    tags = {*facts.tags, *([before] if isinstance(before, str) else before)}
    tags = {tag for tag in tags if not str(tag).startswith(_ADAPTER_OF)}
    if facts.public_base is not None:
        tags.add(f"{_ADAPTER_OF}{facts.public_base}")
        data["base_model"] = facts.public_base
    elif isinstance(data.get("base_model"), str) and not is_public(data["base_model"]):
        data.pop("base_model")
    if tags:
        data["tags"] = sorted(tags, key=str)
    else:
        data.pop("tags", None)
    if facts.pipeline_tag is not None and not data.get("pipeline_tag"):
        data["pipeline_tag"] = facts.pipeline_tag
    card.text = "\n".join(_with_versions(_with_quantization(card.text.splitlines(), facts.quantization))) + "\n"
    return str(card)


def read_card(folder: Path) -> str | None:
    """The card of a folder, None if there is none. Raises `PeftcError` if it cannot be read."""
    file = folder / CARD
    if not os.path.lexists(file):
        return None
    try:
        return read_bytes(str(file), MAX_CARD).decode("utf-8")
    except PeftcError as error:
        reason = error.diagnostics[0].what
    except UnicodeDecodeError as error:
        reason = f"`{file}` cannot be read: {error}"
    fix = "Save it as UTF-8, or move it away: a new card is written then."
    raise PeftcError(rules.CARD_UNREADABLE(reason, fix=fix, where=Where(file=str(file))))


def _body(facts: CardFacts) -> str:
    base = facts.public_base
    of = f"[{base}](https://huggingface.co/{base})" if base is not None else "a base model that is not on the hub"
    named = [name for name in facts.adapters if name is not None]
    methods = ", ".join(sorted(set(facts.adapters.values())))
    lines = [f"# Adapter{f' for {base}' if base else ''}", ""]
    lines += [
        f"Weights of a parameter-efficient adapter ({methods}) of {of}. The base model itself is not in this folder.",
        "",
    ]
    if named:
        lines += ["Adapters in subfolders: " + ", ".join(f"`{n}` ({facts.adapters[n]})" for n in named) + ".", ""]
    folder = "" if None in facts.adapters else f', subfolder="{named[0]}"'
    lines += ["## How to use", "", "```python", "from peft import PeftModel  # or: from peftc import PeftModel", ""]
    lines += [f'model = PeftModel.from_pretrained(base_model, "path or name of this repository"{folder})', "```", ""]
    lines += ["## Intended use, training data and evaluation", ""]
    lines += [
        "Not described yet. Whoever trained the adapter knows; what is written here is kept when it is saved again.",
        "",
    ]
    return "\n".join(lines)


def _with_quantization(lines: list[str], options: Mapping[str, Any]) -> list[str]:
    if not options or _QUANTIZED in lines:
        return lines
    told = ["", _QUANTIZED, "", *(f"- {name}: {value}" for name, value in options.items()), ""]
    if _TRAINING in lines:
        after = lines.index(_TRAINING) + 1
        return [*lines[:after], *told, *lines[after:]]
    at = lines.index(_VERSIONS) if _VERSIONS in lines else len(lines)
    return [*lines[:at], *_gap(lines[:at]), _TRAINING, *told, *lines[at:]]


def _with_versions(lines: list[str]) -> list[str]:
    own = re.compile(r"- PEFT \S+( \(peftc \S+\))?")
    if _VERSIONS not in lines:
        return [*lines, *_gap(lines), _VERSIONS, "", _VERSION_LINE]
    start = lines.index(_VERSIONS) + 1
    kept = [line for line in lines[start:] if not own.fullmatch(line)]
    if kept and not kept[0].strip():
        kept = kept[1:]
    return [*lines[:start], "", _VERSION_LINE, *kept]


def _gap(lines: Iterable[str]) -> list[str]:
    """A blank line, unless the last one is."""
    *_, last = ("", *lines)
    return [""] if last.strip() else []
