"""How a layer's adapter begins: by its method alone, or by a start that gives the factors and perhaps another base weight.

What a start gives is computed once for a layer, and only if something of it is needed: factors that no checkpoint has, or
what the change of the base weight follows from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.graph.nodes import LayerFacts
from peftc.registry.boundary import boundary
from peftc.runtime.layer.gathered import gathered
from peftc.runtime.slots.filling import Initializer
from peftc.runtime.slots.kinds import Kind
from peftc.tuner.maps import MapTuner
from peftc.tuner.start import Begun, Chosen

#: The parameter that starts are about.
WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a start sees of a layer (`peftc.tuner.start.StartView`)."""

    config: PeftConfig
    argument: str
    layer: LayerFacts
    rank: int
    scaling: float
    data: Mapping[str, Tensor] = field(default_factory=dict)
    opened: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        assert self.opened is not None
        return self.opened

    def on(self, weight: Tensor) -> Facts:
        """The same with this weight, in float32 at least."""
        return replace(self, opened=weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.weight.device)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count).to(self.weight.device)


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter's change of a base weight: by which start, and the tensors that it follows from."""

    chosen: Chosen
    facts: Facts
    kept: Mapping[str, Tensor]

    def changed(self, weight: Tensor) -> Tensor:
        """The weight `(out, in · kernel)` as it is while the adapter acts, in float32 at least."""
        facts = self.facts.on(weight)
        kept = {name: tensor.to(weight.device) for name, tensor in self.kept.items()}
        with boundary(who(self.chosen), "changed"):
            return self.chosen.start.changed(facts, kept)


def who(chosen: Chosen) -> str:
    """What a start is called where its own code fails."""
    return f"the start `{chosen.start.name}`"


class Owner(Protocol):
    """What is asked of the layer."""

    def unchanged(self) -> Mapping[str, Tensor]: ...

    def get_base_layer(self) -> nn.Module: ...


class Beginning:
    """How one adapter begins on one layer, its `owner`; `source` has what a checkpoint has, by key."""

    def __init__(
        self,
        site: MapSite,
        tuner: MapTuner[Any],
        kind: Kind,
        owner: Owner,
        chosen: Chosen | None,
        source: Callable[[str], Tensor | None] | None,
    ) -> None:
        self._site, self._tuner, self._kind, self._owner = site, tuner, kind, owner
        self._chosen = chosen if chosen is not None and chosen.acts_on(site.layer) else None
        self._source = source
        self._begun: Begun | None = None

    def __call__(self, fresh: Mapping[str, Tensor]) -> None:
        """Fill slots, all of them fresh."""
        site, tuner, type_ = self._site, self._tuner, str(self._site.config.peft_type)
        init = Initializer(self._owner.unchanged, self._kind.half)
        if self._chosen is None or self._chosen.along:
            with boundary(type_, "init", site.path):
                tuner.init(site.config, site.layer, fresh, init)
            self._settle(fresh, Initializer(self._base, self._kind.half))
            return
        with boundary(type_, "before_start", site.path):
            tuner.before_start(site.config, site.layer, fresh, init)
        if next(iter(fresh.values())).is_meta:
            return
        begun, labels = self.begun, tuner.thin_slots(site.config, site.layer)
        with boundary(type_, "of_thin", site.path):
            A, B = (
                fresh[label].flatten(1).float() if factor is None else self._rounded(factor)
                for label, factor in zip(labels, (begun.A, begun.B), strict=True)
            )
            made = tuner.of_thin(site.config, site.layer, A, B)
        given = dict(zip(labels, (begun.A, begun.B), strict=True))
        for label, tensor in made.items():
            if label in fresh and given.get(label, tensor) is not None:
                fresh[label].copy_(tensor)
        self._settle(fresh, Initializer(self._base, self._kind.half))

    def _settle(self, fresh: Mapping[str, Tensor], init: Initializer) -> None:
        """Let the method fill what follows from how the others have begun."""
        site = self._site
        with boundary(str(site.config.peft_type), "settle", site.path):
            self._tuner.settle(site.config, site.layer, fresh, init)

    def _base(self) -> Mapping[str, Tensor]:
        """The base layer's parameters as they are once the adapter acts."""
        held, own = self.held(), self._owner.unchanged()
        return own if held is None else {**own, WEIGHT: held.changed(own[WEIGHT]).to(own[WEIGHT].dtype)}

    def _rounded(self, factor: Tensor) -> Tensor:
        """As parameters beside a layer in half precision have once been in the reference."""
        return factor if self._kind.half is None else factor.to(self._kind.half).to(factor.dtype)

    @property
    def begun(self) -> Begun:
        """What the start gives, computed once. Raises `PeftcError` for what is not of its form."""
        if self._begun is None:
            assert self._chosen is not None
            facts = self._facts().on(self._owner.unchanged()[WEIGHT])
            with boundary(who(self._chosen), "factors", self._site.path):
                self._begun = self._chosen.start.factors(facts)
            self._refuse_misshapen(self._begun, facts)
        return self._begun

    def _facts(self) -> Facts:
        assert self._chosen is not None
        site = self._site
        label = self._tuner.thin_slots(site.config, site.layer)[0]
        rank = self._kind.storage.slots[label].shape[0]
        return Facts(site.config, self._chosen.argument, site.layer, rank, self._kind.scaling, self._data())

    def _data(self) -> Mapping[str, Tensor]:
        assert self._chosen is not None
        return gathered(self._owner.get_base_layer(), self._chosen.start.name)

    def _refuse_misshapen(self, begun: Begun, facts: Facts) -> None:
        rows, columns = facts.weight.shape
        for name, factor, shape in (("A", begun.A, (facts.rank, columns)), ("B", begun.B, (rows, facts.rank))):
            if factor is not None and tuple(factor.shape) != shape:
                assert self._chosen is not None
                what = f"`factors` of {who(self._chosen)} gives {name} of the shape {list(factor.shape)}, not {list(shape)}"
                raise PeftcError(rules.PLUGIN_INVALID(what, fix="Correct the start.", where=self._site.path))

    def held(self) -> Held | None:
        """The change of the base weight, from what was kept beside a checkpoint or else computed; None if there is none."""
        chosen = self._chosen
        if chosen is None or not chosen.start.changes_base:
            return None
        return Held(chosen, replace(self._facts(), data={}), self._kept(chosen))

    def _kept(self, chosen: Chosen) -> Mapping[str, Tensor]:
        source = self._source or (lambda key: None)
        found = {name: source(self._site.kept_key(name)) for name in chosen.start.kept}
        stored = {name: tensor for name, tensor in found.items() if tensor is not None}
        if len(stored) == len(found):
            return stored
        made = {"A": self.begun.A, "B": self.begun.B, **self.begun.kept}
        kept = {name: made[name] for name in chosen.start.kept if made.get(name) is not None}
        if len(kept) < len(chosen.start.kept):
            what = f"`factors` of {who(chosen)} does not give all of {', '.join(chosen.start.kept)}"
            raise PeftcError(rules.PLUGIN_INVALID(what, fix="Correct the start.", where=self._site.path))
        return {name: tensor for name, tensor in kept.items() if tensor is not None}
