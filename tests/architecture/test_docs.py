"""Pages name only what exists. (That generated ones are what the code says, `make check` holds.)"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from peftc.cli.main import COMMANDS
from tests.architecture.tree import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(([^)#\s:]*)#([^)]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FILE = re.compile(r"`((?:peftc|plugins|schemas|tests|docs|examples|benchmarks|\.ci)/[\w./-]*)`")
COMMAND = re.compile(r"(?<!from )\bpeftc ([a-z]+)\b(?=[ `\n])")
FENCE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = {name for name in LINK.findall(text) if "://" not in name}
    missing = sorted(name for name in links if not (page.parent / name).exists())
    missing += sorted(name for name in set(FILE.findall(text)) if not (ROOT / name).exists())
    assert not missing


def headings(page: Path) -> list[str]:
    """What links into a page name its headings by, as GitHub makes it of plain words and code, in their order."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_into_pages_name_one_heading(page: Path) -> None:
    links = set(ANCHOR.findall(page.read_text(encoding="utf-8")))
    places = {
        f"{name}#{anchor}": headings(page.parent / name if name else page).count(anchor) for name, anchor in links
    }
    assert {place: found for place, found in places.items() if found != 1} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    code = " ".join(FENCE.findall(page.read_text(encoding="utf-8")))
    assert sorted(set(COMMAND.findall(code)) - set(COMMANDS)) == []


def test_every_name_for_authors_of_plugins_is_described() -> None:
    place = ROOT / "docs" / "plugin_reference.py"
    spec = importlib.util.spec_from_file_location("plugin_reference", place)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.undescribed() == []


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    explained = set(re.findall(r"^#   make ([\w-]+)", makefile, re.MULTILINE))
    assert explained == set(targets[1].split())
