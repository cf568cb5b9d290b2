"""The files that the environments of `make` are made from say what the project says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import VERSIONS

#: stays at the build at hand in every environment
TORCH = "torch"


def pinned(file: Path) -> dict[str, str]:
    """Versions by package of a file of constraints."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def lowest(root: Path) -> dict[str, str]:
    """The lowest version of each package that users or the tests need, as pyproject.toml has it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needs = [Requirement(line) for line in [*project["dependencies"], *extras["train"], *extras["demo"]]]
    bounds = {need.name: [s.version for s in need.specifier if s.operator == ">="] for need in needs}
    return {name: found[0] for name, found in bounds.items() if found}


def same(one: str, other: str) -> bool:
    return Requirement(f"a=={one}").specifier.contains(other)


def test_the_oldest_environment_has_the_lowest_releases_that_are_admitted(root: Path) -> None:
    here = pinned(root / "constraints-oldest.txt")
    wrong = {name: (v, here.get(name)) for name, v in lowest(root).items() if not same(v, here.get(name, "0"))}
    assert set(wrong) <= {TORCH}, f"in pyproject.toml, and in constraints-oldest.txt: {wrong}"


@pytest.mark.parametrize("file", ["constraints-oldest.txt", "constraints-newest.txt"])
def test_torch_and_the_reference_are_the_same_in_every_environment(file: str, root: Path) -> None:
    usual, here = pinned(root / "constraints.txt"), pinned(root / file)
    assert {name: here[name] for name in (TORCH, "peft")} == {name: usual[name] for name in (TORCH, "peft")}


def test_ci_runs_what_depends_on_releases_on_an_older_one(root: Path) -> None:
    text = (root / ".ci" / "run").read_text(encoding="utf-8")
    assert "test-oldest" in text and "-m versions" in text


def test_what_is_marked_as_depending_on_releases_is_there(root: Path) -> None:
    missing = [b for b in VERSIONS if not list((root / b).parent.glob(f"{Path(b).name}*")) and not (root / b).is_dir()]
    assert missing == []
