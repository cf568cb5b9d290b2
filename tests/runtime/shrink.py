"""A method made for tests of training: after some steps rows of its slots go, a slot stops, and the loss has a term more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftc import plugin as api
from peftc import rules
from peftc.config.base import PeftConfig

FULL = 4


class ShrinkConfig(api.TargetsMixin, PeftConfig):
    """Options of the method."""

    peft_type: api.PeftType | None = api.PeftType("SHRINK")
    left: dict[str, int] | None = None
    """What training came to: path -> how many rows are left."""
    ask: str = ""
    """Something wrong to ask for."""


class ShrinkTuner(api.MapTuner[ShrinkConfig]):
    """`y = W x + (sum of rows of v / 4 + b) * mean of x`: at step 2 the rows whose gradients were smallest go, at step 3 the bias stops."""

    supports = api.LINEAR_KINDS
    step_options = frozenset({"left"})

    def slots(self, c: ShrinkConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        return self._slots(layer, FULL)

    def _slots(self, layer: api.LayerFacts, rows: int) -> Iterable[api.Slot]:
        yield api.parameter_slot("shrink_v", (rows, layer.out_features))
        yield api.parameter_slot("shrink_b", (layer.out_features,))
        yield api.constant_slot("count", (1,), FULL)

    def init(self, c: ShrinkConfig, layer: api.LayerFacts, slots: Mapping[str, Tensor], init: api.SlotInit) -> None:
        init.normal(slots["shrink_v"])
        init.zeros(slots["shrink_b"])

    def thin(self, a: api.View) -> tuple[Tensor, Tensor, float]:
        added = a.shrink_v.sum(0) / a.count + a.shrink_b
        return torch.ones(1, a.layer.in_features) / a.layer.in_features, added[:, None], 1.0

    def loss(self, c: ShrinkConfig, sites: Mapping[str, api.View], outputs: Any) -> Tensor | None:
        return sum(a.shrink_b.sum() for a in sites.values()) + 10.0  # type: ignore[return-value]

    def on_step(
        self, c: ShrinkConfig, step: int, sites: Mapping[str, api.View], state: dict[str, Tensor]
    ) -> api.Changes:
        for path, a in sites.items():
            seen = state.setdefault(path, torch.zeros(FULL))
            assert a.shrink_v.grad is not None
            seen += a.shrink_v.grad.abs().sum(1) + a.shrink_v.abs().sum(1)
        if c.ask:
            return wrong(c.ask, sites)
        if step == 2:
            masks = {path: state[path] >= state[path].median() for path in sites}
            spread = {
                (path, "shrink_v"): mask[:, None].expand(sites[path].shrink_v.shape) for path, mask in masks.items()
            }
            return api.Changes(masks=spread, options={"left": {path: int(mask.sum()) for path, mask in masks.items()}})
        return api.Changes(trainable={(path, "shrink_b"): step != 3 for path in sites})

    def schedule(self, c: ShrinkConfig, steps: int) -> Iterable[api.Diagnostic]:
        if steps < 3:
            yield rules.SCHEDULE("Too short", fix="Train longer.")

    def fitted(
        self, c: ShrinkConfig, layer: api.LayerFacts, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterable[api.Slot]:
        return self._slots(layer, shapes["shrink_v"][0])

    def export(
        self, c: ShrinkConfig, path: str, layer: api.LayerFacts, slots: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        if not c.left or c.left[path] == len(slots["shrink_v"]):
            return slots
        v = slots["shrink_v"]
        return {**slots, "shrink_v": v[v.abs().sum(1) > 0]}

    def restore(
        self,
        c: ShrinkConfig,
        path: str,
        layer: api.LayerFacts,
        saved: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> Mapping[str, Tensor]:
        whole = saved["shrink_v"].new_zeros(shapes["shrink_v"])
        whole[: len(saved["shrink_v"])] = saved["shrink_v"]
        return {**saved, "shrink_v": whole}


def wrong(what: str, sites: Mapping[str, api.View]) -> api.Changes:
    """Something that a method may not ask for."""
    path = next(iter(sites))
    return {
        "a slot that is not there": api.Changes(trainable={(path, "shrink_w"): True}),
        "a mask of numbers": api.Changes(masks={(path, "shrink_b"): torch.ones(sites[path].shrink_b.shape)}),
        "a mask of another shape": api.Changes(masks={(path, "shrink_b"): torch.ones(2, dtype=torch.bool)}),
        "training what is frozen": api.Changes(trainable={(path, "count"): True}),
        "another option": api.Changes(options={"target_modules": set()}),
        "a value of another type": api.Changes(options={"left": "all"}),
    }[what]


def shrunk(self: Any) -> int:
    """Something that only this method's model class can do."""
    return len(self.session.plans)


METHOD = api.TunerMethod(
    "SHRINK",
    ShrinkConfig,
    ShrinkTuner(),
    prefix="shrink_",
    layer_names=("shrink_v", "shrink_b"),
    model_methods={"shrunk": shrunk},
)
