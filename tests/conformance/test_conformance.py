"""Every installed method passes every conformance check, with every example on every model that it can adapt."""

from __future__ import annotations

from peftc.testing import conformance

test_conformance = conformance()
