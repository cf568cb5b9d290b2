"""The tutorial for authors of plugins is run as it stands: its files are written, its commands run, its output compared.

In an environment that has peftc and nothing else: what a command needs beside that, one before it has to install.
"""

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

#: pip of the running environment, working on the fresh one, with what is there already. What a project requires, also by an
#: extra that is asked for, is there already but for its programs: those come with it.
PIP = """#!{running}
import pathlib, re, subprocess, sys, tomllib

command = ["{running}", "-m", "pip", "--python", "{fresh}", "--quiet", "--disable-pip-version-check", *sys.argv[1:]]
subprocess.run([*command, "--no-deps", "--no-build-isolation", "--no-index"], check=True)
for place, extra in re.findall(r"([^\\s\\[]+)(?:\\[(\\w+)\\])?(?:\\n|$)", "\\n".join(sys.argv[2:])):
    if (file := pathlib.Path(place, "pyproject.toml")).is_file():
        project = tomllib.loads(file.read_text())["project"]
        needed = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
        for name in (re.match(r"[\\w-]+", requirement)[0] for requirement in needed):
            if name in {programs}:
                program = pathlib.Path("{tools}", name)
                program.write_text("#!/bin/sh\\nexec {fresh} -m " + name + ' -p no:cacheprovider "$@"\\n')
                program.chmod(0o755)
"""
#: Programs of packages that the running environment lends.
PROGRAMS = ("pytest",)


@pytest.fixture
def shell(installed: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables under which commands of the tutorial find the fresh environment's programs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    fresh = installed / "python"
    (tools / "pip").write_text(PIP.format(running=sys.executable, fresh=fresh, tools=tools, programs=PROGRAMS))
    (tools / "pip").chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    others = [folder for folder in os.environ["PATH"].split(os.pathsep) if not _has_program(folder)]
    path = os.pathsep.join([str(tools), str(installed), *others])
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


def _has_program(folder: str) -> bool:
    """Whether a folder of the path has what the tutorial has to install."""
    return any(Path(folder, name).exists() for name in PROGRAMS)


def test_a_command_without_what_it_needs_is_noticed(shell: dict[str, str], tmp_path: Path) -> None:
    """As step 3 once was, which installed no pytest."""
    assert _run("pytest --version", tmp_path, shell).returncode == 127
    assert _run("peftc plugins new noisy-scale && pip install -e ./peftc-noisy-scale", tmp_path, shell).returncode == 0
    assert _run("pytest --version", tmp_path, shell).returncode == 127
    assert _run("pip install -e './peftc-noisy-scale[test]'", tmp_path, shell).returncode == 0
    assert _run("pytest --version", tmp_path, shell).returncode == 0


def test_the_steps_of_a_new_plugins_readme(shell: dict[str, str], tmp_path: Path) -> None:
    """Its commands as they stand there; of the checks the quick ones."""
    assert _run("peftc plugins new noisy-scale", tmp_path, shell).returncode == 0
    folder = tmp_path / "peftc-noisy-scale"
    text = re.sub(r"```.*?```", "", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^ {4}(\S.*?)(?: +#.*)?$", text, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["pip", "peftc", "pytest"]
    quick = {"peftc": " --only plan_survives_json", "pytest": " -k plan_survives_json"}
    for line in lines:
        ran = _run(line + quick.get(line.split()[0], ""), folder, shell)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"


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
