"""A release outside the bounds and a package that is missing are told, with the line to install, before anything is imported."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.installed import requirements
from peftc.installed.requirements import EXTRAS, needs, require
from peftc.registry.manager import default_registry
from tests.defects import put_defect
from tests.environments.made_up import python, release, without

#: a method with targets of its own for every model that is known
METHOD = next(m for m in map(default_registry().get, default_registry().names) if "target_modules" in m.default_targets)
#: what crosses the torch line first, and whether transformers got imported
FIRST_USES = {
    "the library": "from peftc import get_peft_model",
    "a class of a method": f"import peftc; peftc.{METHOD.model_class}",
    "a base model": "from peftc.integrations.transformers.base import load_base",
    "a plan": "from peftc.integrations.transformers.graph import graph_of",
}
TOLD = """
import sys
from peftc.diagnostics import PeftcError
try:
    {use}
except PeftcError as error:
    print(error)
print([name for name in ("transformers",) if name in sys.modules])
"""


def bounds(name: str) -> str:
    """What peftc's own metadata ask of a package."""
    return next(str(need) for need in needs() if need.name == name)


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("use", FIRST_USES.values(), ids=FIRST_USES)
@pytest.mark.parametrize("outside", ["4.57.6", "6.0.0"])
def test_a_release_outside_the_bounds_is_told_at_the_first_use(outside: str, use: str, tmp_path: Path) -> None:
    said = told(python("-c", TOLD.format(use=use), front=release(tmp_path, "transformers", outside)))
    assert f"error[{rules.RELEASE_OUTSIDE.code}]: `transformers` {outside} is installed" in said
    assert f'pip install "{bounds("transformers")}"' in said
    assert said.endswith("[]\n"), "it is told before transformers is imported"


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    release(release(tmp_path, "transformers", "4.57.6"), "safetensors", "0.1.0")
    said = told(python("-c", TOLD.format(use=FIRST_USES["the library"]), front=tmp_path))
    assert said.count(rules.RELEASE_OUTSIDE.code) == 2


def test_a_package_that_is_missing_is_told(tmp_path: Path) -> None:
    site = without(tmp_path / "site", "transformers")
    said = told(python("-c", TOLD.format(use=FIRST_USES["the library"]), front=site, alone=True))
    assert f"error[{rules.REQUIREMENT_MISSING.code}]: peftc needs the package `transformers`" in said
    assert 'pip install "transformers' in said and said.endswith("[]\n")


def test_a_package_for_training_is_asked_for_when_a_model_is_trained(tmp_path: Path) -> None:
    """What else peftc does goes on without it. (The real `peft` needs it as well.)"""
    use = f"""
import os, peftc, transformers
config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = peftc.get_peft_model(transformers.LlamaForCausalLM(config), peftc.{METHOD.config.__name__}(**{next(iter(METHOD.examples), {})}))
from peftc.config.sections import TrainSection
from peftc.diagnostics import PeftcError
from peftc.integrations.transformers.training import fit
from pathlib import Path
try:
    fit(model, [], 0, TrainSection.model_construct(), Path("nowhere"))
except PeftcError as error:
    print(error)
"""
    said = told(python("-c", use, front=without(tmp_path / "site", "accelerate", "peft"), alone=True))
    assert f"error[{rules.REQUIREMENT_MISSING.code}]: peftc needs the package `accelerate`" in said
    assert f'pip install "{bounds("accelerate")}"' in said


def test_importing_peftc_asks_nothing(tmp_path: Path) -> None:
    front = release(tmp_path, "transformers", "4.57.6")
    said = told(python("-c", "import sys, peftc; print([m for m in sys.modules if 'installed' in m])", front=front))
    assert said == "[]\n"


def test_what_is_installed_here_fits() -> None:
    require()
    for extra in EXTRAS:
        require(extra)


def test_the_bounds_are_those_of_the_project(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    assert {need.name: need.releases for need in needs() if not need.extra} == wanted, "run `pip install -e .` again"


def test_each_bound_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_are_told() -> None:
        requirements.problems.cache_clear()
        with pytest.raises(PeftcError) as raised:
            require()
        assert len(raised.value.diagnostics) == sum(not need.extra for need in needs())

    monkeypatch.setattr(requirements, "version", lambda name: "0.0.1" if version(name) else "")
    try:
        all_are_told()
        put_defect(monkeypatch, requirements, "if need.releases.contains", "if not need.releases.contains")
        with pytest.raises(pytest.fail.Exception):
            all_are_told()
    finally:
        requirements.problems.cache_clear()
