"""Blocks of GGUF, in layers of transformers and of diffusers, and compressed-tensors: what is particular to each."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, get_peft_model, rules
from peftc.runtime.bases import storages
from peftc.runtime.bases.places import change
from peftc.runtime.bases.storages import packed_facts, storage_of
from tests.bases.made import BASES, FIRST, IDS, LINEARS
from tests.defects import put_defect
from tests.runtime.methods import narrow

Patch = pytest.MonkeyPatch

GGUF = ("gguf transformers q4_0", "gguf transformers q8_0", "gguf diffusers q4_0", "gguf diffusers q8_0")
COMPRESSED = tuple(name for name in BASES if name.startswith("compressed-tensors"))
OPENED_BY_CALL = (*GGUF, *COMPRESSED)


def adapted(name: str, folder: Path, effect: float = 0.1) -> Any:
    model = get_peft_model(BASES[name].made(folder), narrow(target_modules=list(LINEARS), r=2))
    for key, tensor in model.named_parameters():
        if "narrow" in key:
            scale = 0.1 if "narrow_A" in key else effect
            tensor.data.normal_(generator=torch.Generator().manual_seed(len(key))).mul_(scale)
    return model


def base_layer(model: Any) -> Any:
    return model.get_submodule("base_model.model." + FIRST).get_base_layer()


@pytest.mark.parametrize("name", OPENED_BY_CALL)
def test_the_opened_weight_is_not_kept_for_backward(name: str, tmp_path: Path) -> None:
    layer = base_layer(adapted(name, tmp_path))
    opened, kept = layer.in_features * layer.out_features, []
    x = torch.randn(2, 3, 64).requires_grad_()
    y = layer(x)

    def walk(node: Any, seen: set[Any]) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for option in dir(node):
            if option.startswith("_raw_saved"):
                value = getattr(node, option)
                kept.append(value.data.numel() if hasattr(value, "data") and isinstance(value.data, Tensor) else 0)
        for following, _ in node.next_functions:
            walk(following, seen)

    walk(y.grad_fn, set())
    assert not kept or max(kept) < opened
    y.square().sum().backward()
    weight = storage_of(layer).open(layer).to(x.dtype)
    torch.testing.assert_close(x.grad, 2 * y.detach() @ weight)
    assert layer(x[:1, :1]).shape == (1, 1, 64) and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "name", [name for name in OPENED_BY_CALL if "diffusers" not in name]
)  # it copies no such layer
def test_copies_and_pickles_compute_with_their_own_weight(name: str, tmp_path: Path) -> None:
    layer = base_layer(adapted(name, tmp_path))
    x = torch.randn(12, 64)
    y = layer(x)
    again = [copy.deepcopy(layer)]
    if "float8" not in name:  # torch pickles no float8
        again.append(pickle.loads(pickle.dumps(layer)))
    storage = storage_of(layer)
    for other in again:
        assert torch.equal(other(x), y)
        change(layer, storage.pack(layer, storage.open(layer) * 0.5))
        assert torch.equal(other(x), y) and not torch.equal(layer(x), y)
        change(layer, storage.pack(layer, storage.open(other)))


def permuted(layer: Any) -> None:
    layer.register_buffer("input_permutation", torch.randperm(64, generator=torch.Generator().manual_seed(0)))


def test_columns_of_blocks_in_another_order_are_opened_and_packed_in_order(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    layer: Any = BASES["gguf transformers q8_0"].made(tmp_path).get_submodule(FIRST)
    permuted(layer)
    storage, x = storage_of(layer), torch.randn(12, 64)
    opened = storage.open(layer)
    torch.testing.assert_close(layer(x), x @ opened.t())
    made = storage.pack(layer, opened)["weight"]
    assert torch.equal(made, layer.weight)


@pytest.mark.parametrize("name", GGUF[::2])
def test_types_that_ggml_alone_makes_are_opened_and_refuse_merging(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q6_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    numbers = torch.randint(0, 255, (8, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers[:, size - 2 : size] = numbers[:, -2:] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    wanted = torch.from_numpy(gguf.quants.dequantize(numbers.numpy(), kind))
    if "diffusers" in name:
        utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
        layer = utils.GGUFLinear(2 * block, 8, False, compute_dtype=torch.float32)
        layer.weight = utils.GGUFParameter(numbers, quant_type=kind)
    else:
        from transformers.integrations.gguf.utils import GgufLinear

        layer = GgufLinear(2 * block, 8, int(kind))
        layer.weight.data = numbers
    model = nn.Sequential(layer)
    facts = packed_facts(layer)
    assert facts is not None and facts.nbytes == 8 * 2 * size and facts.in_features == 2 * block
    torch.testing.assert_close(storage_of(layer).open(layer), wanted, rtol=2e-3, atol=2e-3)
    tuned = get_peft_model(model, narrow(target_modules=["0"], r=2))
    before = layer.weight
    with pytest.raises(PeftcError, match="ggml alone") as caught:
        tuned.merge_adapter()
    assert caught.value.diagnostics[0].code == rules.PACKED_FOR_GOOD.code and layer.weight is before


def test_without_the_package_that_makes_blocks_the_way_to_it_is_told(monkeypatch: Patch) -> None:
    import importlib.util

    from peftc_plugins.storages.gguf_transformers import why_not_made

    assert why_not_made(2) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in why_not_made(2)


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_model_stays_packed_and_gradients_reach_all_adapters(name: str, tmp_path: Path) -> None:
    wanted = BASES[name].made(tmp_path)(input_ids=IDS).logits  # opened for good by the library
    model = adapted(name, tmp_path, effect=0.0)
    packed = {key: value for key, value in base_layer(model)._parameters.items() if value is not None}
    out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert all(t.grad.abs().max() > 0 for n, t in model.named_parameters() if "narrow_B" in n)
    layer = base_layer(model)
    assert {key: value for key, value in layer._parameters.items() if value is not None} == packed
    assert storage_of(layer) is not None and layer.quantization_status == "compressed"


def test_a_model_that_was_opened_before_is_plain(tmp_path: Path) -> None:
    model = BASES[COMPRESSED[0]].made(tmp_path)
    model(input_ids=IDS)
    assert storage_of(model.get_submodule(FIRST)) is None
    tuned = get_peft_model(model, narrow(target_modules=list(LINEARS), r=2))
    y = tuned.eval()(input_ids=IDS).logits
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(input_ids=IDS).logits, y, rtol=1e-3, atol=1e-4)


def test_a_failing_start_leaves_the_model_to_the_library(tmp_path: Path) -> None:
    model = BASES[COMPRESSED[0]].made(tmp_path)
    hooks, forward = dict(model._forward_pre_hooks), model.get_submodule(FIRST).forward
    with pytest.raises(PeftcError):
        get_peft_model(model, narrow(target_modules=list(LINEARS), r=2, begin="late"))
    assert dict(model._forward_pre_hooks) == hooks and model.get_submodule(FIRST).forward == forward


def test_saved_after_merging_the_base_is_in_its_format_and_loads(tmp_path: Path) -> None:
    from tests.bases.made import loaded

    model = adapted(COMPRESSED[0], tmp_path)
    merged = model.eval().merge_and_unload()
    y = merged(input_ids=IDS).logits
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(tmp_path / "merged")(input_ids=IDS).logits, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_each_form_of_scales_is_packed_as_the_library_does(kind: str, symmetric: bool, strategy: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    if kind == "float" and not symmetric:
        pytest.skip("float8 has no zeros")
    size = {"group_size": 32} if strategy == "group" else {}
    args = QuantizationArgs(
        num_bits=4 if kind == "int" else 8, type=kind, strategy=strategy, symmetric=symmetric, **size
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: Any = nn.Linear(64, 32)
    W = layer.weight.detach() + 0.05
    layer.weight.data = W.clone()
    initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=args))
    groups = W.reshape(1, -1) if strategy == "tensor" else W.reshape(32, -1, args.group_size or 64)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    layer.weight_scale.data.copy_(scale.reshape(layer.weight_scale.shape))
    if not symmetric:
        layer.weight_zero_point.data.copy_(zero.reshape(layer.weight_zero_point.shape))
    if not symmetric and strategy == "tensor":
        pytest.skip("the library does not pack a single zero")
    compress_module(layer)
    storage = storage_of(layer)
    assert storage is not None and storage.name == "compressed-tensors"
    opened = storage.open(layer)
    step = float((W.amax() - W.amin()) / 7) if kind == "int" else 0.02
    assert (opened - W).abs().max() < step
    made = storage.pack(layer, opened)
    assert all(torch.equal(tensor, getattr(layer, name)) for name, tensor in made.items()) and len(made) > 1
    change(layer, storage.pack(layer, W * 3))
    assert (storage.open(layer) - W * 3).abs().max() < 3 * step
    assert storage.facts(layer.to("meta")).out_features == 32


def test_a_format_that_cannot_be_packed_here_is_told(tmp_path: Path) -> None:
    layer: Any = BASES[COMPRESSED[0]].made(tmp_path).get_submodule(FIRST)
    storage = storage_of(layer)
    assert storage is not None and storage.cannot_pack(layer) == ""
    layer.register_buffer("weight_g_idx", torch.arange(64))
    assert "order" in storage.cannot_pack(layer)
    layer.quantization_scheme = layer.quantization_scheme.model_copy(deep=True)
    layer.quantization_scheme.format = "nvfp4-pack-quantized"
    assert "nvfp4" in storage.cannot_pack(layer)


def test_these_tests_find_a_model_that_is_opened(monkeypatch: Patch, tmp_path: Path) -> None:
    put_defect(monkeypatch, storages, "del hooks[key]", "pass")
    with pytest.raises((AssertionError, AttributeError)):
        test_the_model_stays_packed_and_gradients_reach_all_adapters(COMPRESSED[0], tmp_path)
