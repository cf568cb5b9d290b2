"""Which backend each kind of base layer has: a further kind is one file and one line here, a further storage no line."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from peftc.graph.nodes import Kind, LayerFacts
from peftc.registry.storages import default_storages
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.conv import ConvBackend
from peftc.runtime.bases.embedding import EmbeddingBackend
from peftc.runtime.bases.experts import ExpertsBackend
from peftc.runtime.bases.linear import LinearBackend, TransposedLinearBackend
from peftc.runtime.bases.opaque import OpaqueBackend
from peftc.runtime.bases.packed import PackedBackend

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


def backend_of(layer: LayerFacts) -> Backend:
    """The backend of a layer: that of its kind, or of how its weight is packed. Raises `PeftcError` for a storage that is not
    installed."""
    return BACKENDS[layer.kind] if layer.packed is None else _packed(layer.packed.storage)


@cache
def _packed(storage: str) -> PackedBackend:
    return PackedBackend(default_storages().get(storage))
