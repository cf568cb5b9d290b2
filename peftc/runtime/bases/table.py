"""Which backend each kind of base layer has: a further kind is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from peftc.graph.nodes import Kind
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.conv import ConvBackend
from peftc.runtime.bases.embedding import EmbeddingBackend
from peftc.runtime.bases.experts import ExpertsBackend
from peftc.runtime.bases.linear import LinearBackend, TransposedLinearBackend
from peftc.runtime.bases.opaque import OpaqueBackend

BACKENDS: Mapping[Kind, Backend] = {
    Kind.LINEAR: LinearBackend(),
    Kind.CONV1D_TRANSPOSED: TransposedLinearBackend(),
    Kind.EMBEDDING: EmbeddingBackend(),
    Kind.CONV1D: ConvBackend(),
    Kind.CONV2D: ConvBackend(),
    Kind.CONV3D: ConvBackend(),
    Kind.NORM: OpaqueBackend(),
    Kind.OTHER: OpaqueBackend(),
    Kind.EXPERTS: ExpertsBackend(transposed=False),
    Kind.EXPERTS_TRANSPOSED: ExpertsBackend(transposed=True),
}
