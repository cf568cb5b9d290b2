"""The methods of these tests are registered while one of them runs; and what tests of files need."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftc import PeftcError, rules
from peftc.model.parts import embeddings
from peftc.registry.starts import default_starts
from tests.runtime.methods import METHODS, STARTS
from tests.unit.fakes import registered


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    starts = default_starts()
    with registered(*METHODS):
        for start in STARTS:
            starts.register(start)
        yield
        for start in STARTS:
            starts.forget(start.name)


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub is not asked; what it would ask is not in a cache."""

    def unreachable(*args: Any, **kwargs: Any) -> Path:
        raise PeftcError(rules.HUB_UNAVAILABLE("The hub is not asked in tests", fix=""))

    monkeypatch.setattr(embeddings, "fetch", unreachable)
    embeddings._from_hub.cache_clear()
    yield
    embeddings._from_hub.cache_clear()


@pytest.fixture
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp())
    yield place
    shutil.rmtree(place)
