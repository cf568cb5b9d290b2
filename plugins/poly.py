"""Poly: skills as low-rank updates, mixed for the task of each row (Ponti et al., arXiv:2202.13914; splits: arXiv:2211.03831).

A layer has an inventory of skills, pairs of factors `A_s`, `B_s`, and a router with logits for each task. For a row of
task t, `Δy = x A B / r` with `A = Σ_s α_ts A_s` and likewise B; with splits, parts of the features are routed apart.
"""

from __future__ import annotations

from typing import Literal

from peftc import plugin as p

#: Keeps shares finite where all skills are switched off.
EPS = 1e-12


class PolyConfig(p.TargetsMixin, p.RankMixin, p.InitWeightsMixin, p.ModulesToSaveMixin, p.PeftConfig):
    """Options of a Poly adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("POLY")
    r: p.Count = 8
    """Rank of each skill's update."""
    init_weights: bool = True
    """Start the second factors at zero, which changes nothing; otherwise at random."""
    poly_type: Literal["poly"] = "poly"
    """How tasks are routed; there is one way."""
    n_tasks: p.Count = 1
    """Number of tasks; calls name each row's by `task_ids`, numbered from 0."""
    n_skills: p.Count = 4
    """Number of skills, low-rank updates, on each layer."""
    n_splits: p.Count = 1
    """Number of parts that features are divided into, each routed for itself; more than 1 is multi-head routing."""


class PolyTuner(p.MapTuner[PolyConfig]):
    """Skills A `(splits, skills, in / splits, r)` and B `(splits, skills, r, out / splits)`, and the tasks' logits."""

    supports = p.LINEAR_KINDS
    keywords = ("task_ids",)

    def slots(self, c: PolyConfig, layer: p.LayerFacts) -> p.Slots:
        yield p.parameter_slot("poly_lora_A", (c.n_splits, c.n_skills, layer.in_features // c.n_splits, c.r))
        yield p.parameter_slot("poly_lora_B", (c.n_splits, c.n_skills, c.r, layer.out_features // c.n_splits))
        yield p.module_slot("poly_router", (c.n_tasks, c.n_splits * c.n_skills), tail="module_logits")

    def check(self, c: PolyConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        for what, size in (("inputs", layer.in_features), ("outputs", layer.out_features)):
            if size % c.n_splits:
                text = f"The layer's {size} {what} cannot be divided into {c.n_splits} equal parts"
                yield p.rules.BAD_VALUE(text, fix="Choose `n_splits` that divides both sizes.", where=path)

    def check_call(self, c: PolyConfig, values: p.Tensors) -> p.Problems:
        why, ids = "Each task mixes the skills in its own way.", values.get("task_ids")
        if ids is None and c.n_tasks > 1:
            yield p.rules.TASKS_NEEDED(
                "The call has no `task_ids`", why=why, fix="Give one `task_ids` entry for each row."
            )
        for task in () if ids is None else ids[(ids < 0) | (ids >= c.n_tasks)][:1].tolist():
            what = f"`task_ids` names task {task}, but there are {c.n_tasks}"
            yield p.rules.TASKS_NEEDED(what, why=why, fix=f"Tasks are numbered from 0 to {c.n_tasks - 1}.")

    def init(self, c: PolyConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        _start(slots["poly_lora_A"], init)
        init.zeros(slots["poly_lora_B"]) if c.init_weights else _start(slots["poly_lora_B"], init)
        init.uniform(slots["poly_router"], 1e-3)

    def branch(self, a: p.View[PolyConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        import torch

        shares = _shares(a, x)
        A = torch.einsum("bqs,qsdr->bqdr", shares, a.poly_lora_A).flatten(1, 2)
        B = torch.einsum("bqs,qsrd->brqd", shares, a.poly_lora_B).flatten(2)
        delta = x.flatten(1, -2) @ A @ B if x.dim() > 2 else (x.unsqueeze(1) @ A @ B).squeeze(1)
        return delta.reshape(y0.shape) / a.config.r


def _shares(a: p.View[PolyConfig], x: p.Tensor) -> p.Tensor:
    """Each row's share of every skill, `(rows, splits, skills)`; in training, of skills that are drawn (relaxed Bernoulli
    variables of temperature 1)."""
    import torch

    c = a.config
    ids = a.of_rows("task_ids", x, default=0 if c.n_tasks == 1 else None)
    logits = a.poly_router[ids].view(-1, c.n_splits, c.n_skills)
    if a.training:
        eps = torch.finfo(logits.dtype).eps
        logits = logits + torch.rand_like(logits).clamp(eps, 1 - eps).logit()
    on = logits.sigmoid()
    return on / (on.sum(-1, keepdim=True) + EPS)


def _start(skills: p.Tensor, init: p.SlotInit) -> None:
    """Each skill's factor `(fan in, fan out)` as a linear layer's weight, which is its transpose, starts."""
    for skill in range(skills.shape[1]):
        for factor in skills[:, skill]:
            weight = factor.new_empty(factor.shape[1], factor.shape[0])
            init.kaiming_uniform(weight)
            factor.copy_(weight.t())


peftc_tuner = p.method(
    PolyConfig,
    PolyTuner(),
    prefix="poly_",
    layer_names=("poly_lora_A", "poly_lora_B", "poly_router"),
    layer_options=("r", "n_tasks", "n_skills", "n_splits", "poly_type"),
    examples=({"r": 2, "n_skills": 3}, {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2}),
    example_values=lambda c, rows: {"task_ids": [row % c.n_tasks for row in range(rows)]},
)
