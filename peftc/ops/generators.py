"""Random numbers that a forward drew, for a backward that computes it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Generators:
    """Where the default random generators stood, on the CPU and on the device of the tensors."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = [device] if device.type == "cuda" else []
        self._states: list[Tensor] | None = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)]

    def forget_unless_used(self) -> None:
        """Compare with where they stand now."""
        states = self._states
        if states is not None and all(map(torch.equal, states, self._now())):
            self._states = None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw inside what was drawn after this was made, and go on outside as if nothing had been."""
        if self._states is None:
            yield
            return
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._cuda, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
