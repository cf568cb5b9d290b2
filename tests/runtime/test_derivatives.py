"""Derivatives of second order, and forward ones, through every fast path: those of the plain operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from peftc import PeftModel, rules
from peftc.diagnostics import PeftcError
from peftc.ops import linear, lowrank, recomputed
from peftc.testing.subjects import Subject, quiet
from tests.runtime.examples import examples, rows

SUBJECTS = rows(examples(lambda s: (s.first and not s.model.is_language_model) or s.foremost))
ON_LAYERS = [p for p in SUBJECTS if not p.values[0].model.is_language_model and "x" in p.values[0].model.arguments()]
ON_LAYERS = [p for p in ON_LAYERS if p.values[0].model.arguments()["x"].is_floating_point()]

#: how a model is run -> its output
Run = Callable[[PeftModel, dict[str, Tensor]], Tensor]


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within, no function with a backward of its own is used."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, lowrank, recomputed):
            patch.setattr(module, "is_traced", lambda: True)
        yield


def directly(model: PeftModel, given: dict[str, Tensor]) -> Tensor:
    out = model(**given)
    return out if isinstance(out, Tensor) else out.logits


def in_checkpoint(model: PeftModel, given: dict[str, Tensor]) -> Tensor:
    run: Tensor = checkpoint(lambda: directly(model, given), use_reentrant=False)
    return run


def second(run: Run, model: PeftModel, given: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of a penalty on gradients, of what trains and of the inputs that require gradients."""
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves |= {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
        y = run(model, given)
        loss = (y * y.detach().cos()).square().mean()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        assert isinstance(penalty, Tensor)
        return dict(zip(leaves, torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True), strict=True))


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert any(g is not None for g in wanted.values())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


def made(subject: Subject, training: bool = True) -> tuple[PeftModel, dict[str, Tensor]]:
    """The adapted model in double precision, and a call of it whose inputs require gradients where they can."""
    with quiet():
        model = subject.trained(dtype=torch.float64).train(training)
    given = subject.arguments(model, torch.float64)
    return model, {name: t.requires_grad_() if t.is_floating_point() else t for name, t in given.items()}


@pytest.mark.parametrize("run", [directly, in_checkpoint])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_second_derivatives_are_those_of_plain_operations(subject: Subject, run: Run) -> None:
    model, given = made(subject)
    torch.manual_seed(0)
    found = second(run, model, given)
    torch.manual_seed(0)
    with plain_operations():
        wanted = second(directly, model, given)
    assert_same(found, wanted)


@pytest.mark.parametrize("subject", ON_LAYERS)
def test_second_derivatives_while_others_act_too(subject: Subject) -> None:
    model, given = made(subject, training=False)
    if not model.session.plans["default"].maps:
        pytest.skip("one adapter at a time acts around modules")
    subject.join(model, "other")
    try:
        model.double().base_model.set_adapter(["default", "other"])
    except PeftcError as error:
        assert [problem.code for problem in error.diagnostics] == [rules.ADAPTERS_CONFLICT.code]
        pytest.skip("two of them cannot act together")
    found = second(directly, model, given)
    with plain_operations():
        assert_same(found, second(directly, model, given))


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("subject", ON_LAYERS)
def test_forward_derivatives_are_those_of_central_differences(subject: Subject, gradients: bool) -> None:
    model, given = made(subject, training=False)
    x = given["x"].detach()
    direction, step = torch.randn_like(x), 1e-6
    with torch.set_grad_enabled(gradients):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(directly(model, {"x": forward_ad.make_dual(x, direction)})).tangent
        up, low = (directly(model, {"x": x + sign * step * direction}) for sign in (1, -1))
    assert found is not None
    torch.testing.assert_close(found, (up - low) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("subject", ON_LAYERS)
def test_many_gradients_at_once(subject: Subject) -> None:
    model, given = made(subject, training=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    y = directly(model, given)
    seeds = torch.randn(3, *y.shape, dtype=y.dtype)
    at_once = torch.autograd.grad(y, trained, seeds, is_grads_batched=True, retain_graph=True)
    for place, seed in enumerate(seeds):
        each = torch.autograd.grad(y, trained, seed, retain_graph=True)
        for one, other in zip(at_once, each, strict=True):
            torch.testing.assert_close(one[place], other)
