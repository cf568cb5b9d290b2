"""Fused experts by the mathematics of linear layers: each starts, changes and drops by itself, from its own weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, get_peft_model
from peftc import plugin as api
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.serial import plan_from_text, plan_to_text
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.layer.folding import adapted as folded
from peftc.testing.models import ExpertsNet, seeded
from tests.unit.fakes import plugin

BOTH = ["up.lin0", "down.lin1"]


class StretchConfig(api.TargetsMixin, api.ExpertsMixin, api.PeftConfig):
    """Options of a made-up method."""

    peft_type: api.PeftType | None = api.PeftType("ROWS")
    dropout: float = 0.0
    randomly: bool = False


class Rows(api.MapTuner[StretchConfig]):
    """`W' = diag(s) diag(sign) W`; s starts as the norms of the rows, the signs are the same for layers of a size."""

    supports = api.LINEAR_KINDS | api.EXPERT_KINDS

    def slots(self, c: StretchConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        yield api.parameter_slot("rows_norm", (layer.out_features,))
        yield api.derived_slot("rows_sign", (layer.out_features,), share=f"{layer.out_features}")

    def init(self, c: StretchConfig, layer: api.LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        assert layer.experts == 0 and init.base["weight"].shape == (layer.out_features, layer.in_features)
        slots["rows_norm"].copy_(init.base["weight"].norm(dim=1))

    def derive(self, c: StretchConfig, layer: api.LayerFacts, slots: Mapping[str, api.Slot]) -> Mapping[str, Tensor]:
        return {"rows_sign": 1.0 - 2.0 * (torch.arange(layer.out_features) % 2)}

    def dropout(self, c: StretchConfig) -> float:
        return c.dropout

    def params(self, a: api.View, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        scale = a.rows_norm * a.rows_sign
        if a.config.randomly and a.training:  # type: ignore[attr-defined]  # this method's config
            scale = scale * (torch.rand(scale.shape) < 0.5)
        return {**p, "weight": p["weight"] * scale.unsqueeze(1)}


class Trains(Rows):
    def loss(self, c: StretchConfig, sites: Mapping[str, api.View], outputs: Any) -> Tensor | None:
        return None


class Together(Rows):
    def declare(self, kinds: Sequence[tuple[StretchConfig, api.LayerFacts]]) -> Sequence[Iterable[api.Slot]]:
        return [self.slots(c, layer) for c, layer in kinds]


class Called(Rows):
    keywords = ("task_ids",)


class Beside(Rows):
    params = api.MapTuner.params

    def branch(self, a: api.View, x: Tensor, y0: Tensor) -> Tensor:
        return y0


def register(tuner: Rows) -> None:
    method = api.TunerMethod("ROWS", StretchConfig, tuner, prefix="rows_", layer_names=("rows_norm",))
    default_registry().register(plugin(method), "rows")


@pytest.fixture(autouse=True)
def _rows() -> Iterator[None]:
    register(Rows())
    yield
    default_registry().forget("ROWS")


def net() -> ExpertsNet:
    with seeded(0):
        return ExpertsNet().eval()


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(net(), StretchConfig(target_modules=[], target_parameters=BOTH, **options)).eval()


def by_hand(model: ExpertsNet) -> ExpertsNet:
    """What a fresh adapter does. The second weight is stored as (experts, in, out)."""
    with torch.no_grad():
        for weight in (model.up.lin0, model.down.lin1.mT):
            sign = 1.0 - 2.0 * (torch.arange(weight.shape[1]) % 2)
            weight.mul_(weight.norm(dim=2, keepdim=True) * sign.unsqueeze(1))
    return model


def test_each_expert_starts_from_its_own_weight_and_has_its_own_part() -> None:
    model, x = adapted(), torch.randn(5, 8)
    torch.testing.assert_close(model(x), by_hand(net())(x))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {
        "base_model.model.up.rows_norm.default": (3, 12),
        "base_model.model.down.rows_norm.default": (3, 8),
    }
    assert sorted(model.adapter_tensors("default")) == [
        "base_model.model.down.rows_norm",
        "base_model.model.up.rows_norm",
    ]
    signs = {name: tuple(b.shape) for name, b in model.named_buffers()}
    assert signs == {"base_model.model.up.rows_sign.default": (12,), "base_model.model.down.rows_sign.default": (8,)}


def test_the_plan_says_it_and_survives_text() -> None:
    config = StretchConfig(target_modules=["router"], target_parameters=BOTH)
    plan = compile_plan(snapshot(net()), {"default": config})
    model = PeftModel.from_plan(net(), plan)
    live = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.shape for p in plan.parameters() if p.trainable} == live
    assert list(plan_from_text(plan_to_text(plan)).parameters()) == list(plan.parameters())
    assert model.get_nb_trainable_parameters() == plan.counts()


def test_what_is_drawn_differs_from_expert_to_expert_and_is_not_merged() -> None:
    model, x = adapted(randomly=True), torch.randn(5, 8)
    y, layer = model(x), model.base_model.model.up
    part = layer.part("default")
    with torch.no_grad(), seeded(3):
        weights = folded(layer._under, [part.fixed(training=True)])["lin0"]
    dropped = (weights == 0).all(dim=2)
    assert dropped.any() and not (dropped[0].equal(dropped[1]) and dropped[0].equal(dropped[2]))
    model.train()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


def test_an_option_that_is_not_used_is_not_in_the_file() -> None:
    assert "target_parameters" not in StretchConfig().to_dict()
    assert StretchConfig(target_parameters=["a"]).to_json()["target_parameters"] == ["a"]
    assert StretchConfig(**StretchConfig(target_parameters=["a"]).to_dict()).target_parameters == ["a"]


@pytest.mark.parametrize(
    ("tuner", "says"),
    [(Trains, "`loss`"), (Together, "`declare`"), (Called, "keywords"), (Beside, "no lowering")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_done_expert_by_expert_is_told(tuner: type[Rows], says: str) -> None:
    default_registry().forget("ROWS")
    register(tuner())
    with pytest.raises(PeftcError, match=f"(?s)PC204.*{says}") as caught:
        adapted()
    assert all(problem.fix for problem in caught.value.diagnostics)


def test_inputs_of_experts_are_not_dropped() -> None:
    with pytest.raises(PeftcError, match=r"(?s)PC401.*`up\.lin0`"):
        adapted(dropout=0.5)


def test_a_single_matrix_is_a_stack_of_one() -> None:
    config = StretchConfig(target_modules=[], target_parameters=["lin.weight"])
    base = nn.Sequential()
    base.lin = nn.Linear(4, 6)
    model = get_peft_model(base, config)
    (parameter,) = (p for p in model.parameters() if p.requires_grad)
    assert tuple(parameter.shape) == (1, 6)
