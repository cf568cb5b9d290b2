"""One adapter of the plain model: what it is called, and what it does to a weight, read off a fresh model that has it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peftc import PeftConfig, PeftModel, get_peft_model
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.registry.manager import default_registry
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.runtime.layer.wrapper import BaseTunerLayer, TunerLayer
from peftc.runtime.session.session import Session
from peftc.testing.models import seeded
from peftc.testing.subjects import quiet
from tests.states.worlds import DTYPE, World

#: stands for the base model among the adapters of rows
BASE = "__base__"


def plain_name(name: str, model: nn.Module, plans: Iterable[AdapterPlan] = ()) -> str:
    """A parameter's name without what wrappers put into it: of a base tensor, its name in the base model."""
    if isinstance(model, PeftModel):
        name = name.removeprefix("base_model.")
        name = name.removeprefix("model.") if isinstance(model.base_model, TunerModel) else name
    for plan in plans:
        for site in plan.modules:
            inside = f"{site.path}.{site.inner}."
            if name.startswith(inside):
                name = f"{site.path}.{name.removeprefix(inside)}"
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Set an adapter's scaling on every layer, as other libraries do; of one that weighs others, theirs."""
    session: Session = model.session  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            assert isinstance(module, TunerLayer)
            for own in (name, *session.needed_by([name])):
                module.set_scale(own, scale)


def output_of(world: World, model: nn.Module, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """The model's output for the world's inputs, with gradients if they are on."""
    dtype = dtype or torch.float64
    read = isinstance(model, PeftModel) and bool(model.peft_config)  # else nobody takes what adapters read
    given = world.kinds[0].subject.arguments(model, dtype) if read else world.model.arguments(dtype)
    out = model(**given, **options)
    return out if isinstance(out, Tensor) else out.logits


class Alone:
    """One adapter on a fresh base: its names, and what it does to a weight."""

    def __init__(self, world: World, config: PeftConfig, name: str, stored: bool = False) -> None:
        config = config.model_copy(update={"inference_mode": stored}, deep=True)
        with quiet(), seeded(0):
            self.model = get_peft_model(world.build(), config, name).eval().to(DTYPE)
        self.model.set_adapter(name)
        self.name = name
        self.plan = self.model.session.plans[name]
        self.plans = tuple(self.model.session.plans.values())
        self.known = set(world.build().state_dict())
        self.live = {plain_name(n, self.model, self.plans): n for n in self.model.state_dict()}
        self.own = [n for n in self.live if n not in self.known]
        self.shapes = {n: self.model.state_dict()[live].shape for n, live in self.live.items()}
        named = self.model.named_parameters()
        self.trainable = {plain_name(n, self.model, self.plans) for n, p in named if p.requires_grad}
        #: whether it has tensors that are not in a state dict
        self.hides = bool({n for n, _ in self.model.named_buffers()} - set(self.model.state_dict()))
        self.version: object = None
        self._replaces: dict[str, bool] = {}

    def take(self, adapter: Adapter) -> Alone:
        """Have these tensors and this scale."""
        if self.version != (adapter.version, adapter.scale):
            own = self.model.state_dict()
            with torch.no_grad():
                for name, tensor in adapter.tensors.items():
                    own[self.live[name]].copy_(tensor)
            set_scale(self.model, self.name, adapter.scale)
            self.version = (adapter.version, adapter.scale)
        return self

    @property
    def layers(self) -> dict[str, TunerLayer]:
        return {site.path: self.model.session.layers[site.path] for site in self.plan.maps}

    @property
    def shared(self) -> set[str]:
        """Names, on each layer, of what all layers hold together."""
        slots = {(site.path, slot.name) for site in self.plan.maps for slot in site.slots if slot.home == ""}
        heads = [(path, f"{path}.{slot}.") for path, slot in slots]
        return {name.removeprefix(f"{path}.") for path, head in heads for name in self.own if name.startswith(head)}

    @property
    def merges(self) -> bool:
        """Whether all that the adapter does is a change of weights."""
        plan = self.plan
        layers = plan.prompt is None and not plan.modules and plan.call is None
        return layers and all(layer.part(self.name).tuner.is_mergeable for layer in self.layers.values())

    def changed(self, path: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's parameters with the adapter folded in, from what they are and, of some methods, were at first."""
        layer = self.layers[path]
        base = layer.get_base_layer()
        with torch.no_grad():
            for name, parameter in base._parameters.items():
                if parameter is not None:
                    parameter.copy_(weights[f"{path}.{name}"])
            merged = layer.merged_parameters([self.name])
            return {f"{path}.{n}": p.detach().clone() for n, p in merged.items()}  # some are the layer's own

    def folded(self, path: str, running: Mapping[str, Tensor], pristine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for running parameters beside the pristine ones: some add what they make of the latter."""
        tuner = self.layers[path].part(self.name).tuner
        sums = tuner.additive or ("params" in tuner.lowerings and not self.replaces(path, pristine))
        if not sums:
            return self.changed(path, running)
        return {n: running[n] + (t - pristine[n]) for n, t in self.changed(path, pristine).items()}

    def is_put_in_place(self, path: str, pristine: Mapping[str, Tensor]) -> bool:
        """Whether all that the adapter does to the layer is to have other parameters in their place."""
        return (
            self.merges
            and "params" in self.layers[path].part(self.name).tuner.lowerings
            and self.replaces(path, pristine)
        )

    def replaces(self, path: str, pristine: Mapping[str, Tensor]) -> bool:
        """Whether the layer's own parameters do not matter to what comes out."""
        if path not in self._replaces:
            other = {name: tensor + 1.0 for name, tensor in pristine.items() if tensor.is_floating_point()}
            one, two = self.changed(path, pristine), self.changed(path, {**pristine, **other})
            self._replaces[path] = all(torch.allclose(one[name], two[name]) for name in one)
        return self._replaces[path]


_ALONE: dict[tuple[str, str, bool, str], Alone] = {}
_versions = iter(range(10**12))


@dataclass
class Adapter:
    """One adapter of the plain model; tensors by plain name, in the dtype that the model has them in."""

    world: World
    name: str
    config: PeftConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    requires: bool = False
    #: whether it came from a file: then a prompt is only its table
    stored: bool = False
    #: what it makes of base tensors that train along
    trained: dict[str, Tensor] = field(default_factory=dict)
    version: int = field(default_factory=lambda: next(_versions))

    def changed(self) -> None:
        """Note that tensors are others now."""
        self.version = next(_versions)

    @cached_property
    def facts(self) -> Alone:
        """What can be read off a fresh model with the adapter, whatever its values. Those that are alike share it."""
        options = {key: value for key, value in self.config.to_dict().items() if key != "inference_mode"}
        key = self.world.name, self.name, self.stored, repr(sorted(options.items()))
        if key not in _ALONE:
            _ALONE[key] = Alone(self.world, self.config, self.name, self.stored)
        return _ALONE[key]

    @property
    def alone(self) -> Alone:
        """The fresh model with its values."""
        return self.facts.take(self)

    @property
    def peft_type(self) -> str:
        return str(self.config.peft_type)

    @property
    def plan(self) -> AdapterPlan:
        return self.facts.plan

    def placed(self, config: PeftConfig) -> Adapter:
        """The adapter as its files tell of it: where those are that it weighs, if it trains them along."""
        method = default_registry().method_of(config)
        if self.plan.call is not None and method.call_tuner is not None:
            option = method.call_tuner.option
            self.config = self.config.model_copy(update={option: getattr(config, option)})
            self.__dict__.pop("facts", None)
        return self

    def is_like(self, other: Adapter) -> bool:
        """Whether only values tell them apart."""
        free = {"inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
        one, two = ({k: v for k, v in a.config.to_dict().items() if k not in free} for a in (self, other))
        return one == two and self.facts.shapes == other.facts.shapes

    @property
    def layers(self) -> list[str]:
        return [site.path for site in self.plan.maps]

    @property
    def copies(self) -> list[str]:
        """Modules that it trains whole."""
        return [save.path for save in self.plan.saves]

    @property
    def biases(self) -> list[str]:
        """Base tensors that train along."""
        return [f"{site.path}.{site.name}" for site in self.plan.trains]
