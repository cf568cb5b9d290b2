"""The torch line: configs, plugins and the light commands never import torch or transformers."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

import pytest

from peftc.registry.hookspecs import GROUP
from tests.apart import Ran, run_apart

HEAVY = ("torch", "transformers", "safetensors", "numpy")
METHODS = sorted(e.name for e in entry_points(group=GROUP) if e.dist is not None and e.dist.name == "peftc")
COMMANDS = [["--help"], ["--version"], ["methods"], ["plugins"], ["schema"]]
TELL = "import sys\n{code}\nprint('LOADED', *[m for m in {watched!r} if m in sys.modules])"

LOADS = """
from peftc.registry.manager import default_registry
method = default_registry().get({type!r})
for options in method.examples or ({{}},):
    method.config(**options)
"""
NAMES = """
import sys
import peftc
from peftc.registry.manager import default_registry
module = {module!r}
config = __import__("importlib").import_module(module).peftc_tuner().config.__name__
own = [m for m in sys.modules if m.startswith("peftc_plugins.")]
for loaded in own:
    del sys.modules[loaded]
getattr(peftc, config)
usual = config.removesuffix("Config").lower() == {name!r}  # others are found by trying all
print(*[m for m in sys.modules if usual and m.startswith("peftc_plugins.") and m not in own])
"""
RUNS = """
from peftc.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def loaded(ran: Ran) -> set[str]:
    """Which of the watched modules were there in the end."""
    assert ran.code == 0, ran.err
    return set(ran.out.splitlines()[-1].split()[1:])


def telling(code: str, *watched: str) -> str:
    return TELL.format(code=code, watched=watched)


@cache
def ran() -> dict[str, Ran]:
    """What each piece of code came to, in an interpreter that has imported the registry."""
    pieces = {f"loads {name}": telling(LOADS.format(type=name.upper()), *HEAVY) for name in METHODS}
    homes = {e.name: e.value for e in entry_points(group=GROUP)}
    pieces |= {f"names {n}": NAMES.format(module=homes[n], name=n.replace("_", "")) for n in METHODS}
    pieces |= {" ".join(words): telling(RUNS.format(arguments=words), *HEAVY) for words in COMMANDS}
    return run_apart(pieces, "peftc.registry.manager")


def test_importing_the_package_loads_nothing() -> None:
    watched = (*HEAVY, "pydantic", "pluggy", "peftc.diagnostics")
    assert loaded(run_apart({"import": telling("import peftc", *watched)})["import"]) == set()


@pytest.mark.parametrize("name", METHODS)
def test_loading_a_plugin_and_making_its_config_needs_no_torch(name: str) -> None:
    assert loaded(ran()[f"loads {name}"]) == set()


@pytest.mark.parametrize("name", METHODS)
def test_a_public_name_loads_its_own_plugin_and_no_other(name: str) -> None:
    found = ran()[f"names {name}"]
    assert (found.code, found.out.strip()) == (0, ""), found.err


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_light_commands_need_no_torch(arguments: list[str]) -> None:
    assert loaded(ran()[" ".join(arguments)]) == set()
