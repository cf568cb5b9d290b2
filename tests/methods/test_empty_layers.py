"""Layers without an output, as some detectors have: adapted like all others, and nothing comes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.testing.models import seeded


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.none, self.some = nn.Linear(8, 0), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.none(x), self.some(x)], -1)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_without_output_is_adapted_by_all_linear() -> None:
    with seeded(0):
        model = peftc.get_peft_model(Split(), peftc.LoraConfig(r=2, target_modules="all-linear"))
        x = torch.randn(2, 8)
    names = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert names["base_model.model.none.lora_B.default.weight"] == (0, 2)
    before = model(x)
    before.sum().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
