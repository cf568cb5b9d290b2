"""AQLM's layers: each block of the weight a sum of vectors from learned books (Egiazarian et al., arXiv:2401.06118).

The package computes with kernels that are compiled: known here by its layer's documented shape, and stood in for in tests.
"""

from __future__ import annotations

from typing import Any, ClassVar

from peftc import plugin as p

from .opening import bytes_of

#: vectors in a book for which the package has a kernel for CPUs, which wants the codes with inputs first
ON_CPU = 256


class Aqlm(p.Storage):
    """AQLM"""

    name: ClassVar[str] = "aqlm"
    package: ClassVar[str] = "aqlm"
    classes: ClassVar[tuple[str, ...]] = ("aqlm.inference.QuantizedLinear",)
    held: ClassVar[tuple[str, ...]] = ("codes", "codebooks", "scales")
    fresh: ClassVar[bool] = False  # a function of autograd makes it
    unwritable: ClassVar[str] = "its codes and books are learned from data, not rounded to"

    def facts(self, layer: Any) -> p.Packed:
        dtype = p.dtype_name(layer.codebooks.dtype)
        return p.Packed(self.name, layer.in_features, layer.out_features, dtype, bytes_of(layer, self.held))

    def open(self, layer: Any) -> p.Tensor:
        books = layer.codebooks.detach()
        codes = layer.codes.detach().long() % books.shape[1]  # they are stored with a sign
        if _is_turned(layer):
            codes = codes.transpose(0, 1)
        blocks = sum(books[number][codes[..., number]] for number in range(books.shape[0]))
        scaled: p.Tensor = blocks * layer.scales.detach()  # (out groups, in groups, out of a group, in of a group)
        return scaled.transpose(1, 2).reshape(layer.out_features, layer.in_features)


def _is_turned(layer: Any) -> bool:
    """Whether the first call, on a CPU, has put the codes as (in groups, out groups, books)."""
    called = layer.__dict__.get("gemv_op") is not None
    return called and layer.codes.device.type == "cpu" and layer.codebooks.shape[1] == ON_CPU


peftc_storage = p.storing(Aqlm())
