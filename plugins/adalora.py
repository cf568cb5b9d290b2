"""AdaLoRA: a low-rank update whose ranks are allocated to layers while it trains (Zhang et al., arXiv:2303.10512).

`W' = W + s · B diag(E) A` has the form of an SVD. Steps of training smooth how much each triplet (a row of A, an entry of E, a
column of B) matters for the loss; the least important entries of E become zero, on a budget that falls from `init_r` to
`target_r` per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from peftc import plugin as p

from .lora import config as lora

#: The reference adds it to the rank that it divides by.
EPSILON = 1e-5
TRIPLET = ("lora_A", "lora_E", "lora_B")
#: Options of the class that this one derives from which this method does not read, with the value that means "off".
UNREAD: p.Options = {"alora_invocation_tokens": None, "r": 8, "use_rslora": False, "alpha_pattern": {}}


class AdaLoraConfig(lora.LoraConfig):
    """Options of an AdaLoRA adapter, named as in the reference. Steps are counted from 1."""

    peft_type: p.PeftType | None = p.PeftType("ADALORA")
    target_r: p.Count = 8
    """The average rank of a layer that is left in the end."""
    bias: Literal["none", "all", "lora_only", "adalora_only"] = "none"  # type: ignore[assignment]  # one more
    """Biases of the base model to train along: none, all, or those of adapted layers (`lora_only` means the same)."""
    init_r: p.Count = 12
    """The rank that every layer starts with."""
    tinit: int = p.Field(default=0, ge=0)
    """Steps at the beginning without allocation."""
    tfinal: int = p.Field(default=0, ge=0)
    """Steps at the end in which the ranks stay as they were allocated."""
    deltaT: p.Count = 1
    """Steps from one allocation to the next."""
    beta1: float = p.Field(default=0.85, gt=0, lt=1)
    """How slowly the importance of a triplet follows its sensitivity."""
    beta2: float = p.Field(default=0.85, gt=0, lt=1)
    """How slowly its uncertainty does."""
    orth_reg_weight: float = p.Field(default=0.5, ge=0)
    """Weight of the term that keeps rows of A and columns of B orthonormal, in the loss."""
    total_step: int | None = None
    """Steps of the whole training; needed."""
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]  # as in the reference
    """What training came to: module path and `.lora_E` -> which of the `init_r` ranks are left."""

    pattern_options: ClassVar[Mapping[str, str]] = {}

    def contradictions(self) -> p.Problems:
        """A schedule that allocates nothing."""
        if not self.total_step or self.total_step < 0:
            fix = "Set it to the number of optimiser steps of the training."
            yield p.rules.BAD_VALUE(f"`total_step` cannot be `{self.total_step}`", fix=fix, where="total_step")
        elif self.tinit >= self.total_step - self.tfinal:
            steps = f"`tinit` {self.tinit} and `tfinal` {self.tfinal} of `total_step` {self.total_step}"
            fix = "Lower `tinit` or `tfinal`, or raise `total_step`."
            yield p.rules.CONTRADICTION(
                f"The supplied schedule values don't allow for a budgeting phase: {steps}", fix=fix, where="tinit"
            )
        if str(self.init_lora_weights).lower() == "loftq":
            what = "`init_lora_weights` cannot be `loftq` for this method"
            yield p.rules.OPTION_NOT_AVAILABLE(what, fix="Choose another start.", where="init_lora_weights")
        for option in (*lora.OF_VARIANTS, "loftq_config"):
            if getattr(self, option):
                yield p.rules.OPTION_NOT_AVAILABLE(f"`{option}` is not for this method", fix="Remove it.", where=option)


class AdaLoraTuner(p.MapTuner[AdaLoraConfig]):
    """`y = W x + s / r · B (E * A x)`, r being the rank at the start, whatever is left of it."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | {p.Kind.EMBEDDING}
    dropout_option = "lora_dropout"
    step_options = frozenset({"rank_pattern"})

    def slots(self, c: AdaLoraConfig, layer: p.LayerFacts) -> p.Slots:
        return self._of_rank(c, layer, c.init_r)

    def _of_rank(self, c: AdaLoraConfig, layer: p.LayerFacts, rank: int) -> p.Slots:
        yield p.parameter_slot("lora_A", (rank, layer.fan_in))
        yield p.parameter_slot("lora_B", (layer.out_features, rank))
        yield p.parameter_slot("lora_E", (rank, 1))
        yield p.constant_slot("ranknum", (1,), float(c.init_r))

    def init(self, c: AdaLoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        for name in ("lora_A", "lora_E", "lora_B"):
            init.normal(slots[name])
        init.skip_normal(slots["ranknum"])  # which the reference fills twice as well
        if c.init_lora_weights:
            init.zeros(slots["lora_E"])
            init.normal(slots["lora_A"], 0.02)
            init.normal(slots["lora_B"], 0.02)

    def scaling(self, c: AdaLoraConfig, layer: p.LayerFacts) -> float:
        return float(c.lora_alpha if c.lora_alpha > 0 else c.init_r)

    def thin(self, a: p.View[AdaLoraConfig]) -> p.Factors:
        A, B = a.lora_A, a.lora_B
        singular = a.lora_E / (a.ranknum + EPSILON)
        if A.shape[1] <= B.shape[0]:  # into the smaller factor
            A = A * singular
        else:
            B = B * singular.t()
        return A, B, a.scaling

    # combining ----------------------------------------------------------------------------------------------------

    def of_rank(self, c: AdaLoraConfig, rank: int) -> AdaLoraConfig:
        plain = {"init_r": rank, "target_r": min(c.target_r, rank), "lora_alpha": 1, "rank_pattern": None}
        steps = {} if c.total_step else {"total_step": 1, "tinit": 0, "tfinal": 0}  # nothing is left to allocate
        return c.model_copy(update=plain | steps)

    def of_twice(self, c: AdaLoraConfig) -> AdaLoraConfig:
        changes = {"init_r": 2 * c.init_r, "target_r": 2 * c.target_r, "rank_pattern": None, "init_lora_weights": True}
        if c.lora_alpha <= 0:  # the scaling is the rank
            changes["lora_alpha"] = c.init_r
        return c.model_copy(update=changes)

    def of_thin(self, c: AdaLoraConfig, layer: p.LayerFacts, A: p.Tensor, B: p.Tensor) -> p.Tensors:
        rank = A.shape[0]
        ranknum = A.new_full((1,), float(c.init_r))
        E = (ranknum + EPSILON).expand(rank, 1).clone()  # which `thin` divides out again
        return {"lora_A": A, "lora_B": B, "lora_E": E, "ranknum": ranknum}

    # checkpoints --------------------------------------------------------------------------------------------------

    def fitted(self, c: AdaLoraConfig, layer: p.LayerFacts, shapes: p.Shapes) -> p.Slots:
        bound = {slot.name: slot.shape for slot in self.slots(c, layer) if slot.saved}
        rank = shapes["lora_E"][0] if shapes.get("lora_E") else c.init_r
        slots = tuple(self._of_rank(c, layer, rank))
        fits = rank < c.init_r and {slot.name: slot.shape for slot in slots if slot.saved} == dict(shapes)
        return slots if fits and shapes.keys() == bound.keys() else self.slots(c, layer)

    def export(self, c: AdaLoraConfig, path: str, layer: p.LayerFacts, slots: p.Tensors) -> p.Tensors:
        kept = _kept(c, path)
        if kept is None or len(kept) != slots["lora_E"].shape[0]:  # not allocated, or loaded with what is left
            return slots
        return {
            name: tensor.index_select(int(name == "lora_B"), _places(kept, tensor)) for name, tensor in slots.items()
        }

    def restore(
        self,
        c: AdaLoraConfig,
        path: str,
        layer: p.LayerFacts,
        saved: p.Tensors,
        shapes: p.Shapes,
    ) -> p.Tensors:
        rank, own = saved["lora_E"].shape[0], shapes["lora_E"][0]
        if rank > own:
            what = f"`{path}` has rank {rank} in the checkpoint, and {own} is left of it here"
            fix = "Load it under another name, or into a new model."
            raise p.PeftcError(p.rules.SHAPES_DIFFER(what, fix=fix, where=path))
        kept = _kept(c, path)
        if kept is None or len(kept) != own or sum(kept) != rank:
            kept = [index < rank for index in range(own)]
        return {
            name: tensor.new_zeros(shapes[name]).index_copy(int(name == "lora_B"), _places(kept, tensor), tensor)
            for name, tensor in saved.items()
        }

    # training -----------------------------------------------------------------------------------------------------

    def loss(self, c: AdaLoraConfig, sites: Mapping[str, p.View[AdaLoraConfig]], outputs: Any) -> p.Tensor | None:
        """The mean over all A and B of `|A A^T - I|` and `|B^T B - I|` (Frobenius), weighted (equation 4)."""
        import torch

        if not c.orth_reg_weight:
            return None
        groups: dict[tuple[Any, ...], list[p.Tensor]] = {}
        for a in sites.values():
            for gram in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B):
                groups.setdefault((gram.shape, gram.device, gram.dtype), []).append(gram)
        norms = []
        for grams in groups.values():
            stacked = torch.stack(grams)
            identity = torch.eye(stacked.shape[-1], dtype=stacked.dtype, device=stacked.device)
            norms.append(torch.linalg.matrix_norm(stacked - identity).sum())
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).sum()
        return c.orth_reg_weight * total / (2 * len(sites))

    def on_step(
        self, c: AdaLoraConfig, step: int, sites: Mapping[str, p.View[AdaLoraConfig]], state: dict[str, p.Tensor]
    ) -> p.Changes:
        last = (c.total_step or 0) - c.tfinal
        if any(a.lora_E.shape[0] != c.init_r for a in sites.values()):
            return p.Changes()  # loaded with what is left of its ranks: those it keeps
        if step > last:
            kept = {path: _kept(c, path) for path in sites} if c.rank_pattern else {}
            masks = {path: _column(keep, sites[path].lora_E) for path, keep in kept.items() if keep is not None}
            return p.Changes(masks={(path, "lora_E"): mask for path, mask in masks.items()})
        if step < last:
            _follow(c, sites, state)
        final = step == last
        if not final and (step <= c.tinit or step % c.deltaT):
            return p.Changes()
        masks = _most_important(sites, state, _budget(c, step, len(sites)))
        if final:
            state.clear()
        pattern = {f"{path}.lora_E": mask.flatten().tolist() for path, mask in masks.items()}
        return p.Changes(
            masks={(path, "lora_E"): mask for path, mask in masks.items()},
            options={"rank_pattern": pattern} if final else {},
        )

    def schedule(self, c: AdaLoraConfig, steps: int) -> p.Problems:
        last = (c.total_step or 0) - c.tfinal
        if steps < last:
            yield p.rules.SCHEDULE(
                f"Ranks are allocated for good at step {last}, and the training has {steps}",
                fix=f"Set `total_step` to {steps}, the number of optimiser steps.",
                where="total_step",
            )


def _kept(c: AdaLoraConfig, path: str) -> list[bool] | None:
    """Which ranks are left of a layer; the key may end in an adapter's name, as in a running model of the reference."""
    pattern = c.rank_pattern or {}
    name = f"{path}.lora_E"
    return pattern.get(name) or next((kept for key, kept in pattern.items() if key.startswith(f"{name}.")), None)


def _places(kept: list[bool], like: p.Tensor) -> p.Tensor:
    import torch

    return torch.tensor([index for index, keep in enumerate(kept) if keep], dtype=torch.int64, device=like.device)


def _column(kept: list[bool], like: p.Tensor) -> p.Tensor:
    import torch

    return torch.tensor(kept, device=like.device).view(-1, 1)


def _follow(c: AdaLoraConfig, sites: Mapping[str, p.View[AdaLoraConfig]], state: dict[str, p.Tensor]) -> None:
    """Smooth the sensitivity `|w · gradient|` of every entry, and how far it is from that (equations 8 to 10)."""
    for path, a in sites.items():
        for slot in TRIPLET:
            tensor: p.Tensor = getattr(a, slot)
            importance = state.setdefault(f"{path}.{slot}.importance", tensor.new_zeros(tensor.shape))
            uncertainty = state.setdefault(f"{path}.{slot}.uncertainty", tensor.new_zeros(tensor.shape))
            now = tensor.new_zeros(()) if tensor.grad is None else (tensor * tensor.grad).abs()
            importance.mul_(c.beta1).add_(now, alpha=1 - c.beta1)
            uncertainty.mul_(c.beta2).add_((now - importance).abs(), alpha=1 - c.beta2)


def _budget(c: AdaLoraConfig, step: int, layers: int) -> int:
    """How many triplets are left after a step: a cubic from all to the target (equation 12)."""
    first, target, end = c.init_r * layers, c.target_r * layers, (c.total_step or 0) - c.tfinal
    if step <= c.tinit:
        return first
    left = 1 - (step - c.tinit) / (end - c.tinit)
    return int((first - target) * left**3 + target)


def _most_important(sites: Mapping[str, p.View[AdaLoraConfig]], state: p.Tensors, budget: int) -> dict[str, p.Tensor]:
    """Per layer a mask `(r, 1)` of the triplets within the budget: of E an entry's own score, of A and B the mean of a row
    and a column (equation 7)."""
    import torch

    def score(path: str, slot: str) -> p.Tensor:
        importance = state.get(f"{path}.{slot}.importance")
        if importance is None:
            return torch.zeros_like(getattr(sites[path], slot))
        return importance * state[f"{path}.{slot}.uncertainty"]

    scores = {
        path: score(path, "lora_E").flatten() + score(path, "lora_A").mean(1) + score(path, "lora_B").mean(0)
        for path in sites
    }
    every = torch.cat([found.to("cpu") for found in scores.values()])
    dropped = every.numel() - budget
    threshold = float(every.kthvalue(dropped).values) if dropped > 0 else -math.inf
    return {path: (found > threshold).view(-1, 1) for path, found in scores.items()}


def check(c: AdaLoraConfig) -> p.Problems:
    """Ranks that do not fall, and options that nothing reads."""
    yield from lora.check(c)
    if c.target_r > c.init_r:
        yield p.rules.CONTRADICTION(
            f"Ranks cannot rise from `init_r` {c.init_r} to `target_r` {c.target_r}: none would be taken away",
            fix=f"Set `target_r` to less than {c.init_r}.",
            where="target_r",
            severity=p.Severity.WARNING,
        )
    for option, off in UNREAD.items():
        if getattr(c, option) != off:
            fix = "Use `init_r` and `target_r`." if option == "r" else f"Remove `{option}`."
            yield p.rules.WITHOUT_EFFECT(f"`{option}` has no effect on this method", fix=fix, where=option)


# what the model class has beside --------------------------------------------------------------------------------------


def update_and_allocate(self: Any, global_step: int) -> None:
    """Take optimiser step `global_step`, counted from 1: after `backward()`, before `zero_grad()`. Raises `PeftcError`."""
    self.take_step(global_step)


def resize_modules_by_rank_pattern(self: Any, rank_pattern: p.Options, adapter_name: str) -> None:
    """Take the ranks that the pattern leaves out away from an adapter's layers. Raises `PeftcError`."""
    masks = {key: [bool(keep) for keep in _flat(kept)] for key, kept in rank_pattern.items()}
    self.take_saved_form(adapter_name, rank_pattern=masks)


def resize_state_dict_by_rank_pattern(
    self: Any, rank_pattern: p.Options, state_dict: dict[str, p.Tensor], adapter_name: str
) -> dict[str, p.Tensor]:
    """The same for a state dict with the names of the wrapped model, in place; it is returned."""
    for name, mask in rank_pattern.items():
        path, kept = name.split(".lora_E")[0], [bool(keep) for keep in _flat(mask)]
        for slot in TRIPLET:
            key, axis = f"base_model.model.{path}.{slot}.{adapter_name}", int(slot == "lora_B")
            tensor = state_dict[key]
            if tensor.shape[axis] != sum(kept):
                state_dict[key] = tensor.index_select(axis, _places(kept, tensor))
    return state_dict


def _flat(kept: Any) -> Iterable[Any]:
    """A mask as a list: the reference takes tensors, too."""
    flat: Iterable[Any] = kept if isinstance(kept, list) else kept.flatten().tolist()
    return flat


peftc_tuner = p.method(
    AdaLoraConfig,
    AdaLoraTuner(),
    prefix="lora_",
    layer_names=("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"),
    layer_options={"r": "init_r", "lora_alpha": "lora_alpha"},
    model_methods=(update_and_allocate, resize_modules_by_rank_pattern, resize_state_dict_by_rank_pattern),
    tags=("adalora",),
    examples=(
        {"init_r": 4, "target_r": 2, "total_step": 10},
        {"init_r": 3, "target_r": 1, "total_step": 20, "tinit": 2, "tfinal": 5, "lora_alpha": 4},
    ),
    check=check,
    check_start=lora.check_start,
    start_option="init_lora_weights",
    own_starts=("gaussian",),
    identity_at_start=lambda c: bool(c.init_lora_weights),
)
