"""LoRA on torch's own attention, beside the reference: the same names and outputs, files both ways; and where the reference
passes an adapter over."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc import LoraConfig, PeftcWarning

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = nn.Linear(10, 10)
        self.mha = nn.MultiheadAttention(10, 2, **options)
        self.lin1 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin0(x)
        out: Tensor = self.lin1(self.mha(h, h, h)[0])
        return out


def x() -> Tensor:
    return torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(1))


def made(library: ModuleType, seed: int = 3, **options: Any) -> Any:
    given = {"target_modules": ["mha", "lin0"], "r": 4, "init_lora_weights": False, **options}
    model = library.get_peft_model(Net(batch_first=True), library.LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"mha": 2}, "alpha_pattern": {"mha": 6}}, {"use_rslora": True}]
)
def test_parameters_and_outputs_are_the_references(options: dict[str, Any]) -> None:
    theirs, ours = made(peft, **options), made(peftc, **options)
    assert shapes(ours) == shapes(theirs)
    torch.testing.assert_close(ours(x()), theirs(x()), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x()), theirs(x()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.merge_and_unload()(x()), theirs.merge_and_unload()(x()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("writer", [peft, peftc], ids=["peft", "peftc"])
def test_files_go_both_ways(writer: ModuleType, tmp_path: Path) -> None:
    reader = peftc if writer is peft else peft
    model = made(writer)
    model.save_pretrained(str(tmp_path))
    loaded = reader.PeftModel.from_pretrained(Net(batch_first=True), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(x()), model(x()), rtol=1e-4, atol=1e-4)


def test_the_update_of_the_output_counts_twice_and_its_gradient_too() -> None:
    """The reference adds it twice in every state, so that files mean that; its gradient is that of half the update."""
    found = []
    for library in (peft, peftc):
        model = made(library)
        model(x()).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        right = gradient * (2 if "out_proj" in name else 1)
        torch.testing.assert_close(ours[name], right, rtol=1e-3, atol=1e-5 * right.abs().max().item())
    layer = made(peftc).get_base_model().mha.base_layer.out_proj
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(layer.weight, layer.base_layer.weight + 2 * (8 / 4) * B @ A)


def test_alone_the_output_layer_is_adapted_once() -> None:
    """There it has no effect, since it is never called."""
    theirs, ours = (made(library, target_modules=["out_proj"]) for library in (peft, peftc))
    base = Net(batch_first=True).eval()
    torch.testing.assert_close(theirs(x()), base(x()))
    layer = ours.get_base_model().mha.out_proj
    with torch.no_grad():
        base.mha.out_proj.weight += (8 / 4) * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(ours(x()), base(x()))


@pytest.mark.parametrize("target", ["self_attn", "linear1"])
def test_kernels_of_encoders_pass_the_references_adapter_over_and_ours_not(target: str) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    inputs = torch.randn(2, 5, 16)
    for library, right in ((peft, False), (peftc, True)):
        config = library.LoraConfig(target_modules=[target], r=4, init_lora_weights=False)
        model = library.get_peft_model(copy.deepcopy(base), config).eval()
        wanted = model(inputs.clone().requires_grad_())  # no kernel where gradients are due
        with torch.no_grad():
            assert torch.allclose(model(inputs), wanted, atol=1e-5) is right


def test_dropout_of_inputs_is_said_to_have_no_effect_and_has_none() -> None:
    with pytest.warns(PeftcWarning, match=r"(?s)PC401.*`mha.in_proj_weight`"):
        model = peftc.get_peft_model(
            Net(), LoraConfig(target_modules=["mha"], lora_dropout=0.5, init_lora_weights=False)
        )
    y = model.eval()(x())
    torch.testing.assert_close(model.train()(x()), y)


def test_other_adapters_are_swapped_in(tmp_path: Path) -> None:
    model, other = made(peftc), made(peftc, seed=5)
    other.save_pretrained(tmp_path)
    peftc.prepare_model_for_compiled_hotswap(model, target_rank=8)
    peftc.hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x()), other(x()))


def test_a_model_adapted_in_place_by_a_state_dict_has_it() -> None:
    model = made(peftc)
    state = peftc.get_peft_model_state_dict(model)
    base = peftc.inject_adapter_in_model(LoraConfig(r=4), Net(batch_first=True), state_dict=state)
    peftc.set_peft_model_state_dict(base, state)
    torch.testing.assert_close(base.eval()(x()), model(x()))
