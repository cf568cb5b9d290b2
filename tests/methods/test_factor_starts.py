"""Each start by the property that defines it, and, where it reads no data, against the reference with the same seed."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from peftc_plugins.starts.loftq import BLOCK, NORMAL_FLOATS, quantise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc import AdaLoraConfig, HiraConfig, LoraConfig, PeftcError, plugin, rules

OF_WEIGHTS = ("orthogonal", "mica", "olora", "pissa", "pissa_niter_4")
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Linear layers of both shapes and both orders of storage, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide, self.turned, self.narrow = (
            nn.Embedding(20, 16),
            nn.Linear(16, 24),
            Conv1D(16, 24),
            nn.Linear(16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) if x.dtype == torch.long else x
        return self.narrow(self.turned(self.wide(x).relu()).relu())


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    nn.init.normal_(model.turned.weight, std=0.2)
    return model


LINEAR = ("wide", "turned", "narrow")


def options(start: str, targets: tuple[str, ...] = LINEAR, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": start, **more}


def made(start: str, library: Any = peftc, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model = net(dtype)
    torch.manual_seed(8)
    return library.get_peft_model(model, library.LoraConfig(**options(start, **more)))


def factors(model: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the original weight `(out, in)`."""
    layer = getattr(model.get_base_model(), name)
    weight = getattr(net(), name).weight.detach()
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, weight.t() if name == "turned" else weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", OF_WEIGHTS)
def test_one_seed_gives_the_references_start(start: str, dtype: torch.dtype) -> None:
    targets = ("wide", "narrow") if start == "olora" else LINEAR  # of a transposed weight it takes the wrong factors
    ours, state = made(start, dtype=dtype, targets=targets), torch.get_rng_state()
    theirs, other = made(start, peft, dtype=dtype, targets=targets), torch.get_rng_state()
    assert torch.equal(state, other)
    mine = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(mine[key], parameter, rtol=1e-5, atol=1e-6)
        assert mine[key].requires_grad == parameter.requires_grad


@pytest.mark.parametrize("start", OF_WEIGHTS)
def test_the_model_computes_what_it_did(start: str) -> None:
    torch.testing.assert_close(made(start)(X), net()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_pissa_is_the_principal_part(name: str) -> None:
    A, B, weight = factors(made("pissa"), name)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(6 / 4 * B @ A, left[:, :4] * values[:4] @ right[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-4, atol=1e-5)  # both have the square roots


@pytest.mark.parametrize("name", LINEAR)
def test_more_steps_come_closer_to_it(name: str) -> None:
    weight = factors(made("pissa"), name)[2]
    best = torch.linalg.svdvals(weight)[4:].square().sum().sqrt()
    lost = []
    for steps in (0, 16):
        A, B, _ = factors(made(f"pissa_niter_{steps}"), name)
        lost.append(float((weight - 6 / 4 * B @ A).norm() / best))
    assert 1 - 1e-4 < lost[1] < 1.02
    assert lost[1] <= lost[0] + 1e-6


@pytest.mark.parametrize("name", LINEAR)
def test_oloras_b_is_orthonormal_and_its_a_triangular(name: str) -> None:
    A, B, weight = factors(made("olora"), name)
    torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=1e-5, atol=1e-6)
    assert torch.equal(A, A.triu())
    torch.testing.assert_close(B.T @ weight, A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_orthogonal_factors_cancel(name: str) -> None:
    A, B, _ = factors(made("orthogonal"), name)
    assert A.norm() > 0.1 and B.norm() > 0.1
    assert (B @ A).abs().max() < 1e-6


@pytest.mark.parametrize("name", LINEAR)
def test_micas_b_is_in_the_weakest_directions_and_does_not_train(name: str) -> None:
    model = made("mica")
    A, B, weight = factors(model, name)
    assert not A.any()
    assert A.requires_grad and not B.requires_grad
    torch.testing.assert_close((B.T @ weight).norm(dim=1), torch.linalg.svdvals(weight)[-4:], rtol=1e-4, atol=1e-5)
    before = B.clone()
    optimizer = torch.optim.SGD([own for own in model.parameters() if own.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(B, before) and A.any()
    model.set_adapter("default")
    assert not B.requires_grad


def test_mica_on_a_table() -> None:
    pairs = []
    for library in (peftc, peft):
        model = made("mica", library, targets=("table",))
        pairs.append(dict(model.named_parameters()))
        ids = torch.arange(20)
        torch.testing.assert_close(model(ids), net()(ids))
    for key, parameter in pairs[1].items():
        torch.testing.assert_close(pairs[0][key].abs(), parameter.abs(), rtol=1e-4, atol=1e-5)
        assert pairs[0][key].requires_grad == parameter.requires_grad


def test_a_frozen_factor_is_frozen_after_loading(tmp_path: Any) -> None:
    for config in (
        LoraConfig(**options("mica")),
        AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=list(LINEAR), init_lora_weights="mica"),
    ):
        model = peftc.get_peft_model(net(), config)
        model.save_pretrained(tmp_path)
        again = peftc.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
        trains = {name for name, own in model.named_parameters() if own.requires_grad}
        assert trains == {name for name, own in again.named_parameters() if own.requires_grad}
        assert trains and not any("lora_B" in name for name in trains)


# LoftQ ----------------------------------------------------------------------------------------------------------------


def test_four_bits_are_the_nearest_normal_floats() -> None:
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(1))
    found = quantise(weight, 4)
    values = torch.tensor(NORMAL_FLOATS)
    flat, got = weight.flatten(), found.flatten()
    for at in range(0, flat.numel(), BLOCK):
        block, scale = flat[at : at + BLOCK], flat[at : at + BLOCK].abs().max()
        nearest = (block[:, None] - scale * values).abs().min(dim=1).values
        torch.testing.assert_close((block - got[at : at + BLOCK]).abs(), nearest, rtol=1e-5, atol=1e-6)
        assert len(got[at : at + BLOCK].unique()) <= 16


def test_eight_bits_are_whole_numbers_by_rows() -> None:
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(1))
    scaled = quantise(weight, 8) / (weight.abs().amax(dim=1, keepdim=True) / 127)
    torch.testing.assert_close(scaled, scaled.round(), rtol=0, atol=1e-3)
    assert quantise(torch.zeros(2, 3), 8).tolist() == quantise(torch.zeros(2, 3), 4).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_loses_less_than_quantising_alone(bits: int, rounds: int) -> None:
    model = made("loftq", loftq_config=peftc.LoftQConfig(loftq_bits=bits, loftq_iter=rounds))
    for name in LINEAR:
        A, B, weight = factors(model, name)
        layer = getattr(model.get_base_model(), name)
        held = layer.get_base_layer().weight.detach()
        held = held.t() if name == "turned" else held
        torch.testing.assert_close(quantise(held, bits), held, rtol=1e-4, atol=1e-5)  # its values are those of the bits
        assert (weight - held - 6 / 4 * B @ A).norm() < 0.95 * (weight - quantise(weight, bits)).norm()


def test_the_quantised_base_is_there_after_loading_and_gone_after_unloading(tmp_path: Any) -> None:
    model = made("loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2})
    model.save_pretrained(tmp_path)
    again = peftc.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X), model(X))
    assert all(
        torch.equal(own, other) for own, other in zip(again.unload().parameters(), net().parameters(), strict=True)
    )
    with pytest.raises(PeftcError, match="no low-rank change"):
        model.save_pretrained(tmp_path / "turned", path_initial_model_for_weight_conversion=True)


# other methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["orthogonal", "mica", "eva"])
def test_a_start_with_an_update_of_zero_serves_methods_that_multiply(start: str) -> None:
    torch.manual_seed(8)
    model = peftc.get_peft_model(net(), HiraConfig(r=4, target_modules=list(LINEAR), init_weights=start))
    torch.testing.assert_close(model(X), net()(X), rtol=1e-4, atol=1e-5)
    layer, plain = model.get_base_model().wide, factors(made(start), "wide")
    if start == "mica":
        torch.testing.assert_close(layer.hira_B["default"], plain[1])
        assert not layer.hira_B["default"].requires_grad


def test_a_start_that_changes_the_base_is_not_for_them() -> None:
    with pytest.raises(PeftcError, match=rules.START_UNFIT.code):
        peftc.get_peft_model(net(), HiraConfig(r=4, target_modules=["wide"], init_weights="pissa"))


@pytest.mark.parametrize("start", [*OF_WEIGHTS, "loftq"])
def test_the_other_method_of_thin_factors_has_all(start: str, tmp_path: Any) -> None:
    how = {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 3, "target_modules": list(LINEAR)}
    if start == "loftq":
        with pytest.raises(PeftcError, match=rules.OPTION_NOT_AVAILABLE.code):
            peftc.get_peft_model(net(), AdaLoraConfig(**how, init_lora_weights=start))
        return
    model = peftc.get_peft_model(net(), AdaLoraConfig(**how, init_lora_weights=start))
    torch.testing.assert_close(model(X), net()(X), rtol=1e-4, atol=1e-5)
    A, B, weight = factors_of_other(model)
    if start == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(3 * B @ A, left[:, :4] * values[:4] @ right[:4], rtol=1e-3, atol=1e-4)


def factors_of_other(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer = model.get_base_model().wide
    scale = layer.lora_E["default"] / (layer.ranknum["default"] + 1e-5)
    return layer.lora_A["default"] * scale, layer.lora_B["default"], net().wide.weight.detach()


# all or nothing -------------------------------------------------------------------------------------------------------


class Fails(plugin.Start):
    name = "fails-late"
    changes_base = True

    def factors(self, s: plugin.StartView) -> plugin.Begun:
        if s.weight.shape[0] == 10:
            raise MemoryError("out of memory")
        return plugin.Begun(s.weight[: s.rank].clone(), s.weight[:, : s.rank].clone())


def test_a_start_that_fails_at_the_last_layer_leaves_all_as_it_was() -> None:
    plugin.register_start(Fails())
    model = peftc.get_peft_model(net(), LoraConfig(**options("pissa")))
    before = {name: (own, own.clone()) for name, own in model.named_parameters()}
    try:
        with pytest.raises(MemoryError):
            model.add_adapter("other", LoraConfig(**options("fails-late")))
    finally:
        plugin.unregister_start("fails-late")
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(now[name] is own and torch.equal(own, values) for name, (own, values) in before.items())
    assert all(getattr(model.get_base_model(), name).rebased.held.keys() == {"default"} for name in LINEAR)


def test_the_plan_counts_the_originals() -> None:
    from peftc.compiler.plan.cost import cost_of
    from peftc.runtime.applying.snapshot import snapshot

    plans = [
        peftc.compile_plan(snapshot(net()), {"default": LoraConfig(**options(start))}) for start in ("pissa", "mica")
    ]
    weights = 4 * (16 * 24 + 24 * 16 + 16 * 10)
    factors = 4 * 4 * (2 * (16 + 24) + 16 + 10)
    assert [cost_of(plan).originals for plan in plans] == [weights + factors, 0]
    assert math.isclose(cost_of(plans[0]).training - cost_of(plans[0]).originals, sum(vars_of(cost_of(plans[0]))))


def vars_of(cost: Any) -> tuple[int, ...]:
    return cost.base, cost.adapters, cost.gradients, cost.optimiser
