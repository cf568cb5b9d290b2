"""What a record lists and nothing uses: the kit tells of each by its place and name, and of nothing in a record without any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.plugin import ModuleNode, TunerMethod, register_plugin
from peftc.registry.manager import default_registry
from peftc.testing.checks.used import what_is_declared_is_used
from peftc.testing.kit import cases
from tests.mutation.sound import SOUND, SOUND_AROUND, Sound, SoundBranch

FIRST, SECOND = Sound(), SoundBranch()


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    default_registry().forget("MUTANT")


def found(method: TunerMethod) -> tuple[Diagnostic, ...]:
    """What the check finds in a record."""
    register_plugin(method)
    case = next(case for case in cases("MUTANT") if case.check == what_is_declared_is_used.__name__)
    try:
        case.run()
    except PeftcError as error:
        return error.diagnostics
    return ()


def by_width(c: Any, node: ModuleNode) -> Sound:
    """One for wide layers, another for others."""
    return SECOND if node.facts.out_features > 1 else FIRST


def by_option(c: Any, node: ModuleNode) -> Sound:
    return SECOND if c.r > 4 else FIRST


def values(name: str) -> Any:
    return lambda c, rows: {name: [0] * rows}


CASES: Mapping[str, tuple[TunerMethod, str]] = {
    "a choice that is never made": (replace(SOUND, tuner=by_width, choices=(FIRST, SECOND)), "`choices[0]`, a `Sound`"),
    "a choice that no example leads to": (
        replace(SOUND, tuner=by_option, choices=(FIRST, SECOND)),
        "`choices[1]`, a `SoundBranch`",
    ),
    "one of several that another is before": (replace(SOUND, tuner=(FIRST, SECOND)), "`tuner[1]`, a `SoundBranch`"),
    "an example without a place": (
        replace(SOUND_AROUND, examples=({}, {"nowhere": True})),
        "The example {'nowhere': True} is run on no model",
    ),
    "a value that nothing reads": (
        replace(SOUND, example_values=values("colour")),
        "gives `colour`, which nothing reads",
    ),
    "adapters that nothing weighs": (replace(SOUND, example_adapters=({"peft_type": "MUTANT"},)), "`example_adapters`"),
    "a common option that is none": (replace(SOUND, alike=("rr",)), "`alike` names `rr`"),
    "a shown option that is none": (replace(SOUND, layer_options={"rank": "rank"}), "`layer_options` names `rank`"),
}


class Reads(Sound):
    keywords = ("colours",)


class Steps(Sound):
    step_options = frozenset({"left"})


class Nowhere(type(SOUND_AROUND.tuner)):  # type: ignore[misc]
    def sites(self, c: Any, graph: Any) -> Mapping[str, str]:
        return {} if c.nowhere else super().sites(c, graph)


class NowhereConfig(SOUND_AROUND.config):  # type: ignore[misc,name-defined]
    nowhere: bool = False
    """Find nothing."""


@pytest.mark.parametrize("name", CASES)
def test_what_is_idle_is_told(name: str) -> None:
    method, says = CASES[name]
    if method.examples:
        method = replace(method, config=NowhereConfig, tuner=Nowhere())
    told = [problem for problem in found(method) if says in problem.what]
    assert [problem.code for problem in told] == [rules.NOT_CONFORMANT.code]
    assert told[0].fix


def test_a_misspelt_value_and_the_keyword_without_one_are_told_with_each_other() -> None:
    told = found(replace(SOUND, tuner=Reads(), example_values=values("colour")))
    assert [problem.what.split(",")[0] for problem in told] == [
        "`example_values` gives `colour`",
        "The keyword `colours` is never given: `example_values` has none",
    ]
    assert told[0].fix == "Did you mean `colours`?"


def test_an_option_of_steps_that_is_none_is_told() -> None:
    (problem,) = found(replace(SOUND, tuner=Steps()))
    assert "`step_options` names `left`, which is no option of `MutantConfig`" in problem.what


@pytest.mark.parametrize(
    "method",
    [
        SOUND,
        SOUND_AROUND,
        replace(SOUND, tuner=by_option, choices=(FIRST, SECOND), examples=({}, {"r": 5})),
        replace(SOUND, tuner=Reads(), example_values=values("colours")),
    ],
    ids=["plain", "around", "each choice by an example", "each keyword with values"],
)
def test_nothing_is_told_of_a_record_that_uses_what_it_has(method: TunerMethod) -> None:
    assert found(method) == ()
