"""Adapters that act around whole calls: their storage in the model, and calls with the adapters that they weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import CallSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.host import caches
from peftc.registry.boundary import guarded
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.call import Call, Shared
from peftc.runtime.gates import Weights
from peftc.runtime.journal import keep_trained
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.slots.containers import SlotModule, place_in
from peftc.runtime.slots.filling import INIT, allocate, torch_dtype
from peftc.tuner.calls import CallTuner
from peftc.tuner.views import no_slot


class CallModule(nn.Module):
    """One adapter's storage, its tensors under their labels. Slots may have any name: what a method sees is its view."""

    def __init__(self, plan: AdapterPlan, site: CallSite, tuner: CallTuner[Any]) -> None:
        super().__init__()
        self.plan = plan
        self.site = site
        self.tuner = tuner
        self.state: dict[str, Any] = {}

    @property
    def config(self) -> PeftConfig:
        """The options in force; methods of the model may change them, and they are saved so."""
        return self.plan.config

    def __getitem__(self, label: str) -> Tensor:
        tensor = tensor_of(*self._place(label))
        assert tensor is not None
        return tensor

    def _place(self, label: str) -> tuple[nn.Module, str]:
        """The module that holds a tensor, and its name there."""
        return place_in(self, label.split("."))

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins without what was kept from calls."""
        return {**self.__dict__, "state": {}}

    def fill(self, source: Source | None, device: torch.device) -> None:
        """Make the slots: from the checkpoint where it has them, the rest as the method starts them."""
        dtypes = {slot.dotted: torch_dtype(slot.dtype or self.site.dtype) for slot in self.site.slots}
        made = {slot.dotted: allocate(slot.shape, dtypes[slot.dotted], device) for slot in self.site.slots}
        found = {label: source(self.site.disk(label)) for label in made} if source is not None else {}
        given = {label: tensor for label, tensor in found.items() if tensor is not None}
        if len(given) < len(made):
            guarded(self.tuner.init, self.plan.peft_type, None)(self.config, made, INIT)
        for slot in self.site.slots:
            tensor = given.get(slot.dotted)
            own = (
                made[slot.dotted]
                if tensor is None
                else tensor.to(device=tensor.device if tensor.is_meta else device, dtype=dtypes[slot.dotted])
            )
            self._hold(slot.dotted, nn.Parameter(own, requires_grad=False))

    def _hold(self, label: str, parameter: nn.Parameter) -> None:
        holder: nn.Module = self
        *path, last = label.split(".")
        for name in path:
            child = holder._modules.get(name)
            if child is None:
                child = holder._modules[name] = SlotModule()
            holder = child
        holder._parameters[last] = parameter

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by key."""
        places = {self.site.disk(slot.dotted): self._place(slot.dotted) for slot in self.site.slots if slot.saved}
        found = {key: holder._parameters[name] for key, (holder, name) in places.items()}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def set_trainable(self, trainable: bool) -> None:
        """Let the slots that train require gradients, or none."""
        for slot in self.site.slots:
            holder, name = self._place(slot.dotted)
            parameter = holder._parameters[name]
            assert parameter is not None
            keep_trained(parameter, trainable and slot.trainable)

    def around(
        self, shared: Shared, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The method's answer to a call of the model. Raises `PeftcError` for a call that goes on from a cache."""
        if caches.of_call(kwargs) is not None:
            what = "The call has a cache, but every token is weighed by the whole input"
            raise PeftcError(rules.CALL_AROUND(what, fix="Give the whole input, with `use_cache=False`."))
        layers = {path: place for place, path in enumerate(self.site.layers)}
        adapters = {name: place for place, name in enumerate(self.site.needs)}

        def run(gates: float | Tensor, *args: Any, **kwargs: Any) -> Any:
            with shared.opened(Call(gates=Weights(gates, layers, adapters))):
                return model(*args, **kwargs)

        return self.tuner.around(View(self), run, args, kwargs)


class View:
    """One adapter around calls, as the method's mathematics sees it (`peftc.tuner.calls.CallView`)."""

    def __init__(self, module: CallModule) -> None:
        self._module = module

    @property
    def config(self) -> PeftConfig:
        return self._module.config

    @property
    def layers(self) -> tuple[str, ...]:
        return self._module.site.layers

    @property
    def state(self) -> dict[str, Any]:
        return self._module.state

    @property
    def training(self) -> bool:
        return self._module.training

    def __getitem__(self, label: str) -> Tensor:
        labels = [slot.dotted for slot in self._module.site.slots]
        if label not in labels:
            raise no_slot(label, labels)
        return self._module[label]
