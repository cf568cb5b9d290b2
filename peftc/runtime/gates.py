"""What a call multiplies updates by: coefficients that an adapter gives others, and where in its tokens adapters begin to act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError


class Gates(ABC):
    """Coefficients of a call."""

    @abstractmethod
    def of(self, path: str, adapter: str, y: Tensor) -> float | Tensor:
        """The coefficient of an adapter's update on a layer whose output is `y` `(batch, tokens, out)`, or with batch and
        tokens in one dimension. Raises `PeftcError` if `y` has other tokens."""


@dataclass(frozen=True)
class Weights(Gates):
    """`values` is one number for all, or `(batch, tokens, layers, adapters)`; `layers` and `adapters` give the places of paths
    and adapter names in it."""

    values: float | Tensor
    layers: Mapping[str, int]
    adapters: Mapping[str, int]

    def of(self, path: str, adapter: str, y: Tensor) -> float | Tensor:
        if not isinstance(self.values, Tensor):
            return self.values
        gate = self.values[:, :, self.layers[path], self.adapters[adapter]]
        if y.shape[:-1] == (1, gate.shape[1]):  # what all rows share, such as positions
            return gate.unsqueeze(-1)
        if gate.numel() * y.shape[-1] != y.numel():
            raise PeftcError(_other_tokens(path, y, f"the call weighs {gate.numel()}"))
        return gate.reshape(*y.shape[:-1], 1)


@dataclass
class FromToken(Gates):
    """`starts` has for each adapter that waits the place, among all tokens of a row, from which on it acts `(rows,)`, and None if
    that is not known. `seen` counts those tokens up to the last one of the running forward, `window` those that it has itself:
    generation sets both anew for each token."""

    starts: Mapping[str, Tensor | None]
    seen: int = 0
    window: int = 0

    def of(self, path: str, adapter: str, y: Tensor) -> float | Tensor:
        if adapter not in self.starts:
            return 1.0
        start = self.starts[adapter]
        if start is None:
            return 0.0
        tokens = y.shape[-2] if y.dim() > 2 else max(1, self.window)
        rows, left = divmod(y.numel(), max(1, tokens * y.shape[-1]))
        times = 1 if rows == 1 else rows // max(1, start.shape[0])
        if left or (rows != 1 and times * start.shape[0] != rows):
            raise PeftcError(_other_tokens(path, y, f"the call has {start.shape[0]} rows of {self.window}"))
        if times != 1:
            start = start.repeat_interleave(times)
        # counted from the end: a head may compute the last tokens alone
        places = torch.arange(self.seen - tokens, self.seen, device=y.device)
        acts = places >= start.to(y.device).unsqueeze(-1)
        return acts.unsqueeze(-1) if y.dim() > 2 else acts.reshape(-1, 1)


def _other_tokens(path: str, y: Tensor, wanted: str) -> Diagnostic:
    what = f"`{path}` computes {y.numel() // max(1, y.shape[-1])} tokens, {wanted}"
    fix = "Use adapters on layers that see every token of the input once."
    return rules.CANNOT_GATE(what, fix=fix, where=path)
