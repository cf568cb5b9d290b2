"""Storages held against the libraries whose layers they read: one table, each row a thing that must hold, on every base.

A base is compared with a twin: the same model whose packed layers are plain ones of the weights that the storage opens.
Models are in training mode where nothing else is said, since some libraries round inputs too in evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftc import PeftcError, PeftConfig, PeftModel, get_peft_model, rules
from peftc.graph.nodes import Packed
from peftc.graph.tensors import dtype_name
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.bases import table
from peftc.runtime.bases.places import change, held_by
from peftc.runtime.bases.storages import packed_facts, settle, storage_of
from peftc.testing.models import seeded
from peftc.tuner.storage import Storage
from tests.bases.made import BASES, FIRST, IDS, LINEARS, Base, loaded
from tests.bases.reference import NOISE, TARGETS, logits, of_reference, record, three_steps

PEFT_TYPE = next(iter(record()["options"]))
"""The method that the record lists first serves for all: that each does is the conformance kit's to say."""

EVERY = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def exact(base: Base) -> bool:
    """Whether sums come out alike to the last digits. In bfloat16, and where inputs are rounded to whole numbers, the reference's own
    losses move by 3e-4 when the values of its adapter do by a millionth."""
    return base.flows and base.dtype is torch.float32


def made(base: Base, folder: Path, runs: bool = True) -> nn.Module:
    """The base, in training mode; skipped with the reason where it cannot be had, is not packed, or, with `runs`, not called."""
    model = base.made(folder).train()
    if storage_of(model.get_submodule(FIRST)) is None:
        pytest.skip(f"{base.name}: no storage knows its layers")
    if runs and base.runs:
        pytest.skip(f"{base.name}: {base.runs}")
    return model


def trainable(base: Base, folder: Path) -> nn.Module:
    """The same where gradients pass."""
    if not base.passes:
        pytest.skip(f"{base.name}: the library gives no gradient to inputs, as PC315 says")
    return made(base, folder)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The packed layers by their path in the base."""
    return {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in LINEARS}


def storage(layer: nn.Module) -> Storage:
    found = storage_of(layer)
    assert found is not None
    return found


def facts(layer: nn.Module) -> Packed:
    found = packed_facts(layer)
    assert found is not None
    return found


def opened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with plain layers of the opened weights in place of the packed ones."""
    for name, layer in layers(model).items():
        weight = storage(layer).open(layer).to(dtype)
        plain = nn.Linear(*weight.shape[::-1], bias=False, dtype=dtype)
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        model.set_submodule(name, plain)
    return model


def config(peft_type: str = PEFT_TYPE, **options: Any) -> PeftConfig:
    return default_registry().get(peft_type).config(target_modules=TARGETS, **options)


def adapted(model: nn.Module, peft_type: str = PEFT_TYPE, **options: Any) -> PeftModel:
    """The model with an adapter of seeded values."""
    with warnings.catch_warnings(), seeded(1):
        warnings.simplefilter("ignore")
        found = get_peft_model(model, config(peft_type, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += NOISE * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return found.train()


def inputs(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, facts(layer).in_features, generator=generator).to(dtype)


def float_weights() -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in layers(loaded()).items()}


def tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that holds something, in a value of whatever kind, once."""
    if isinstance(value, nn.Module) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        if inner:
            yield from (t for name in inner for t in tensors_in(getattr(value, name), seen))
        elif value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield value
    parts = value.values() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).values()
    for part in parts:
        if isinstance(part, Tensor | Mapping) or type(part).__module__.startswith(type(value).__module__):
            yield from tensors_in(part, seen)


def stored_bytes(layer: nn.Module) -> int:
    """What is in memory of a layer's weight: all that holds it, and all tensors beside it but the bias and single numbers."""
    held = [held_by(layer, name) for name in storage(layer).held]
    others = (*layer._parameters.items(), *layer._buffers.items())
    beside = [tensor for name, tensor in others if tensor is not None and name != "bias" and tensor.ndim]
    seen: set[int] = set()
    return sum(tensor.nbytes for value in (*held, *beside) for tensor in tensors_in(value, seen))


@EVERY
def test_facts_are_the_sizes_bytes_and_dtype_of_what_is_there(base: Base, tmp_path: Path) -> None:
    model = made(base, tmp_path, runs=False)
    nodes, wanted = snapshot(model).by_path, float_weights()
    for name, layer in layers(model).items():
        found = facts(layer)
        assert nodes[name].facts.packed == found and found.storage == storage(layer).name
        assert (found.out_features, found.in_features) == wanted[name].shape
        assert found.nbytes == stored_bytes(layer), name
        assert found.passes_gradients is base.passes
        weight = storage(layer).open(layer)
        assert weight.shape == wanted[name].shape and found.dtype == dtype_name(weight.dtype)


@EVERY
def test_what_is_opened_is_what_the_layer_computes_with(base: Base, tmp_path: Path) -> None:
    model = made(base, tmp_path)
    settle(model, snapshot(model))  # some libraries' own calls would open all weights first
    with torch.no_grad():
        for layer in layers(model).values():
            x = inputs(layer, base.dtype)
            wanted = F.linear(x, storage(layer).open(layer).to(x.dtype))
            assert apart(layer(x), wanted) <= (1e-5 if exact(base) else 4e-2) * float(wanted.abs().max())


@EVERY
def test_packed_again_it_is_the_same_form_and_close(base: Base, tmp_path: Path) -> None:
    model, wanted = made(base, tmp_path, runs=False), float_weights()
    for name, layer in layers(model).items():
        own = storage(layer)
        if why := own.cannot_pack(layer):
            pytest.skip(f"{base.name}: {why}")
        before, sizes = own.open(layer), facts(layer)
        was = {held: held_by(layer, held) for held in own.held}
        packed = own.pack(layer, before)
        assert all(held_by(layer, held) is was[held] for held in own.held) and set(packed) <= set(own.held)
        assert {key: type(value) for key, value in packed.items()} == {key: type(was[key]) for key in packed}
        assert torch.equal(own.open(layer), before)
        change(layer, packed)
        assert facts(layer) == sizes and stored_bytes(layer) == sizes.nbytes
        assert apart(own.open(layer), before) <= 1.5 * apart(before, wanted[name])


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference: of an opened weight and the original, by how much the library moved it when it packed it."""
    return float((one.detach().float() - other.detach().float()).abs().max())


@EVERY
def test_a_step_of_training_is_that_of_plain_layers(base: Base, tmp_path: Path) -> None:
    pair = (trainable(base, tmp_path / "own"), opened(made(base, tmp_path / "twin"), base.dtype))
    grads = []
    for model in map(adapted, pair):
        model(input_ids=IDS, labels=IDS).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        layer = model.base_model.model.get_submodule(FIRST)
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).to(base.dtype).requires_grad_()
        layer(x).float().square().sum().backward()
        grads.append({**{name: grad.clone() for name, grad in found.items() if grad is not None}, "x": x.grad})
    own, twin = grads
    assert own.keys() == twin.keys() and len(own) > len(TARGETS)
    allowed = 1e-4 if exact(base) else 0.1 if base.lets_through else 2e-2  # inputs are rounded, or all is in bfloat16
    for name, wanted in twin.items():
        assert apart(own[name], wanted) <= allowed * float(wanted.abs().max()) + 1e-8, name


@EVERY
def test_where_no_gradient_passes_it_is_told_before_training(base: Base, tmp_path: Path) -> None:
    model = made(base, tmp_path, runs=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(model, config())
    told = [str(w.message) for w in caught if rules.GRADIENT_STOPS.code in str(w.message)]
    assert len(told) == (not base.passes) and all(f"`{FIRST}`" in text for text in told)


@EVERY
def test_merged_it_is_off_by_rounding_alone_and_comes_back_bit_for_bit(base: Base, tmp_path: Path) -> None:
    model = adapted(made(base, tmp_path / "own"))
    inner = model.base_model.model
    targets = {name: layer for name, layer in inner.named_modules() if name.rpartition(".")[2] in TARGETS}
    bases = {name: layer.get_base_layer() for name, layer in targets.items()}
    if why := next((why for layer in bases.values() if (why := storage(layer).cannot_pack(layer))), ""):
        pytest.skip(f"{base.name}: {why}")
    plain = adapted(opened(made(base, tmp_path / "twin"), torch.float32))
    plain.merge_adapter()
    before = {name: storage(layer).open(layer).clone() for name, layer in bases.items()}
    was = {name: {held: held_by(layer, held) for held in storage(layer).held} for name, layer in bases.items()}
    y, original = logits(model), float_weights()

    model.merge_adapter()
    for name, layer in bases.items():
        wanted = plain.base_model.model.get_submodule(name).get_base_layer().weight
        grown = float(wanted.abs().max() / before[name].abs().max())
        error = apart(storage(layer).open(layer), wanted)
        assert error <= 1.5 * max(grown, 1.0) * apart(before[name], original[name]), name

    model.unmerge_adapter()
    for name, layer in bases.items():
        assert all(held_by(layer, held) is value for held, value in was[name].items()), name
        assert torch.equal(storage(layer).open(layer), before[name])
    assert torch.equal(logits(model), y)


@EVERY
def test_merging_costs_no_more_than_in_the_reference(base: Base, tmp_path: Path) -> None:
    model = made(base, tmp_path)
    if base.opens:
        pytest.skip(f"{base.name}: the reference merges into weights that the library opened, and packs none again")
    told = of_reference(base, PEFT_TYPE)
    if told.adapter is None or told.merged is None:
        pytest.skip(f"{base.name}: the reference does not merge there: {told.refused or 'it raises'}"[:200])
    own = PeftModel.from_pretrained(model, str(told.adapter))
    before = logits(own)
    after = logits(own.merge_and_unload())
    assert apart(after, before) <= told.merged * (1.001 if exact(base) else 1.05) + 1e-6


@EVERY
def test_saved_and_loaded_it_computes_the_same(base: Base, tmp_path: Path) -> None:
    model = adapted(made(base, tmp_path / "one"))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(made(base, tmp_path / "two"), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def generated(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval().generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return found


@EVERY
def test_it_generates_and_trains_on_from_the_same_weights(base: Base, tmp_path: Path) -> None:
    alone = made(base, tmp_path / "alone")
    try:
        generated(alone)
    except Exception as error:  # the library's own, of whatever kind
        pytest.skip(f"{base.name}: it does not generate without an adapter either: {error!r:.100}")
    model = adapted(made(base, tmp_path / "own"))
    y = logits(model)
    tokens = generated(model)
    assert tokens.shape == (2, IDS.shape[1] + 4) and torch.equal(tokens[:, : IDS.shape[1]], IDS)
    with torch.no_grad():
        scores = model.eval()(input_ids=IDS).logits[:, -1]
    assert torch.equal(tokens[:, IDS.shape[1]], scores.argmax(-1))
    assert torch.equal(logits(model), y)


@EVERY
def test_losses_are_those_of_the_reference(base: Base, tmp_path: Path) -> None:
    model = made(base, tmp_path)
    if base.lets_through:
        pytest.skip(f"{base.name}: gradients go through the rounding of inputs, which stops them in the reference")
    told = of_reference(base, PEFT_TYPE)
    if told.adapter is None or not told.losses:
        pytest.skip(f"{base.name}: the reference does not train there: {told.refused}"[:200])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = PeftModel.from_pretrained(model, str(told.adapter), is_trainable=True)
    assert three_steps(own) == pytest.approx(told.losses, abs=1e-5 if exact(base) else 5e-4)


@pytest.mark.parametrize(
    ("name", "test", "attribute", "wrong"),
    [
        (
            "hqq 4-bit",
            test_merged_it_is_off_by_rounding_alone_and_comes_back_bit_for_bit,
            "pack",
            lambda own, layer, weight: {"W_q": layer.W_q},
        ),
        ("hqq 4-bit", test_packed_again_it_is_the_same_form_and_close, "held", ("meta",)),
        (
            "quanto int8",
            test_a_step_of_training_is_that_of_plain_layers,
            "open",
            lambda own, layer: layer.weight.dequantize() * 1.01,
        ),
        (
            "quanto int8",
            test_facts_are_the_sizes_bytes_and_dtype_of_what_is_there,
            "open",
            lambda own, layer: layer.bias,
        ),
        (
            "quanto int4",
            test_merged_it_is_off_by_rounding_alone_and_comes_back_bit_for_bit,
            "pack",
            lambda own, layer, weight: {"weight": layer.weight},
        ),
        (
            "torchao int8",
            test_what_is_opened_is_what_the_layer_computes_with,
            "open",
            lambda own, layer: layer.weight.dequantize() * 1.001,
        ),
        (
            "torchao int8 dynamic",
            test_where_no_gradient_passes_it_is_told_before_training,
            "facts",
            lambda own, layer: Packed("torchao", *layer.weight.shape[::-1], "float32", 1),
        ),
        (
            "torchao intx4",
            test_packed_again_it_is_the_same_form_and_close,
            "pack",
            lambda own, layer, weight: {"weight": nn.Parameter(weight)},
        ),
    ],
)
def test_the_table_can_fail(
    name: str, test: Any, attribute: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASES[name]
    layer = base.made(tmp_path).get_submodule(FIRST)
    table._packed.cache_clear()
    monkeypatch.setattr(type(storage(layer)), attribute, wrong)
    try:
        with pytest.raises((AssertionError, AttributeError, RuntimeError, PeftcError)):
            test(base, tmp_path)
    finally:
        table._packed.cache_clear()
