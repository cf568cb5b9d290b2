"""What lowerings see of training and of the base: methods' own dropouts, weights folded anew in backward, pristine weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from peftc import PeftModel, get_peft_model
from peftc.graph.nodes import Kind
from peftc.ops.dropping import kept_outputs
from peftc.plugin import LINEAR_KINDS, LayerFacts, MapTuner, Slot, View, parameter_slot
from peftc.registry.manager import default_registry
from tests.runtime.methods import NarrowConfig, NarrowTuner, Net, narrow, x
from tests.unit.fakes import plugin


class Dropping(NarrowTuner):
    """The thin update, half of whose rows are dropped in training."""

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        A, B, scale = super().thin(a)
        return A, B * kept(a, B), scale


class DroppingFolded(NarrowTuner):
    """The same, told as a change of the weight."""

    thin = MapTuner.thin

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        B = a.narrow_B * kept(a, a.narrow_B)
        return {**p, "weight": p["weight"] + a.scaling * B @ a.narrow_A}


def kept(a: View, B: Tensor) -> Tensor:
    return (torch.rand(B.shape[0], 1) > 0.5).to(B.dtype) if a.training else torch.ones(())


def made(tuner: MapTuner[Any], base: nn.Module | None = None, **options: Any) -> PeftModel:
    method = default_registry().get("NARROW")
    default_registry().register(plugin(replace(method, tuner=tuner)), "narrow")
    torch.manual_seed(0)
    return get_peft_model(Net() if base is None else base, narrow(**options))


def gradients(model: PeftModel, forward: Callable[[Tensor], Tensor] | None = None, seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    rows = x().requires_grad_()
    (forward or model)(rows).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert rows.grad is not None
    return {**found, "input": rows.grad}


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name)


BOTH = pytest.mark.parametrize("tuner", [Dropping(), DroppingFolded()], ids=["thin", "folded"])


@BOTH
def test_a_forward_in_training_drops_and_one_outside_does_not(tuner: MapTuner[Any]) -> None:
    model = made(tuner)
    torch.testing.assert_close(model.eval()(x()), model(x()))
    model.train()
    assert not torch.equal(model(x()), model(x()))


@BOTH
def test_merging_in_training_is_merging(tuner: MapTuner[Any]) -> None:
    model = made(tuner).eval()
    y, delta = model(x()), model.get_base_model().first.get_delta_weight("default")
    model.train()
    torch.testing.assert_close(model.get_base_model().first.get_delta_weight("default"), delta)
    model.merge_adapter()
    torch.testing.assert_close(model(x()), y)
    model.unmerge_adapter()
    assert not torch.equal(model(x()), model(x()))


def test_combining_in_training_is_combining() -> None:
    model = made(Dropping()).eval()
    model.add_weighted_adapter(["default"], [1.0], "same", "cat")
    model.train()
    model.add_weighted_adapter(["default"], [1.0], "again", "cat")
    for layer in (model.get_base_model().first, model.get_base_model().second):
        torch.testing.assert_close(layer.get_delta_weight("again"), layer.get_delta_weight("same"))


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_repetition_drops_what_was_dropped(tuner: MapTuner[Any], reentrant: bool) -> None:
    model = made(tuner).train()
    net = model.get_base_model()

    def forward(rows: Tensor) -> Tensor:
        return checkpoint(net, rows, use_reentrant=reentrant)

    close(gradients(model, forward), gradients(model))


@BOTH
def test_rows_drop_for_themselves(tuner: MapTuner[Any]) -> None:
    model = made(tuner)
    model.add_adapter("other", narrow())
    names = ["default", "other", "__base__", "other", "default"]
    model.eval()
    y = model(x(), adapter_names=names)
    torch.testing.assert_close(model(x(), adapter_names=names), y)
    model.train()
    model.set_requires_grad(["default", "other"])
    found = gradients(model, lambda rows: model(rows, adapter_names=names))
    close(gradients(model, lambda rows: model(rows, adapter_names=names)), found)
    assert torch.equal(model(x(), adapter_names=names)[2], y[2])


# folded weights -------------------------------------------------------------------------------------------------------


class Folded(DroppingFolded):
    """A change of the weight, nothing dropped; and a bias moved along with it."""

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        bias = p["bias"] + a.narrow_B.sum(dim=1)
        return {"weight": p["weight"] + a.scaling * p0["weight"] * (a.narrow_B @ a.narrow_A), "bias": bias}


def outright(model: PeftModel) -> PeftModel:
    """The model in which nothing is folded anew: a hook at the base layers is in the way."""
    for layer in (model.get_base_model().first, model.get_base_model().second):
        layer.base_layer.register_forward_hook(lambda *args: None)
    return model


def test_gradients_of_a_folded_weight_are_those_of_the_plain_computation() -> None:
    close(gradients(made(Folded())), gradients(outright(made(Folded()))))


def test_a_folded_weight_is_not_kept_for_backward() -> None:
    kept: list[torch.Size] = []

    def look(model: PeftModel) -> set[torch.Size]:
        kept.clear()
        own = {id(p) for p in model.parameters()}
        views = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if id(tensor) not in own and tensor.data_ptr() not in views:
                kept.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x())
        return {shape for shape in kept if sorted(shape) in ([8, 8], [6, 8])}

    assert look(made(Folded())) == set()
    assert look(outright(made(Folded()))) != set()


def test_random_numbers_of_a_fold_are_drawn_again_and_the_generator_goes_on() -> None:
    close(gradients(made(DroppingFolded()).train()), gradients(outright(made(DroppingFolded()).train())))
    after = []
    for model in (made(DroppingFolded()).train(), outright(made(DroppingFolded()).train())):
        gradients(model)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_backward_folds_as_forward_did() -> None:
    """Pipelines scale adapters for the forward alone, and a model may be evaluated before its loss is derived."""
    model, plain = made(Folded()), outright(made(Folded()))

    def scaled(model: PeftModel) -> Callable[[Tensor], Tensor]:
        def forward(rows: Tensor) -> Tensor:
            for layer in (model.get_base_model().first, model.get_base_model().second):
                layer.scale_layer(3.0)
            y: Tensor = model(rows)
            for layer in (model.get_base_model().first, model.get_base_model().second):
                layer.unscale_layer(3.0)
            return y

        return forward

    close(gradients(model, scaled(model)), gradients(plain, scaled(plain)))
    dropping = made(DroppingFolded()).train()
    wanted = gradients(dropping)

    def left(rows: Tensor) -> Tensor:
        y: Tensor = dropping.train()(rows)
        dropping.eval()
        return y

    close(gradients(dropping, left), wanted)


# the base -------------------------------------------------------------------------------------------------------------


class Gated(MapTuner[NarrowConfig]):
    """`y = W x + l * (W0 x)`, of layers and of embeddings."""

    supports = LINEAR_KINDS | {Kind.EMBEDDING}

    def slots(self, c: NarrowConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("narrow_A", (layer.out_features,))

    def init(self, c: NarrowConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: Any) -> None:
        init.normal(slots["narrow_A"])

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        weight = a.base["weight"]
        rows = weight.t()[x] if a.layer.kind is Kind.EMBEDDING else x @ weight.t()
        return a.narrow_A * rows

    def params(self, a: View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**p, "weight": p["weight"] + a.narrow_A[:, None] * p0["weight"]}


class Words(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return out


def test_a_branch_reads_the_weight_as_it_was_before_any_merge() -> None:
    model = made(Gated()).eval()
    model.add_adapter("other", narrow())
    model.set_adapter(["default", "other"])
    y = model(x())
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x()), y)
    assert not model.get_base_model().first.pristine()["weight"].requires_grad


@pytest.mark.parametrize("scaled", [False, True])
def test_a_branch_of_an_embedding_gets_ids_and_is_scaled_like_it(scaled: bool) -> None:
    table = Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=3.0) if scaled else nn.Embedding(7, 4)
    model = made(Gated(), Words(table), target_modules=["table"]).eval()
    ids = torch.tensor([[1, 2], [3, 3]])
    expected = (1 + model.get_base_model().table.narrow_A["default"]) * table(ids)
    torch.testing.assert_close(model(ids), expected)
    names = ["default", "__base__"]
    torch.testing.assert_close(model(ids, adapter_names=names), torch.stack([expected[0], table(ids)[1]]))
    model.merge_adapter()
    torch.testing.assert_close(model(ids), expected)


# dropouts -------------------------------------------------------------------------------------------------------------


class DroppingInputs(Folded):
    """Half of the inputs of the change are dropped."""

    def dropout(self, c: NarrowConfig) -> float:
        return 0.5


@pytest.mark.parametrize("plain", [False, True])
def test_a_change_of_the_weight_has_its_own_dropped_inputs(plain: bool) -> None:
    model = made(DroppingInputs()).train()
    if plain:
        outright(model)
    layer = model.get_base_model().first
    delta, moved = layer.get_delta_weight("default"), layer.narrow_B["default"].weight.sum(dim=1)
    torch.manual_seed(4)
    found = layer(x())
    torch.manual_seed(4)
    expected = layer.base_layer(x()) + nn.functional.dropout(x(), 0.5) @ delta.T + moved
    torch.testing.assert_close(found, expected)
    model.eval()
    torch.testing.assert_close(layer(x()), layer.base_layer(x()) + x() @ delta.T + moved)


def test_gradients_through_dropped_inputs() -> None:
    close(gradients(made(DroppingInputs()).train()), gradients(outright(made(DroppingInputs()).train())))


def test_output_features_are_dropped_and_the_others_scaled() -> None:
    like = torch.zeros(1)
    assert kept_outputs(5, 0.0, 0.0, True, like) is None
    torch.manual_seed(0)
    plain = kept_outputs(1000, 0.25, 0.0, False, like)
    torch.manual_seed(0)
    scaled = kept_outputs(1000, 0.25, 0.0, True, like)
    assert plain is not None
    assert scaled is not None
    assert set(plain.tolist()) == {0.0, 1.0}
    assert 0.7 < float(plain.mean()) < 0.8
    torch.testing.assert_close(scaled, plain / plain.mean())


def test_a_whole_layer_is_dropped_or_not() -> None:
    torch.manual_seed(0)
    drawn = [kept_outputs(3, 0.0, 0.5, False, torch.zeros(1)) for _ in range(50)]
    assert {tuple(kept.tolist()) for kept in drawn if kept is not None} == {(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)}


def test_nothing_left_is_zero() -> None:
    torch.manual_seed(0)
    kept = kept_outputs(1, 0.999, 0.0, True, torch.zeros(1))
    assert kept is not None
    assert kept.tolist() == [0.0]
