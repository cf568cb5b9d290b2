"""Functions whose backward computes them again: the same values and gradients, and nothing kept but the inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peftc.ops.recomputed import can_recompute, recomputed


def curved(x: Tensor, slot: Tensor, unused: Tensor) -> Tensor:
    return torch.tanh(x @ slot).exp()


def drawing(x: Tensor, slot: Tensor, unused: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, 0.5) @ slot


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (4, 3), (2,))]
    return made[0], made[1], made[2]


def test_values_and_gradients_are_those_of_the_function() -> None:
    x, slot, unused = inputs()
    assert torch.equal(recomputed(curved, x, [slot, unused]), curved(x, slot, unused))
    assert torch.autograd.gradcheck(lambda x, slot: recomputed(curved, x, [slot, unused]), (x, slot))
    recomputed(curved, x, [slot, unused]).sum().backward()
    assert unused.grad is None


def test_a_frozen_slot_gets_no_gradient() -> None:
    x, slot, unused = inputs()
    recomputed(curved, x.detach(), [slot, unused.detach()]).sum().backward()
    frozen = slot.detach()
    recomputed(curved, x, [frozen, unused]).sum().backward()
    assert slot.grad is not None and x.grad is not None and frozen.grad is None


def test_nothing_but_the_inputs_is_kept() -> None:
    x, slot, unused = inputs()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        recomputed(curved, x, [slot, unused])
        assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), slot.data_ptr(), unused.data_ptr()]
        kept.clear()
        curved(x, slot, unused)
        assert len(kept) > 2


def test_what_was_drawn_is_drawn_again_and_the_generator_goes_on() -> None:
    x, slot, unused = inputs()
    torch.manual_seed(7)
    y = recomputed(drawing, x, [slot, unused])
    after = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(7)
    (expected,) = torch.autograd.grad(drawing(x, slot, unused).sum(), slot)
    assert slot.grad is not None
    assert torch.equal(slot.grad, expected)


def test_only_where_backward_finds_things_as_forward_did() -> None:
    x = torch.ones(2)
    assert can_recompute(x)
    with torch.no_grad():
        assert not can_recompute(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_recompute(x)
