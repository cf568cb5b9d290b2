"""The methods of these tests are registered while one of them runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.methods import registered


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    with registered():
        yield
