"""Poly: each task mixes low-rank skills in its own way (Ponti et al., arXiv:2202.13914; splits: arXiv:2211.03831).

A layer has an inventory of skills, pairs of factors `A_s`, `B_s`, and a router with logits for each task. For a row of
task t, `Δy = x A B / r` with `A = Σ_s α_ts A_s` and likewise B; with splits, parts of the features are routed apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from peftc.plugin import (
    LINEAR_KINDS,
    Diagnostic,
    Field,
    LayerFacts,
    MapTuner,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    Slot,
    SlotInit,
    TargetsMixin,
    TunerMethod,
    View,
    hookimpl,
    module_slot,
    parameter_slot,
    rules,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Keeps shares finite where all skills are switched off.
EPS = 1e-12


class PolyConfig(TargetsMixin, ModulesToSaveMixin, PeftConfig):
    """Options of a Poly adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("POLY")
    r: int = Field(default=8, ge=1)
    """Rank of each skill's update."""
    init_weights: bool = True
    """Start the second factors at zero, which changes nothing; otherwise at random."""
    poly_type: Literal["poly"] = "poly"
    """How tasks are routed; there is one way."""
    n_tasks: int = Field(default=1, ge=1)
    """Number of tasks; calls name each row's by `task_ids`, numbered from 0."""
    n_skills: int = Field(default=4, ge=1)
    """Number of skills, low-rank updates, on each layer."""
    n_splits: int = Field(default=1, ge=1)
    """Number of parts that features are divided into, each routed for itself; more than 1 is multi-head routing."""


class PolyTuner(MapTuner[PolyConfig]):
    """Skills A `(splits, skills, in / splits, r)` and B `(splits, skills, r, out / splits)`, and the tasks' logits."""

    supports = LINEAR_KINDS
    keywords = ("task_ids",)

    def slots(self, c: PolyConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("poly_lora_A", (c.n_splits, c.n_skills, layer.in_features // c.n_splits, c.r))
        yield parameter_slot("poly_lora_B", (c.n_splits, c.n_skills, c.r, layer.out_features // c.n_splits))
        yield module_slot("poly_router", (c.n_tasks, c.n_splits * c.n_skills), tail="module_logits")

    def check(self, c: PolyConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        for what, size in (("inputs", layer.in_features), ("outputs", layer.out_features)):
            if size % c.n_splits:
                text = f"The layer's {size} {what} cannot be divided into {c.n_splits} equal parts"
                yield rules.BAD_VALUE(text, fix="Choose `n_splits` that divides both sizes.", where=path)

    def check_call(self, c: PolyConfig, values: Mapping[str, Tensor]) -> Iterable[Diagnostic]:
        why, ids = "Each task mixes the skills in its own way.", values.get("task_ids")
        if ids is None and c.n_tasks > 1:
            fix = "Give one `task_ids` entry for each row."
            yield rules.TASKS_NEEDED("The call has no `task_ids`", why=why, fix=fix)
        for task in () if ids is None else ids[(ids < 0) | (ids >= c.n_tasks)][:1].tolist():
            what = f"`task_ids` names task {task}, but there are {c.n_tasks}"
            yield rules.TASKS_NEEDED(what, why=why, fix=f"Tasks are numbered from 0 to {c.n_tasks - 1}.")

    def init(self, c: PolyConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        _start(slots["poly_lora_A"], init)
        if c.init_weights:
            init.zeros(slots["poly_lora_B"])
        else:
            _start(slots["poly_lora_B"], init)
        init.uniform(slots["poly_router"], 1e-3)

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        c, shares = a.config, self._shares(a, x)
        assert isinstance(c, PolyConfig)
        A = _mixed("bqs,qsdr->bqdr", shares, a.poly_lora_A).flatten(1, 2)
        B = _mixed("bqs,qsrd->brqd", shares, a.poly_lora_B).flatten(2)
        delta = x.flatten(1, -2) @ A @ B if x.dim() > 2 else (x.unsqueeze(1) @ A @ B).squeeze(1)
        return delta.reshape(y0.shape) / c.r

    def _shares(self, a: View, x: Tensor) -> Tensor:
        """Each row's share of every skill, `(rows, splits, skills)`; in training, of skills that are drawn (relaxed
        Bernoulli variables of temperature 1)."""
        import torch

        c = a.config
        assert isinstance(c, PolyConfig)
        ids = a.of_rows("task_ids", x, default=0 if c.n_tasks == 1 else None)
        logits = a.poly_router[ids].view(-1, c.n_splits, c.n_skills)
        if a.training:
            u = torch.rand_like(logits).clamp(torch.finfo(logits.dtype).eps, 1 - torch.finfo(logits.dtype).eps)
            logits = logits + u.logit()
        on = logits.sigmoid()
        return on / (on.sum(-1, keepdim=True) + EPS)


def _mixed(how: str, shares: Tensor, skills: Tensor) -> Tensor:
    """One factor for each row, from those of the skills."""
    import torch

    return torch.einsum(how, shares, skills)


def _start(skills: Tensor, init: SlotInit) -> None:
    """Each skill's factor `(fan in, fan out)` as a linear layer's weight, which is its transpose, starts."""
    for skill in range(skills.shape[1]):
        for factor in skills[:, skill]:
            weight = factor.new_empty(factor.shape[1], factor.shape[0])
            init.kaiming_uniform(weight, math.sqrt(5))
            factor.copy_(weight.t())


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "POLY",
        PolyConfig,
        PolyTuner(),
        prefix="poly_",
        layer_names=("poly_lora_A", "poly_lora_B", "poly_router"),
        layer_options={name: name for name in ("r", "n_tasks", "n_skills", "n_splits", "poly_type")},
        default_targets={"target_modules": "poly"},
        summary="Skills as low-rank updates, mixed for the task of each row.",
        paper="arXiv:2202.13914",
        examples=({"r": 2, "n_skills": 3}, {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2}),
        example_values=lambda c, rows: {"task_ids": [row % c.n_tasks for row in range(rows)]},
        identity_at_start=lambda c: c.init_weights,
    )
