"""`from peftc import NAME`: fixed names come from where they are said to, names of methods through the registry."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

import peftc
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod
from tests.architecture.tree import ROOT, Source

METHODS = [default_registry().get(name) for name in default_registry().names]


@pytest.mark.parametrize("name", sorted(peftc._HOMES))
def test_a_fixed_name_is_the_object_of_its_home(name: str) -> None:
    assert getattr(importlib.import_module(peftc._HOMES[name]), name) is getattr(peftc, name)


def test_type_checkers_and_editors_see_the_same_names() -> None:
    source = Source(ROOT / "peftc" / "__init__.py")
    block = next(node for node in source.ast.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == peftc._HOMES
    listed = next(node.value for node in block.body if isinstance(node, ast.Assign))
    assert sorted(ast.literal_eval(listed)) == sorted([*peftc._HOMES, "__version__"])
    assert {*peftc._HOMES, "__version__"} <= set(dir(peftc))


def test_everything_can_be_imported_by_a_star() -> None:
    names: dict[str, object] = {}
    exec("from peftc import *", names)
    wanted = {name for method in METHODS for name in method.public_names}
    assert {*peftc._HOMES, "__version__", *wanted} <= names.keys()
    assert all(names[method.config.__name__] is method.config for method in METHODS)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type)
def test_a_method_brings_its_public_names(method: TunerMethod) -> None:
    assert method.config is getattr(peftc, method.config.__name__)
    for name in filter(None, (method.model_class, method.layer_class)):
        assert getattr(peftc, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error_with_the_nearest() -> None:
    name = METHODS[0].config.__name__
    with pytest.raises(AttributeError, match=f"`{name}`"):
        getattr(peftc, f"{name[:-3]}{name[-2:]}")
    assert not hasattr(peftc, "Nonsense")
    with pytest.raises(ImportError):
        from peftc import nonsense  # noqa: F401


def test_a_blocked_plugin_does_not_hide_other_names() -> None:
    code = "import peftc; print(peftc.PeftConfig.__name__, hasattr(peftc, 'Nonsense'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PEFTC_BLOCK": METHODS[0].peft_type.lower()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "PeftConfig False\n", run.stderr
