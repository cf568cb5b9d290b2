"""What tests of the tree keep of it goes when they are through with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.architecture.tree import forget


@pytest.fixture(scope="module", autouse=True)
def _trees() -> Iterator[None]:
    """Syntax trees of all files are hundreds of megabytes, which every test after these would carry along."""
    yield
    forget()
