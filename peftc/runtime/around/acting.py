"""Which adapter of a wrapper round a module acts, of which there is at most one."""

from __future__ import annotations

from torch import nn

from peftc.runtime.journal import keep


class OneActs(nn.Module):
    """The part of such a wrapper that is about it: under the names that other libraries ask for."""

    def __init__(self) -> None:
        super().__init__()
        self._active: str | None = None
        self._disabled = False

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapter act, or not. Names and trainability stay as they are."""
        keep(self)
        self._disabled = not enabled

    @property
    def active_adapters(self) -> list[str]:
        return [self._active] if self._active is not None else []

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def disable_adapters(self) -> bool:
        return self._disabled
