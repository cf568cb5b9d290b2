"""Biases of the base that train along (`bias`) get their gradients, whichever way the method acts on the layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from peftc import get_peft_model
from peftc.graph.nodes import Kind
from peftc.registry.manager import default_registry
from peftc.testing.subjects import quiet, randomise
from peftc.tuner.features import features_of

LAYERS = {
    Kind.LINEAR: (lambda: nn.Linear(8, 6), (3, 8)),
    Kind.CONV1D: (lambda: nn.Conv1d(4, 6, 2), (3, 4, 5)),
    Kind.CONV2D: (lambda: nn.Conv2d(4, 6, 2), (3, 4, 5, 5)),
}


def cases() -> Iterator[tuple[str, int, Kind]]:
    registry = default_registry()
    for name in registry.names:
        method = registry.get(name)
        if method.adapts_layers and features_of(method)["options"]["bias"]:
            for example, options in enumerate(method.examples):
                variant = method.variant_for(method.config(**options))
                if variant is not None and any(tuner.keywords for tuner in variant.tuners):
                    continue  # which acts by what a call gives
                yield from ((name, example, kind) for kind in LAYERS if kind in (variant or method).supports)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "example", "kind"), list(cases()))
def test_a_bias_that_trains_along_gets_its_slope(name: str, example: int, kind: Kind) -> None:
    method = default_registry().get(name)
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    options = {**method.examples[example], "target_modules": ["0"], "bias": "all"}
    with quiet():
        model = get_peft_model(nn.Sequential(make()).double(), method.config(**options)).eval()
    randomise(model, "default")
    bias = model.get_base_model()[0].base_layer.bias
    x = torch.randn(shape, dtype=torch.float64)
    seed = torch.randn_like(model(x))

    def value() -> Tensor:
        return (model(x) * seed).sum()

    value().backward()
    assert bias.grad is not None
    step = torch.zeros_like(bias)
    step[0] = 1e-6
    with torch.no_grad():
        slope = -value()
        bias.add_(step)
        slope += value()
    torch.testing.assert_close(bias.grad[0], slope / 1e-6, rtol=1e-5, atol=1e-5)
