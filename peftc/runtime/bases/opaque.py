"""Modules of which nothing is known but their parameters, norms among them."""

from __future__ import annotations

from peftc.runtime.bases.linear import LinearBackend


class OpaqueBackend(LinearBackend):
    """Norms, and modules of which nothing is known but their parameters: stored as they are, run with others in place."""

    is_plain_linear = False
    is_map = False
    vector_axis = None
