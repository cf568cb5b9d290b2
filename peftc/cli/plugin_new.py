"""A new plugin: a distribution of its own, written from the templates beside this file, whole or not at all.

One name gives all others: `lora-xs` is the type `LORA_XS`, the entry point `lora_xs`, the distribution `peftc-lora-xs`, the
package `peftc_lora_xs` and the config `LoraXsConfig`.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from peftc import rules
from peftc._version import VERSION
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.registry.manager import Registry

_TEMPLATES = files("peftc.cli") / "plugin_template"
_SUFFIX = ".template"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """All names of a plugin, from its entry point."""

    entry: str

    @property
    def peft_type(self) -> str:
        return self.entry.upper()

    @property
    def distribution(self) -> str:
        return f"peftc-{self.entry.replace('_', '-')}"

    @property
    def package(self) -> str:
        return f"peftc_{self.entry}"

    @property
    def stem(self) -> str:
        """What the config's name begins with."""
        return "".join(part.capitalize() for part in self.entry.split("_"))

    def filled(self, template: str) -> str:
        """A template with the names in it."""
        values = {"type": self.peft_type, "entry": self.entry, "prefix": f"{self.entry}_", "stem": self.stem}
        values |= {"distribution": self.distribution, "package": self.package, "peftc": VERSION}
        return Template(template).substitute(values)


def names_of(name: str, registry: Registry) -> Names:
    """The names of a new plugin. Raises `PeftcError` if there can be no such plugin, or there is one."""
    entry = name.lower().replace("-", "_")
    if not _NAME.fullmatch(entry):
        raise PeftcError(_no_name(name))
    names = Names(entry)
    if names.peft_type in registry.names or registry.claims_for(names.peft_type):
        claims = registry.claims_for(names.peft_type)
        whose = f" by {claims[0]}" if claims else ""
        what = f"`{names.peft_type}` is registered already{whose}"
        raise PeftcError(rules.TYPE_TAKEN(what, fix=f"Choose another name, e.g. `my-{entry.replace('_', '-')}`."))
    return names


def _no_name(name: str) -> Diagnostic:
    nearest = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    nearest = re.sub(r"^[0-9-]+", "", nearest) or "my-method"
    what = f"`{name}` cannot be the name of a plugin: it takes letters, digits, and single `-` or `_` between them"
    return rules.PLUGIN_NAME(what, fix=f"Use `{nearest}`.")


def write_plugin(names: Names, parent: Path) -> Path:
    """Write the distribution into a new folder of `parent`. Raises `PeftcError` if it exists, and `OSError`; then nothing is left."""
    folder = parent / names.distribution
    if folder.exists() or folder.is_symlink():
        fix = "Choose another name, or another place with `--dir`."
        raise PeftcError(rules.FOLDER_TAKEN(f"`{folder}` exists", fix=fix, where=Where(file=str(folder))))
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{names.distribution}.") as staged:
        whole = Path(staged, names.distribution)
        _fill(_TEMPLATES, whole, names)
        whole.rename(folder)
    return folder


def _fill(source: Traversable, target: Path, names: Names) -> None:
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir():
            _fill(entry, target / (names.package if entry.name == "package" else entry.name), names)
        elif entry.name.endswith(_SUFFIX):
            name = entry.name.removesuffix(_SUFFIX)
            name = f".{name}" if name == "gitignore" else name  # a hidden file would not get into the wheel
            (target / name).write_text(names.filled(entry.read_text(encoding="utf-8")), encoding="utf-8")
