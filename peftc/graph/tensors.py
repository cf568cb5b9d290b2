"""Facts about single tensors: shape and dtype, bytes, and their form in JSON, which is checked when it is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftc.limits import MAX_INTEGER, misshapen

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """What facts and plans call a dtype: `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A parameter or buffer of a module: storage shape and dtype (`"float32"`, `"bfloat16"`, …)."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorFacts:
        """The facts of a live tensor."""
        return cls(tuple(tensor.shape), dtype_name(tensor.dtype))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return self.numel * DTYPE_BYTES.get(self.dtype, 4)


HALF = frozenset({"float16", "bfloat16"})
#: What a gradient can move; other numbers are whole, packed or quantised.
TRAINABLE = HALF | {"float32", "float64", "complex64", "complex128"}
#: Bytes of one number; dtypes that are not here count as four.
DTYPE_BYTES: Mapping[str, int] = {
    "complex128": 16,
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
}


#: Dtypes of weights that are numbers as they stand.
PLAIN_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})


class FactsByName(Mapping[str, TensorFacts]):
    """Facts of tensors by name, in registration order. Frozen, and hashable, as plans need it; equal in the same order only."""

    __slots__ = ("_by_name",)

    def __init__(self, facts: Mapping[str, TensorFacts] | Iterable[tuple[str, TensorFacts]] = ()) -> None:
        self._by_name = dict(facts)

    def __getitem__(self, name: str) -> TensorFacts:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __hash__(self) -> int:
        return hash(tuple(self._by_name.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FactsByName) and list(self.items()) == list(other.items())

    def __repr__(self) -> str:
        return f"FactsByName({self._by_name!r})"


def tensors_from_json(data: Iterable[Any]) -> tuple[tuple[str, TensorFacts], ...]:
    """Tensors by name, of rows `[name, shape, dtype]`. Raises `TypeError` or `ValueError` on data of another form."""
    return tuple((text_of(name), TensorFacts(shape_from_json(shape), text_of(dtype))) for name, shape, dtype in data)


def shape_from_json(data: Iterable[Any]) -> tuple[int, ...]:
    """A shape that a tensor can have. Raises `ValueError` for anything else."""
    shape = tuple(map(size_of, data))
    reason = misshapen(shape)
    if reason:
        raise ValueError(f"a tensor {reason}")
    return shape


def text_of(value: object) -> str:
    """A value that must be a text. Raises `ValueError`."""
    if type(value) is not str:
        raise ValueError(f"a name is a text, not {value!r:.40}")
    return value


def texts_of(data: Iterable[object]) -> tuple[str, ...]:
    """Values that must be a list of texts. Raises `ValueError`."""
    if isinstance(data, str):
        raise ValueError(f"names are a list, not {data!r:.40}")
    return tuple(map(text_of, data))


def size_of(value: object) -> int:
    """A value that must be a natural number. Raises `ValueError`."""
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise ValueError(f"a size is a natural number, not {value!r:.40}")
    return value
