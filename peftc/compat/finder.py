"""The import system's side of the alias: a finder for `peft` and its submodules, and the metadata of a distribution.

The modules are empty. They look every name up in `peftc.compat.names`, and pass what is set on them on to where the name
lives, so that a patch of the alias is a patch of peftc.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from peftc.compat import names
from peftc.diagnostics import PeftcError, did_you_mean

ROOT = "peft"

#: what names of peftc stood for before they were set through the alias: (module, name) -> value
_patched: dict[tuple[str, str], Any] = {}


class AliasModule(ModuleType):
    """A module of the reference, each of whose names is one of peftc's."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [n for n in names.names_of(self.__name__) if not n.startswith("_")]
        module = self.__name__
        home = names.table()[module].get(name) if module in names.table() else None
        if home is not None:
            return _at_home(module, name, home)
        if name.startswith("__"):
            raise AttributeError(f"module `{module}` has no attribute `{name}`", name=name, obj=self)
        if names.is_module(f"{module}.{name}"):
            return importlib.import_module(f"{module}.{name}")
        try:
            return names.of_a_method(module, name)
        except (KeyError, PeftcError) as error:
            raise AttributeError(lacking(f"{module}.{name}"), name=name, obj=self) from error

    def __setattr__(self, name: str, value: Any) -> None:
        home = names.table().get(self.__name__, {}).get(name)
        if home is None:
            super().__setattr__(name, value)
            return
        owner = home.owner()
        _patched.setdefault((owner.__name__, home.name), getattr(owner, home.name))
        setattr(owner, home.name, value)

    def __delattr__(self, name: str) -> None:
        """Who patches modules deletes what was not in `__dict__` before: that is to end the patch."""
        home = names.table().get(self.__name__, {}).get(name)
        if home is None:
            super().__delattr__(name)
            return
        owner = home.owner()
        if (owner.__name__, home.name) in _patched:
            setattr(owner, home.name, _patched.pop((owner.__name__, home.name)))

    def __dir__(self) -> Iterable[str]:
        inside = [full.rpartition(".")[2] for full in names.submodules(self.__name__)]
        return sorted({*self.__dict__, *names.names_of(self.__name__), *inside})


def _at_home(module: str, name: str, home: names.Home) -> Any:
    try:
        return getattr(home.owner(), home.name)
    except ModuleNotFoundError as error:
        if error.name is None or not home.module.startswith(error.name):
            raise  # something that the home itself needs is not installed
        raise AttributeError(lacking(f"{module}.{name}"), name=name) from error
    except AttributeError as error:
        raise AttributeError(lacking(f"{module}.{name}"), name=name) from error


def lacking(full: str) -> str:
    """What is said of a name or module that the alias does not have: that, and what there is."""
    module, _, name = full.rpartition(".")
    while not names.is_module(module):
        full, (module, _, name) = module, module.rpartition(".")
    inside = [found.rpartition(".")[2] for found in names.submodules(module)]
    there = sorted({*names.names_of(module), *inside})
    hint = did_you_mean(name, there)
    elsewhere = sorted(m for m, held in names.table().items() if name in held)
    hint = hint or (f"It is in `{elsewhere[0]}`." if elsewhere else "")
    listed = ", ".join(there[:40]) + (f" and {len(there) - 40} more (see `dir({module})`)" if len(there) > 40 else "")
    what = f"`{ROOT}` is peftc's alias here, and `{module}` in it has no `{name}`. {hint}".rstrip()
    return f"{what} It has {listed or 'nothing'}."


class _AliasLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AliasModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is to be run: names are looked up."""


class AliasDistribution(Distribution):
    """The metadata by which other libraries see that `peft` is installed, and which version."""

    def __init__(self, version: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {ROOT}\nVersion: {version}\nSummary: peftc's alias\n",
            "top_level.txt": f"{ROOT}\n",
            "INSTALLER": "peftc\n",
        }

    def read_text(self, filename: str) -> str | None:
        """A file of the metadata."""
        return self._files.get(str(filename))

    def locate_file(self, path: Any) -> Path:
        """Where a file of the distribution would be; it has none."""
        return Path(__file__).parent / str(path)


_EVERYTHING = DistributionFinder.Context()


class AliasFinder(DistributionFinder):
    """Finds `peft` and what is below it, before any other finder does."""

    def __init__(self, version: str) -> None:
        self.distribution = AliasDistribution(version)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of the alias. Raises `ImportError` for one of `peft` that it does not have."""
        if fullname.partition(".")[0] != ROOT:
            return None
        if not names.is_module(fullname):
            # another name than the one asked for: with that, `from peft import x` would lose the message
            raise ModuleNotFoundError(lacking(fullname), name=ROOT)
        # all are packages: only for these does `from peft.x import y` ask further, and so tell what is lacking
        return ModuleSpec(fullname, _AliasLoader(), origin="peftc.compat", is_package=True)

    def find_distributions(self, context: DistributionFinder.Context = _EVERYTHING) -> Iterable[Distribution]:
        """The distribution `peft`, when that or every distribution is asked for."""
        return [self.distribution] if context.name is None or context.name.lower() == ROOT else []
