"""opacus: gradients of single samples, taken by hooks on the modules that hold an adapter's factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import LoraConfig, PeftcError, PeftModel, get_peft_model, rules
from peftc.testing.models import seeded

opacus: Any = pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus==1.6.0")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.steps = nn.Linear(8, 6), nn.Linear(6, 4), nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(self.steps(x))))
        return y


def adapted(**options: Any) -> PeftModel:
    with seeded(0):
        return get_peft_model(Net(), LoraConfig(r=2, init_lora_weights=False, **options))


@pytest.mark.parametrize("saved", [None, ["second"]], ids=["factors", "a saved module"])
def test_gradients_of_single_samples_are_those_of_each_alone(saved: list[str] | None) -> None:
    targets = ["first"] if saved else ["first", "second"]
    model, x = adapted(target_modules=targets, modules_to_save=saved), torch.randn(3, 5, 8)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    alone = [torch.autograd.grad(model(row).square().sum(), list(trained.values())) for row in x.unsqueeze(1)]
    sampled = opacus.GradSampleModule(model, loss_reduction="sum")
    sampled(x).square().sum().backward()
    for place, (name, parameter) in enumerate(trained.items()):
        wanted = torch.stack([grads[place] for grads in alone])
        torch.testing.assert_close(parameter.grad_sample, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_what_it_cannot_have_is_refused_by_name() -> None:
    """How a convolution steps, its layer knows, which opacus does not call."""
    sampled = opacus.GradSampleModule(adapted(target_modules=["steps"]), loss_reduction="sum")
    with pytest.raises(PeftcError) as caught:
        sampled(torch.randn(3, 5, 8)).square().sum().backward()
    assert [found.code for found in caught.value.diagnostics] == [rules.SLOT_CALLED.code]
