"""The torch line: configs, plugins and the light commands never import torch or transformers."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from peftc.registry.hookspecs import GROUP

HEAVY = ("torch", "transformers", "safetensors", "numpy")
METHODS = sorted(e.name for e in entry_points(group=GROUP) if e.dist is not None and e.dist.name == "peftc")


def loaded_by(code: str, *watched: str) -> set[str]:
    """Which of the watched modules a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint('LOADED', *[m for m in {watched!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_importing_the_package_loads_nothing() -> None:
    assert loaded_by("import peftc", *HEAVY, "pydantic", "pluggy", "peftc.diagnostics") == set()


@pytest.mark.parametrize("name", METHODS)
def test_loading_a_plugin_and_making_its_config_needs_no_torch(name: str) -> None:
    code = f"""
from peftc.registry.manager import default_registry
method = default_registry().get({name.upper()!r})
for options in method.examples or ({{}},):
    method.config(**options)
"""
    assert loaded_by(code, *HEAVY) == set()


@pytest.mark.parametrize("name", METHODS)
def test_a_public_name_loads_its_own_plugin_and_no_other(name: str) -> None:
    code = f"""
import peftc
from peftc.registry.manager import default_registry
module = {next(e.value for e in entry_points(group=GROUP, name=name))!r}
config = __import__("importlib").import_module(module).peftc_tuner().config.__name__
own = [m for m in sys.modules if m.startswith("peftc_plugins.")]
for loaded in own:
    del sys.modules[loaded]
getattr(peftc, config)
usual = config.removesuffix("Config").lower() == {name.replace("_", "")!r}  # others are found by trying all
print(*[m for m in sys.modules if usual and m.startswith("peftc_plugins.") and m not in own])
"""
    run = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["methods"], ["plugins"], ["schema"]], ids=" ".join)
def test_light_commands_need_no_torch(arguments: list[str]) -> None:
    code = f"""
from peftc.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert loaded_by(code, *HEAVY) == set()
