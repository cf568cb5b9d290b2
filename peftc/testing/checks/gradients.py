"""Training: gradients reach every slot, nothing else, and are those of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from peftc.model.peft_model import PeftModel
from peftc.testing.compare import close, same, same_names, state_of
from peftc.testing.models import seeded
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, quiet, slots_of

#: How far apart two outputs are taken for a difference. A step over a kink of the model's own needs a shorter one; a false
#: gradient is false at both.
_STEPS = (1e-6, 1e-8)


def gradients_in_slots_only(s: Subject) -> None:
    """A slot without a gradient is never trained; a base weight with one costs memory and drifts."""
    model = s.trained()
    grown = s.grown(model)
    fix = "Use every trainable slot in the lowerings, without detaching it."
    same_names(grown, slots_of(model, "default"), "The set of tensors with a gradient", fix)
    for name, gradient in grown.items():
        if not gradient.isfinite().all():
            raise broken(f"The gradient of `{name}` is not finite", "Avoid what has no derivative there.", name)
        if not gradient.count_nonzero():
            raise broken(f"The gradient of `{name}` is zero", fix, name)


def gradients_are_true(s: Subject) -> None:
    """A gradient is the slope of the output, in every slot and through every layer: compared with differences."""
    model = s.trained(dtype=torch.float64).double()
    grown = s.grown(model, torch.float64)
    slots = slots_of(model, "default")
    with seeded(4):
        ways = {name: torch.randn_like(p) for name, p in slots.items()}
    for name, way in ways.items():
        slope = float((grown[name] * way).sum())
        for step in _STEPS:
            found = _slope(s, model, slots[name], way, step)
            if abs(found - slope) <= 1e-5 * max(1.0, abs(slope), abs(found)):
                break
        else:
            what = f"Along a random direction in `{name}` the output has the slope {found:.6g}, its gradient says {slope:.6g}"
            raise broken(what, "Do not detach; give a custom backward its exact derivative.", name)


def _slope(s: Subject, model: PeftModel, slot: torch.nn.Parameter, way: Tensor, step: float) -> float:
    """Central difference of the functional that `Subject.grown` derives."""
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            slot.add_(sign * step * way)
            with s.drawing(model):
                y = s.run(model, torch.float64)
            with seeded(3):
                seed = torch.randn(y.shape, dtype=torch.float32).to(y.dtype)
            values.append(float((y * seed).sum()))
            slot.sub_(sign * step * way)
    return (values[0] - values[1]) / (2 * step)


def a_step_changes_slots_only(s: Subject) -> None:
    """An optimiser over the trainable parameters moves every slot and leaves the base as it was, bit for bit."""
    model = s.wrap()
    before = state_of(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trainable, lr=0.01, eps=1e-30)  # moves by signs: a small gradient is one, too
    for _ in range(2):  # slots behind a factor that starts at zero move in the second step
        s.grown(model)
        optimiser.step()
    shared = (alias for p in model.session.plans["default"].parameters() for alias in p.aliases)
    own = {*slots_of(model, "default"), *shared, *(_noted(model) if s.draws else ())}
    for name, tensor in model.state_dict().items():
        if name not in own:
            same(tensor, before[name], f"`{name}` after two steps", "Train slots only.", name)
        elif torch.equal(tensor, before[name]) or not tensor.isfinite().all():
            what = f"Two steps leave `{name}` where it was, or without a finite value"
            raise broken(what, "Start where the gradient is finite and not zero.", name)


def _noted(model: PeftModel) -> set[str]:
    """Names of buffers of the adapter's own, in which training notes what it drew."""
    plan = model.session.plans["default"]
    return {site.key(slot, "default").memory(plan.root) for site, slot in plan.slots() if slot.derived}


def checkpointing_reaches_every_slot(s: Subject) -> None:
    """Under gradient checkpointing, re-entrant or not, gradients are those without it."""
    model = s.trained().train()
    with seeded(4):  # what is drawn in training is drawn again for the backward pass
        expected = s.grown(model)
    for reentrant in (
        (True, False) if s.method.call_tuner is None else (False,)
    ):  # coefficients come from outside of blocks
        model = s.trained().train()
        with quiet():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        kind = "re-entrant" if reentrant else "ordinary"
        with seeded(4):
            grown = s.grown(model)
        fix = "Compute the same in every call."
        same_names(grown, expected, f"Under {kind} checkpointing the set of tensors with a gradient", fix)
        for name, gradient in expected.items():
            close(grown[name], gradient, f"The gradient of `{name}` under {kind} checkpointing", fix, tolerance=1e-5)
