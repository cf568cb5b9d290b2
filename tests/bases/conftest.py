"""What tests on packed bases share: the made-up methods of the tests of layers."""

from __future__ import annotations

from tests.runtime.conftest import _methods as _methods
