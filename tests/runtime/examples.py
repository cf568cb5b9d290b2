"""Every installed method on the kit's tiny models, as rows of tables of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest
from _pytest.mark import ParameterSet

from peftc.registry.manager import default_registry
from peftc.testing.subjects import Subject, subjects


@cache
def _all() -> tuple[Subject, ...]:
    """Found once for all files, as each is asked when tests are collected; no method of the tests' own is registered then."""
    registry = default_registry()
    return tuple(subject for name in registry.names for subject in subjects(registry.get(name)))


def examples(chosen: Callable[[Subject], bool]) -> list[Subject]:
    """Those that `chosen` takes, in the order of the registry."""
    return [subject for subject in _all() if chosen(subject)]


def small_layers(subject: Subject) -> bool:
    """The first options of methods that change layers, on models that are no language models."""
    return subject.first and subject.method.adapts_layers and not subject.model.is_language_model


def rows(found: Iterable[Subject]) -> list[ParameterSet]:
    """Parameters of a test, by method, options and model."""
    return [pytest.param(subject, id=name_of(subject)) for subject in found]


def name_of(subject: Subject) -> str:
    """What a test calls it."""
    return f"{subject.method.peft_type}-{subject}"
