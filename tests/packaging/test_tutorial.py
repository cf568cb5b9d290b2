"""The tutorial for authors of plugins is run as it stands: its files are written, its commands run, its output compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT
from tests.packaging.fresh import pip

PAGE = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- write: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.DOTALL)
BLOCKS = list(BLOCK.finditer(PAGE))

#: pip of the running environment, working on the fresh one, with what is there already.
PIP = """#!/bin/sh
exec {running} -m pip --python {fresh} --quiet --disable-pip-version-check "$@" --no-deps --no-build-isolation --no-index
"""


@pytest.fixture
def shell(installed: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables under which commands of the tutorial find the fresh environment's programs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "pip").write_text(PIP.format(running=sys.executable, fresh=installed / "python"))
    (tools / "pytest").write_text(f'#!/bin/sh\nexec {installed / "python"} -m pytest -p no:cacheprovider "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    path = os.pathsep.join([str(tools), str(installed), os.environ["PATH"]])
    yield {**plain, "PATH": path, "NO_COLOR": "1", "COLUMNS": "100"}
    pip(sys.executable, "--python", str(installed / "python"), "uninstall", "--yes", "peftc-noisy-scale")


def test_every_file_and_command_of_the_tutorial(shell: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "work"
    place.mkdir()
    for block in BLOCKS:
        if block["file"]:
            (place / block["file"]).write_text(block["body"], encoding="utf-8")
        elif block["kind"] == "sh":
            ran = _run(block["body"], place, shell)
            assert ran.returncode == 0, f"{block['body']}\n{ran.stdout}{ran.stderr}"
        elif block["kind"] == "console":
            command, shown = re.fullmatch(r"\$ (.*?)\n(.*)", block["body"], re.DOTALL).groups()  # type: ignore[union-attr]
            assert _without_numbers(_run(command, place, shell).stdout) == _without_numbers(shown)
        else:
            assert block["kind"] == "toml"
            assert block["body"] in (place / "peftc-noisy-scale" / "pyproject.toml").read_text(encoding="utf-8")
    assert (place / "saved" / "adapter_config.json").is_file()


def _run(command: str, place: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-euc", command]
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+\.\d+", "#", text.strip())


def test_the_tutorial_is_not_empty() -> None:
    assert {block["kind"] for block in BLOCKS} == {"python", "sh", "console", "toml", "yaml", "json"}
    assert all(block["file"] for block in BLOCKS if block["kind"] in ("python", "yaml", "json"))


def test_the_readme_shows_the_same_shortest_plugin() -> None:
    shortest = next(block["body"] for block in BLOCKS if block["file"] == "scale.py")
    assert f"```python\n{shortest}```" in README
