"""What pyproject.toml says is what is installed; the bundled methods come through the same door as a stranger's."""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution

import pytest

from peftc.registry.hookspecs import GROUP, STARTS_GROUP, STORAGES_GROUP
from tests.architecture.tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_installed_entry_points_are_those_of_the_project_file() -> None:
    wanted = {("console_scripts", n, v) for n, v in PROJECT["scripts"].items()}
    wanted |= {(group, n, v) for group, entries in PROJECT["entry-points"].items() for n, v in entries.items()}
    installed = {(e.group, e.name, e.value) for e in distribution("peftc").entry_points}
    assert wanted == installed, "entry points are written when installing: run `pip install -e .` again"


def test_every_bundled_method_has_one_file_or_folder_and_one_entry_point() -> None:
    plugins = ROOT / "plugins"
    named = {p.stem for p in plugins.glob("*.py") if not p.name.startswith("_")}
    named |= {p.parent.name for p in plugins.glob("*/__init__.py")} - {"starts", "storages"}
    entries = PROJECT["entry-points"][GROUP]
    assert {f"peftc_plugins.{name}" for name in named} == set(entries.values())
    assert all(value == f"peftc_plugins.{name}" for name, value in entries.items())


@pytest.mark.parametrize(
    ("folder", "group", "hook"),
    [("starts", STARTS_GROUP, "peftc_start"), ("storages", STORAGES_GROUP, "peftc_storage")],
)
def test_every_bundled_record_has_one_file_and_one_entry_point(folder: str, group: str, hook: str) -> None:
    files = {p.stem for p in (ROOT / "plugins" / folder).glob("*.py") if f"\n{hook} = " in p.read_text("utf-8")}
    entries = PROJECT["entry-points"][group]
    assert entries == {
        name.replace("_", "-") if folder == "storages" else name: f"peftc_plugins.{folder}.{name}" for name in files
    }


def test_installed_version_is_the_one_in_the_source() -> None:
    from peftc import __version__

    assert __version__ == distribution("peftc").version


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for name in ("peftc", "plugins") for path in (ROOT / name).rglob("*.py")}
    missing = [f.relative_to(ROOT).as_posix() for f in folders if not (f / "__init__.py").exists()]
    assert not missing, f"without an `__init__.py` these are not in the wheel: {missing}"
