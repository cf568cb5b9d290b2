"""The reference's functions that combine task tensors, `peft.utils.merge_utils`; peftc's own are in `peftc.ops.combine`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftc import rules
from peftc.diagnostics import ConfigError
from peftc.ops import combine
from peftc.ops.combine import Pruning

if TYPE_CHECKING:
    from torch import Tensor


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Weights `(n,)` with dimensions of size 1 behind, to multiply tensors `(n, ...)` by."""
    return weights.view(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The share `density` of the entries that is largest in magnitude; the others zero."""
    return combine.largest(tensor, density)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Entries kept with probability `density`, and scaled so that their expectation stays, if that is asked for."""
    return combine.dropped(tensor, density) * (1.0 if rescale else density)


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """One of the two, `"magnitude"` or `"random"`; a density of 1 or more keeps everything. Raises `ConfigError`."""
    if density < 0 or method not in ("magnitude", "random"):
        name, value = ("density", density) if density < 0 else ("method", method)
        fix = "Give a density of at least 0, and `magnitude` or `random`."
        raise ConfigError(rules.BAD_VALUE(f"`{name}` cannot be `{value}`", fix=fix))
    if density >= 1:
        return tensor
    return (
        magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)
    )


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Which entries `(n, ...)` have the sign that wins at their place, by mass (`"total"`) or by number (`"frequency"`)."""
    return combine.agreeing(tensor, method)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean, at each place, of those entries of `(n, ...)` that the mask has."""
    return combine.mean_of(task_tensors, majority_sign_mask)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    return combine.linear(task_tensors, weights, Pruning(1.0))


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what is largest in magnitude."""
    return combine.magnitude_prune(task_tensors, weights, Pruning(density))


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """TIES: what is largest in magnitude, and of that what has the sign that wins."""
    return combine.ties(task_tensors, weights, Pruning(density, majority_sign_method))


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE: the weighted sum of what is kept at random, rescaled."""
    return combine.dare_linear(task_tensors, weights, Pruning(density))


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    """DARE's pruning, then the election of TIES."""
    return combine.dare_ties(task_tensors, weights, Pruning(density, majority_sign_method))
