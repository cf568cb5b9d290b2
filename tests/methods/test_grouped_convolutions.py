"""Convolutions of several groups: every method that adapts convolutions adapts them, and LoRA has the reference's layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftc
from peftc import LoraConfig, PeftcError, PeftModel, get_peft_model
from peftc.graph.nodes import CONV_KINDS
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import layer_facts
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.testing.subjects import quiet, randomise
from peftc.tuner.experts import tuner_for

pytestmark = pytest.mark.filterwarnings("ignore")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Net(nn.Module):
    """A convolution of two groups, and one of a group for each channel; padded, strided."""

    def __init__(self, dims: int = 2, mode: str = "zeros") -> None:
        super().__init__()
        torch.manual_seed(0)
        make = CONVOLUTIONS[dims]
        self.pair = make(8, 12, 3, groups=2, padding=1, padding_mode=mode)
        self.each = make(12, 12, 2, groups=12, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.each(self.pair(x).tanh())
        return y


def x(dims: int = 2) -> Tensor:
    return torch.randn(2, 8, *(5,) * dims, generator=torch.Generator().manual_seed(1))


def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def lora(dims: int = 2, library: object = peftc, name: str = "default", **options: object) -> nn.Module:
    config = library.LoraConfig(**{"target_modules": ["pair", "each"], "r": 12, "lora_alpha": 6, **options})  # type: ignore[attr-defined]
    model: nn.Module = library.get_peft_model(Net(dims), config, name)  # type: ignore[attr-defined]
    return moved(model)


# every method ---------------------------------------------------------------------------------------------------------


def convolving() -> Iterator[tuple[str, int]]:
    registry = default_registry()
    for name in registry.names:
        for dims, kind in enumerate(sorted(CONV_KINDS), start=1):
            if registry.get(name).adapts_layers and kind in registry.get(name).supports:
                yield name, dims


@pytest.mark.parametrize(("name", "dims"), list(convolving()))
def test_every_method_on_convolutions_adapts_groups_and_merges_them_exactly(name: str, dims: int) -> None:
    method = default_registry().get(name)
    options = dict(method.examples[0]) if method.examples else {}
    for rank in {"r", "init_r"} & options.keys() & ({"r", "init_r"} if name in ("LORA", "ADALORA") else set()):
        options[rank] = 12
    if "boft_block_size" in method.config.model_fields:
        options = {"boft_block_size": 2}
    layers = {"target_modules": ["pair", "each"]}
    with quiet():
        model = get_peft_model(Net(dims).double(), method.config(**options, **layers)).eval()
    randomise(model, "default")
    y = model(x(dims).double())
    assert not torch.allclose(y, Net(dims).double()(x(dims).double()))
    tuners = [tuner_for(method, model.peft_config["default"], node) for node in model.session.graph.nodes if node.path]
    if not all(tuner.is_mergeable for tuner in tuners):
        with pytest.raises(PeftcError, match="PC508"):
            model.merge_adapter()
        return
    torch.testing.assert_close(model.merge_and_unload()(x(dims).double()), y)


# LoRA as in the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", CONVOLUTIONS)
@pytest.mark.parametrize("writer", [peft, peftc], ids=["peft", "peftc"])
def test_files_go_both_ways(writer: object, dims: int, tmp_path: Path) -> None:
    reader = peftc if writer is peft else peft
    made = lora(dims, writer)
    made.save_pretrained(str(tmp_path))  # type: ignore[operator]
    loaded = reader.PeftModel.from_pretrained(Net(dims), str(tmp_path)).eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(loaded(x(dims)), made(x(dims)))
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (made, loaded)]
    assert shapes[0] == shapes[1]


def test_each_group_of_outputs_has_its_part_of_the_rank_and_reads_all_channels() -> None:
    config = LoraConfig(target_modules=["pair"], r=12, lora_alpha=6)
    model = moved(get_peft_model(Net(mode="reflect").double(), config)).double()
    layer = model.get_base_model().pair  # type: ignore[operator]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (tuple(A.shape), tuple(B.shape)) == ((12, 8, 3, 3), (12, 6, 1, 1))
    whole = torch.block_diag(*B.flatten(1).split(6)) @ A.flatten(1)
    padded = F.pad(x().double(), (1, 1, 1, 1), mode="reflect")
    wanted = layer.base_layer(x().double()) + 0.5 * F.conv2d(padded, whole.view(12, 8, 3, 3))
    torch.testing.assert_close(layer(x().double()), wanted)


def test_merging_is_refused_with_the_reason_and_changes_nothing() -> None:
    model = lora(target_modules=["pair"])
    y, objects = model(x()), [id(p) for p in model.parameters()]
    for ask in (model.merge_adapter, model.merge_and_unload):  # type: ignore[union-attr]
        with pytest.raises(PeftcError, match=r"(?s)PC508.*`pair`.*channels of all groups"):
            ask()  # type: ignore[operator]
    assert [id(p) for p in model.parameters()] == objects
    torch.testing.assert_close(model(x()), y, rtol=0, atol=0)


def test_what_is_made_of_changes_of_weights_is_refused() -> None:
    model = lora()
    with pytest.raises(PeftcError, match=r"(?s)PC543.*`pair`.*PC543.*`each`"):
        peftc.convert_adapter(model, "LORA", 2)
    model.add_adapter("other", model.peft_config["default"])  # type: ignore[operator, index, union-attr]
    with pytest.raises(PeftcError, match=r"PC550.*on a Conv2d"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")  # type: ignore[operator]
    assert not model.get_base_model().pair.supports_lora_conversion()  # type: ignore[operator]


def test_another_methods_change_of_grouped_weights_is_converted_where_slots_can_hold_it() -> None:
    with quiet():
        model = get_peft_model(Net().double(), peftc.LoHaConfig(target_modules=["pair"], r=2, init_weights=False))
    with pytest.raises(PeftcError, match=r"PC543.*LORA makes no slots"):
        peftc.convert_adapter(model, "LORA", 4)


def test_a_rank_that_the_groups_cannot_share_is_refused_for_the_layer() -> None:
    with pytest.raises(PeftcError, match=re.escape("`pair` is a convolution of 2 groups, and a rank of 3")):
        get_peft_model(Net(), LoraConfig(target_modules=["pair"], r=3))
    model = get_peft_model(Net(), LoraConfig(target_modules=["pair", "each"], r=2, rank_pattern={"each": 12}))
    assert [site.config.r for site in model.session.plans["default"].maps] == [2, 12]


def test_rows_of_a_batch_have_adapters_of_their_own() -> None:
    model = lora()
    model.add_adapter("other", LoraConfig(target_modules=["pair"], r=4, init_lora_weights=False))  # type: ignore[operator]
    rows = model(x(), adapter_names=["default", "other"])
    for index, name in enumerate(("default", "other")):
        model.set_adapter(name)  # type: ignore[operator]
        torch.testing.assert_close(rows[index], model(x())[index])


@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_gradients_are_the_references(dims: int) -> None:
    found = []
    start = lora(dims, peft).state_dict()
    for library in (peft, peftc):
        model = lora(dims, library).train()
        model.load_state_dict(start)
        model(x(dims)).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


# hot-swapping ---------------------------------------------------------------------------------------------------------


def test_padding_for_swaps_keeps_the_output_and_what_is_saved(tmp_path: Path) -> None:
    model, wide = lora(), lora(r=24)
    y, state = model(x()), peftc.get_peft_model_state_dict(model)
    peftc.prepare_model_for_compiled_hotswap(model, target_rank=24)
    torch.testing.assert_close(model(x()), y)
    saved = peftc.get_peft_model_state_dict(model)
    assert all(torch.equal(saved[key], value) for key, value in state.items())
    parameters = dict(model.named_parameters())
    wide.save_pretrained(str(tmp_path / "wide"))  # type: ignore[operator]
    lora().save_pretrained(str(tmp_path / "narrow"))  # type: ignore[operator]
    for folder, wanted in (("wide", wide(x())), ("narrow", y)):
        peftc.hotswap_adapter(model, tmp_path / folder, "default")
        torch.testing.assert_close(model(x()), wanted)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_a_state_dict_goes_into_a_padded_adapter() -> None:
    model, other = lora(), moved(lora())
    peftc.prepare_model_for_compiled_hotswap(model, target_rank=24)
    peftc.set_peft_model_state_dict(model, peftc.get_peft_model_state_dict(other))
    torch.testing.assert_close(model(x()), other(x()))


def test_a_rank_to_come_that_the_groups_cannot_share_is_refused() -> None:
    model = lora()
    with pytest.raises(PeftcError, match=r"PC401.*a rank of 25"):
        peftc.prepare_model_for_compiled_hotswap(model, target_rank=25)
    assert all(p.shape[0] == 12 for p in model.parameters() if p.requires_grad)


def test_layers_tell_groups_apart() -> None:
    net = Net()
    assert [layer_facts(net.pair).groups, layer_facts(net.each).groups] == [2, 12]
    model = lora()
    assert isinstance(model, PeftModel)
    assert all(isinstance(layer, TunerLayer) for layer in model.session.layers.values())


def test_where_the_reference_fails() -> None:
    """AdaLoRA cannot be made there, and OFT not be merged."""
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        peft.get_peft_model(Net(), peft.AdaLoraConfig(target_modules=["pair"], init_r=4, total_step=10))(x())
    rotated = peft.get_peft_model(Net(), peft.OFTConfig(target_modules=["pair"], oft_block_size=4))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        rotated.merge_adapter()
