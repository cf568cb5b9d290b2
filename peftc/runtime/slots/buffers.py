"""Tensors by name that do not train: the derived ones of a slot by adapter."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, NoReturn

from torch import Tensor, nn


class BufferDict(nn.Module):
    """To be read and changed like a dictionary, each tensor a buffer of this module; of its state dict if `persistent`.

    Name and functions are the reference's, which other libraries ask for with `isinstance`.
    """

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._buffers[key]
        assert tensor is not None
        return tensor

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Take all out."""
        self._buffers.clear()

    def pop(self, key: str) -> Tensor:
        """Take one out, and give it. Raises `KeyError`."""
        tensor = self[key]
        del self[key]
        return tensor

    def keys(self) -> KeysView[str]:
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Tensor | None]:
        return self._buffers.items()

    def values(self) -> ValuesView[Tensor | None]:
        return self._buffers.values()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | BufferDict) -> None:
        """Put these in, in their order. Raises `TypeError` or `ValueError` for what are no names with tensors."""
        pairs: Any = buffers.items() if isinstance(buffers, (Mapping, BufferDict)) else buffers
        for key, buffer in pairs:
            self[key] = buffer

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(b.shape)}" for name, b in self._buffers.items() if b is not None)

    def __call__(self, *args: Any) -> NoReturn:
        """Raises `RuntimeError`: there is nothing to compute."""
        raise RuntimeError("BufferDict should not be called.")
