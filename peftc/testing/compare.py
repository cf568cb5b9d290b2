"""Comparisons that say what differs, and by how much, in the words of the check that made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from peftc.testing.report import broken


def same(found: Tensor, expected: Tensor, what: str, fix: str, where: str | None = None) -> None:
    """Raise unless the tensors are equal bit for bit."""
    if not _alike(found, expected) or not torch.equal(found, expected):
        raise broken(f"{what} {_difference(found, expected)}", fix, where)


def close(found: Tensor, expected: Tensor, what: str, fix: str, *, tolerance: float, where: str | None = None) -> None:
    """Raise unless the tensors are equal up to `tolerance` times the largest value."""
    if _alike(found, expected):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        if torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale):
            return
    raise broken(f"{what} {_difference(found, expected)}", fix, where)


def different(found: Tensor, other: Tensor, what: str, fix: str) -> None:
    """Raise if the tensors are equal: then the check that follows would prove nothing."""
    if _alike(found, other) and torch.equal(found, other):
        raise broken(what, fix)


def same_names(found: Iterable[str], expected: Iterable[str], what: str, fix: str) -> None:
    """Raise unless both are the same set of names."""
    extra, missing = sorted({*found} - {*expected}), sorted({*expected} - {*found})
    if extra or missing:
        parts = [f"has {_few(extra)} too much" if extra else "", f"lacks {_few(missing)}" if missing else ""]
        raise broken(f"{what} {' and '.join(part for part in parts if part)}", fix)


def same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Raise unless both hold the same names with equal tensors."""
    same_names(found, expected, what, fix)
    for name, tensor in expected.items():
        same(found[name], tensor, f"`{name}` of {what}", fix)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def objects_of(model: nn.Module) -> dict[str, int]:
    """Identity of every module and parameter by name."""
    found = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return found | {f"{name}!": id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and found.dtype == expected.dtype


def _difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"has the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"has the dtype {found.dtype}, not {expected.dtype}"
    largest = (found.double() - expected.double()).abs().max()
    return f"differs by up to {float(largest):.3g}"


def _few(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
