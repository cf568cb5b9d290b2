"""`replace_lora_weights_loftq`: A and B make up for what quantising a base lost, read from its files; layer by layer, all or nothing.

Layers in 4 bits are put below adapters that are there, so that a stand-in can do for bitsandbytes where that is not installed, with the
same arithmetic; on a base that was loaded in 4 bits `tests/methods/test_loftq_in_four_bits.py` tries it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peftc_plugins.starts import loftq
from safetensors.torch import load_file, save_file
from torch import nn

import peftc
from peftc import PeftcError, replace_lora_weights_loftq, rules
from peftc.integrations import refilling
from peftc.model.functions import gathering
from peftc.model.peft_model import PeftModel
from tests.defects import put_defect
from tests.integration import tiny

TARGETS = ["q_proj", "down_proj"]


class Params4bit(nn.Parameter):
    """As bitsandbytes' has it: numbers that only `quant_state` makes a weight of."""

    quant_state: Any

    def __new__(cls, weight: torch.Tensor) -> Params4bit:
        made = torch.Tensor._make_subclass(cls, torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), False)
        made.quant_state = loftq.quantise(weight, 4)
        return made


class Linear4bit(nn.Linear):
    """A layer in 4 bits."""

    def __init__(self, own: nn.Linear) -> None:
        super().__init__(own.in_features, own.out_features, own.bias is not None, device="meta")
        self.weight, self.bias = Params4bit(own.weight.detach()), own.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.quant_state, self.bias)


def stand_in(own: nn.Linear) -> nn.Module:
    return Linear4bit(own)


def of_bitsandbytes(own: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(own.in_features, own.out_features, own.bias is not None, quant_type="nf4")
    made.load_state_dict(own.state_dict())
    return made.to("cpu")  # type: ignore[no-any-return]


@pytest.fixture(params=[stand_in, of_bitsandbytes], ids=["stand-in", "bitsandbytes"])
def quantised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Linear], nn.Module]:
    if request.param is of_bitsandbytes:
        pytest.importorskip("bitsandbytes")
    else:
        module: Any = ModuleType("bitsandbytes")
        module.functional = SimpleNamespace(dequantize_4bit=lambda data, state: state)
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    return request.param  # type: ignore[no-any-return]


def adapted(folder: Path, quantise: Callable[[nn.Linear], nn.Module], second: str = "", **options: Any) -> PeftModel:
    """A model whose first layer of each target has a base in 4 bits; the whole one is in the folder."""
    base = tiny.model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(20)  # large enough that rounding shows
    base.save_pretrained(folder)
    base.config._name_or_path = str(folder)
    config = peftc.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, **options})
    model = peftc.get_peft_model(base, config)
    if second:
        model.add_adapter(second, peftc.LoraConfig(r=2, target_modules=["q_proj"]))
    for layer in layers(model).values():
        layer.base_layer = quantise(layer.base_layer)
    model.set_adapter("default")  # calls are composed anew, round the layers that are there now
    return model


def layers(model: PeftModel) -> dict[str, Any]:
    return {path: layer for path, layer in model.session.layers.items() if ".0." in path}


def tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def losses(model: PeftModel, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, int, float]]:
    """Of each layer in 4 bits: what is lacking, what the adapter adds, its rank and scaling."""
    whole = load_file(folder / "model.safetensors")
    found = {}
    for path, layer in layers(model).items():
        own = refilling.FactorLayer(path, layer, "default")
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        found[path] = (whole[f"{path}.weight"] - own.weight, layer.scaling["default"] * B @ A, own.rank, own.scaling)
    return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"r": 40}], ids=str)
def test_what_is_added_is_the_nearest_to_what_is_lost(options: dict[str, Any], quantised: Any, tmp_path: Path) -> None:
    model = adapted(tmp_path, quantised, **options)
    before = tensors(model)
    replace_lora_weights_loftq(model)
    found = losses(model, tmp_path)
    assert len(found) == 2
    for lost, added, rank, _ in found.values():
        values = torch.linalg.svdvals(lost)
        assert values[0] > 0.1
        left = torch.linalg.svdvals(lost - added)
        torch.testing.assert_close(left[: len(values[rank:])], values[rank:], rtol=1e-3, atol=1e-4)
        assert torch.linalg.matrix_norm(lost - added) < torch.linalg.matrix_norm(lost)
    after = tensors(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if ".0." in name}, "layers that are not in 4 bits stay"


def test_where_the_scaling_is_one_it_is_the_references(quantised: Any, tmp_path: Path) -> None:
    """Its own function needs an accelerator; its decomposition does not."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    model = adapted(tmp_path, quantised, lora_alpha=4)
    replace_lora_weights_loftq(model)
    for lost, added, rank, scaling in losses(model, tmp_path).values():
        theirs = _low_rank_decomposition(lost, reduced_rank=rank)
        assert scaling == 1
        torch.testing.assert_close(added, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-4)


def test_a_callback_decides_layer_by_layer(quantised: Any, tmp_path: Path) -> None:
    model = adapted(tmp_path, quantised)
    before, heard = tensors(model), []

    def keep(given: Any, name: str) -> bool:
        assert given is model
        now = tensors(model)
        heard.append((name, {n for n in now if not torch.equal(now[n], before[n])}))
        return "down_proj" in name

    replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert [name for name, _ in heard] == list(layers(model))
    assert all(any(name in n for n in moved) for name, moved in heard), "it sees the replacement"
    after = tensors(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all("down_proj" in name for name in moved)


def test_a_greedy_search_keeps_what_brings_the_output_nearer(quantised: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    model = adapted(tmp_path, quantised)
    with torch.no_grad():
        wanted = type(model.get_base_model()).from_pretrained(tmp_path)(ids).logits
        errors = [float((model(ids).logits - wanted).square().mean())]

        def better(given: Any, name: str) -> bool:
            error = float((given(ids).logits - wanted).square().mean())
            if error >= errors[-1]:
                return False
            errors.append(error)
            return True

        replace_lora_weights_loftq(model, callback=better)
        assert float((model(ids).logits - wanted).square().mean()) == pytest.approx(errors[-1])
    assert errors[-1] < errors[0]


def test_an_error_of_a_callback_leaves_the_model_as_it_was(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(given: Any, name: str) -> bool:
        if "down_proj" in name:
            raise KeyboardInterrupt
        return True

    def unharmed() -> None:
        model = adapted(tmp_path, quantised)
        before = tensors(model)
        with pytest.raises(KeyboardInterrupt):
            replace_lora_weights_loftq(model, callback=fail)
        assert same(tensors(model), before)

    unharmed()
    put_defect(monkeypatch, refilling, "            keep_values(tensor)\n", "")
    with pytest.raises(AssertionError):
        unharmed()


def test_several_adapters_and_several_files(quantised: Any, tmp_path: Path) -> None:
    model = adapted(tmp_path, quantised, second="other")
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = {"a.safetensors": list(whole)[::2], "b.safetensors": list(whole)[1::2]}
    for name, keys in halves.items():
        save_file({key.removeprefix("model."): whole[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key.removeprefix("model."): name for name, keys in halves.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = tensors(model)
    replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
    after = tensors(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and not any("other" in name for name in moved)


def test_what_is_wrong_is_told_and_nothing_changed(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(
        code: str, kind: type[Exception], change: Callable[[PeftModel], Any] = lambda m: None, **given: Any
    ) -> None:
        model = adapted(tmp_path, quantised, **given.pop("options", {}))
        change(model)
        before = tensors(model)
        with pytest.raises(PeftcError, match=code) as caught:
            replace_lora_weights_loftq(model, **given)
        assert isinstance(caught.value, kind) and same(tensors(model), before)

    def lose(model: PeftModel) -> None:
        whole = load_file(tmp_path / "model.safetensors")
        save_file({key: t for key, t in whole.items() if "down_proj" not in key}, tmp_path / "model.safetensors")

    def grow(model: PeftModel) -> None:
        whole = load_file(tmp_path / "model.safetensors")
        save_file({key: torch.cat([t, t]) for key, t in whole.items()}, tmp_path / "model.safetensors")

    def forget(model: PeftModel) -> None:
        model.get_base_model().config._name_or_path = ""  # type: ignore[union-attr]

    def as_merged(model: PeftModel) -> None:
        monkeypatch.setattr(model.session, "refuse_merged", lambda name: (_ for _ in ()).throw(PeftcError(
            rules.WHILE_MERGED(f"`{name}` is merged", fix="Unmerge."))))  # fmt: skip

    nowhere = tmp_path / "nowhere"
    refused(rules.START_DATA.code, FileNotFoundError, model_path=nowhere)
    refused(rules.START_DATA.code, ValueError, forget)
    refused(rules.START_DATA.code, PeftcError, lose)
    refused(rules.START_UNFIT.code, ValueError, grow)
    refused(rules.START_UNFIT.code, ValueError, options={"lora_alpha": 0})
    refused(rules.ADAPTER_UNKNOWN.code, PeftcError, adapter_name="other")
    refused(rules.WHILE_MERGED.code, PeftcError, as_merged)
    for defect in ("    model.session.require([adapter_name])\n", "    model.session.refuse_merged(adapter_name)\n"):
        with monkeypatch.context() as m:
            put_defect(m, gathering, defect, "")
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                refused(rules.WHILE_MERGED.code, PeftcError, as_merged)
                refused(rules.ADAPTER_UNKNOWN.code, PeftcError, adapter_name="other")


def test_without_layers_in_four_bits_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tmp_path, lambda own: own)
    with pytest.raises(PeftcError, match=r"(?s)PC461.*No bnb LoRA module found.*4 bits") as caught:
        replace_lora_weights_loftq(model)
    assert isinstance(caught.value, ValueError)
    monkeypatch.setattr(loftq, "find_spec", lambda name: None)
    with pytest.raises(PeftcError, match=r"bitsandbytes must be installed.*"):
        replace_lora_weights_loftq(model)
    with pytest.raises(PeftcError, match=rules.NOT_A_MODEL.code):
        replace_lora_weights_loftq(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_alias_has_it_where_the_reference_does() -> None:
    from peftc.compat.names import names_of, of_a_method

    name = "replace_lora_weights_loftq"
    for module in ("peft", "peft.utils", "peft.utils.loftq_utils"):
        assert name in names_of(module) and of_a_method(module, name) is replace_lora_weights_loftq
    assert name not in names_of("peft.helpers") and name not in names_of("peft.optimizers")
