"""Vectors of a weight in place of its own: every kind of layer that has some, tied layers, options from the model, clashes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftc import PeftcError, PeftModel, get_peft_model
from peftc.plugin import (
    LINEAR_KINDS,
    Kind,
    LayerFacts,
    MapTuner,
    ModuleGraph,
    PeftConfig,
    PeftType,
    Share,
    Slot,
    SlotInit,
    TargetNamesMixin,
    TunerMethod,
    View,
    derived_slot,
    parameter_slot,
)
from peftc.registry.manager import default_registry
from tests.unit.fakes import plugin


class SwapConfig(TargetNamesMixin, PeftConfig):
    """Where vectors are exchanged."""

    peft_type: PeftType | None = PeftType("SWAP")
    places: tuple[int, ...] = (2, 0)


class SwapTuner(MapTuner[SwapConfig]):
    """Vectors at random."""

    supports = LINEAR_KINDS | {Kind.EMBEDDING}

    def slots(self, c: SwapConfig, layer: LayerFacts) -> Iterable[Slot]:
        size = layer.out_features if layer.kind is Kind.EMBEDDING else layer.in_features
        yield replace(parameter_slot("swap_v", (len(c.places), size)), share=Share.WEIGHT)
        yield derived_slot("swap_i", (len(c.places),), dtype="int64", share=Share.WEIGHT)

    def init(self, c: SwapConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["swap_v"])

    def derive(self, c: SwapConfig, layer: LayerFacts, slots: Mapping[str, Slot]) -> Mapping[str, Tensor]:
        return {"swap_i": torch.tensor(c.places)}

    def clash(self, c: SwapConfig, other: SwapConfig) -> str:
        return "they meet" if {*c.places} & {*other.places} else ""

    def vectors(self, a: View) -> tuple[Tensor, Tensor]:
        return a.swap_i, a.swap_v


def resolve(c: SwapConfig, graph: ModuleGraph) -> Mapping[str, Any]:
    return {} if c.target_modules is not None else {"target_modules": {graph.nodes[1].path}}


@pytest.fixture(autouse=True)
def _swap() -> Iterator[None]:
    method = TunerMethod(
        "SWAP", SwapConfig, SwapTuner(), prefix="swap_", layer_names=("swap_v",), resolve=resolve, follows_ties=True
    )
    default_registry().register(plugin(method), "swap")
    yield
    default_registry().forget("SWAP")


class Tied(nn.Module):
    """An embedding, and a head of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """`(N, L)` ids -> `(N, L, 5)`."""
        out: Tensor = self.head(self.embed(ids))
        return out


IDS = torch.tensor([[0, 1, 2], [2, 3, 4]])


def tied(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Tied(), SwapConfig(**options))


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding"])
def test_vectors_take_the_place_of_the_layers_own(kind: str) -> None:
    torch.manual_seed(0)
    base = {"linear": nn.Linear(4, 5), "transposed": Conv1D(5, 4), "embedding": nn.Embedding(5, 4)}[kind]
    x = IDS if kind == "embedding" else torch.randn(2, 3, 4)
    weight = base.weight.detach().clone()
    model = get_peft_model(nn.Sequential(base), SwapConfig(target_modules={"0"}))
    rows = model.get_base_model()[0].swap_v["default"].detach()
    if kind == "transposed":
        weight[:, [2, 0]] = rows.T
        wanted = x @ weight + base.bias
    else:
        weight[[2, 0]] = rows
        wanted = weight[x] if kind == "embedding" else x @ weight.T + base.bias
    torch.testing.assert_close(model(x), wanted)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)


def test_what_a_hook_of_the_base_has_seen_is_not_written_to() -> None:
    model = tied()
    head = model.get_base_model().head
    seen: list[Tensor] = []
    handle = head.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    hidden = torch.randn(2, 4)
    y = head(hidden)
    handle.remove()
    with model.disable_adapter():
        assert torch.equal(seen[0], head(hidden))
    assert not torch.equal(seen[0], y)


def test_a_tied_layer_follows_and_stays_tied() -> None:
    model = tied()
    assert [site.path for site in model.session.plans["default"].maps] == ["embed", "head"]
    assert model.peft_config["default"].target_modules == {"embed"}
    base = model.get_base_model()
    assert base.head.swap_v["default"] is base.embed.swap_v["default"]
    y = model(IDS)
    model.merge_adapter()
    assert base.head.base_layer.weight is base.embed.base_layer.weight
    torch.testing.assert_close(model(IDS), y)
    model.unmerge_adapter()
    torch.manual_seed(0)
    assert torch.equal(model.unload()(IDS), Tied()(IDS))
    assert base.head.weight is base.embed.weight


def test_adapters_that_clash_are_not_active_or_merged_together() -> None:
    model = tied(places=(0,))
    model.add_adapter("same", SwapConfig(places=(0, 1)))
    model.add_adapter("other", SwapConfig(places=(3,)))
    model.set_adapter(["default", "other"])
    with pytest.raises(PeftcError, match="PC431") as caught:
        model.set_adapter(["default", "same"])
    assert "on `embed`, `head`: they meet" in str(caught.value)
    assert model.active_adapters == ["default", "other"]
    model.merge_adapter(["default"])
    with pytest.raises(PeftcError, match="PC431"):
        model.merge_adapter(["same"])


def test_rows_of_a_batch() -> None:
    model = tied(places=(0,))
    model.add_adapter("two", SwapConfig(places=(2, 3)))
    one = model(IDS)
    model.set_adapter("two")
    two = model(IDS)
    torch.testing.assert_close(model(IDS, adapter_names=["two", "default"]), torch.stack([two[0], one[1]]))
