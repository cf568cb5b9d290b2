"""What is applied to one model: the adapters' plans, the wrappers that carry them out, and where each is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean
from peftc.graph.nodes import ModuleGraph
from peftc.runtime.around.calls import CallModule
from peftc.runtime.around.modules import ModuleWrapper
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.call import Shared
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.step_state import StepState
from peftc.runtime.slots.stores import Stores
from peftc.tuner.maps import MapTuner

Wrapper = TunerLayer | ModuleWrapper | ModulesToSaveWrapper


class Applied:
    """Adapters on one base model, and where they are in it. `graph` describes the base as it was before the first of them."""

    def __init__(self, model: nn.Module, graph: ModuleGraph) -> None:
        self.model = model
        self.graph = graph
        self.plans: dict[str, AdapterPlan] = {}
        #: the outermost wrapper at each path; wrappers of other methods may be below it
        self.layers: dict[str, TunerLayer] = {}
        self.modules: dict[str, ModuleWrapper] = {}
        self.copies: dict[str, ModulesToSaveWrapper] = {}
        #: adapters that act around calls, in one module for those of a method, by what it is called in the model
        self.holders: dict[str, nn.ModuleDict] = {}
        self.shared = Shared()
        self.stores = Stores()
        self.enabled = True
        #: adapters of which something may require gradients; active ones may as well
        self.requiring: set[str] = set()
        #: what methods of adapters give beside their mathematics, and what steps of training left behind
        self.seams: dict[str, frozenset[str]] = {}
        self.steps: dict[str, StepState] = {}
        #: adapters that read values of calls by row, with the mathematics that says which
        self.readers: dict[str, MapTuner[Any]] = {}
        #: of a model that was adapted in place, the configs that it shows as `peft_config`
        self.shown: dict[str, PeftConfig] | None = None

    @property
    def active(self) -> tuple[str, ...]:
        """Active adapters, in their order."""
        return self.shared.active

    @active.setter
    def active(self, names: Iterable[str]) -> None:
        self.shared.active = tuple(names)

    def caller(self, name: str) -> CallModule | None:
        """What an adapter has that acts around calls."""
        call = self.plans[name].call
        module = None if call is None else self.holders[call.owner]._modules[name]
        return module if isinstance(module, CallModule) else None

    @property
    def acting(self) -> CallModule | None:
        """The active adapter that acts around calls, if it is to act."""
        if not self.holders or not self.enabled:
            return None
        return next((found for name in self.active if (found := self.caller(name)) is not None), None)

    def is_weighed(self, name: str) -> bool:
        """Whether an adapter is there for another that weighs it."""
        return name in self.plans and bool(self.plans[name].needed_by)

    def waits(self, name: str) -> bool:
        """Whether an adapter acts from some token of a call on."""
        return "begins" in self.seams.get(name, ())

    def needed_by(self, names: Iterable[str]) -> list[str]:
        """The adapters that these weigh."""
        return [name for name, plan in self.plans.items() if plan.needed_by and plan.needed_by in names]

    def gone(self, path: str) -> Diagnostic:
        """The diagnostic for a module that the plan has and the model has not."""
        hint = did_you_mean(path, [name for name, _ in self.model.named_modules()])
        return rules.MODEL_DRIFTED(f"There is no module `{path}`", fix=hint or "Plan again for this model.", where=path)

    def require(self, names: Iterable[str]) -> None:
        """Raise `PeftcError` naming every adapter that is not there."""
        missing = [name for name in names if name not in self.plans]
        if missing:
            have = ", ".join(f"`{n}`" for n in self.plans) or "none"
            raise PeftcError(
                rules.ADAPTER_UNKNOWN(
                    f"Adapter {name} does not exist; there is {have}",
                    fix=did_you_mean(name, self.plans) or f"Use {have}.",
                )
                for name in missing
            )

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of merged adapters."""
        if not self.shared.merges:
            return ()
        return tuple(dict.fromkeys(name for layer in self.wrappers() for name in layer.merged_adapters))

    def refuse_merged(self, name: str) -> None:
        """Raise `PeftcError` if the adapter is merged: changing it would not change what is in the base weights."""
        if name in self.merged:
            fix = "Call `unmerge_adapter()` first."
            raise PeftcError(rules.WHILE_MERGED(f"`{name}` is merged into the base weights", fix=fix))

    # finding ------------------------------------------------------------------------------------------------------

    def find(self, path: str) -> nn.Module | None:
        """The base module at a path, seen through wrappers; None if there is none."""
        if path in self.layers:
            return self.layers[path].get_base_layer()
        if path in self.copies:
            return self.copies[path].original_module
        module: nn.Module | None = self.model
        for part in path.split(".") if path else ():
            module = module._modules.get(part) if module is not None else None
            module = module.wrapped if isinstance(module, ModuleWrapper) else module
        return module

    def _place(self, path: str) -> tuple[nn.Module, str, nn.Module]:
        """Parent, name in it, and module."""
        head, _, name = path.rpartition(".")
        parent = self.find(head)
        module = parent._modules.get(name) if parent is not None else None
        if parent is None or module is None:
            raise PeftcError(self.gone(path))
        return parent, name, module

    def wrappers(self) -> Iterator[TunerLayer]:
        """All wrappers of layers, those below others first."""
        for outermost in self.layers.values():
            yield from outermost.chain()

    def layers_of(self, adapter: str) -> Iterator[TunerLayer]:
        """The wrappers that hold an adapter, in the order of its plan."""
        for site in self.plans[adapter].maps:
            layer = self.layer_of(adapter, site.path, site.spot)
            if layer is not None:
                yield layer

    def layer_of(self, adapter: str, path: str, spot: str = "") -> TunerLayer | None:
        """The wrapper at a path, for one of its sites there, that holds an adapter.

        None where the adapter was deleted from the layer itself.
        """
        module: nn.Module | None = self.layers.get(path)
        while isinstance(module, TunerLayer) and not (module.holds(adapter) and module.spot == spot):
            module = module.base_layer
        return module if isinstance(module, TunerLayer) else None

    def modules_of(self, adapter: str) -> Iterator[ModuleWrapper]:
        for site in self.plans[adapter].modules:
            yield self.modules[site.path]

    def copies_of(self, adapter: str) -> Iterator[ModulesToSaveWrapper]:
        for save in self.plans[adapter].saves:
            yield self.copies[save.path]

    def acting_wrappers(self) -> list[Wrapper]:
        """What holds adapters that are active or merged."""
        names = [name for name in dict.fromkeys((*self.active, *self.merged)) if name in self.plans]
        of = (self.layers_of, self.modules_of, self.copies_of)
        return list({id(wrapper): wrapper for name in names for found in of for wrapper in found(name)}.values())

    def all_wrappers(self) -> list[Wrapper]:
        """What holds adapters, or held some."""
        return [*self.wrappers(), *self.modules.values(), *self.copies.values()]

    def ways_to(self, plans: Iterable[AdapterPlan], model: nn.Module | None = None) -> Iterator[nn.Module]:
        """What stands between the base model and what adapters are on: modules round it, wrappers, the base's own modules, and
        what holds the adapters' tensors. With `model`, which holds the base, the levels between the two as well."""
        if model is not None and model is not self.model:
            yield from (model, *model.children(), *(part for level in model.children() for part in level.children()))
        plans, around = list(plans), dict.fromkeys([""])
        paths = dict.fromkeys(path for plan in plans for path in plan.paths)
        for path in paths:
            head = path.rpartition(".")[0]
            while head not in around:
                around[head] = None
                head = head.rpartition(".")[0]
        names = [plan.name for plan in plans if plan.name in self.plans]
        for path in around:
            found = self.find(path)
            if found is not None:
                yield found
        for path in paths:
            layer, found = self.layers.get(path), self.find(path)
            if found is not None:
                yield found
            for wrapper in layer.chain() if layer is not None else ():
                yield wrapper
                yield from _holding(wrapper, names)
            for other in (self.modules.get(path), self.copies.get(path)):
                if other is not None:
                    yield other
                    yield from _holding(other, names)


def _holding(wrapper: Wrapper, names: Sequence[str]) -> Iterator[nn.Module]:
    """A wrapper's modules that hold tensors of these adapters."""
    home = wrapper.room if isinstance(wrapper, TunerLayer) else wrapper
    for container in home._modules.values() if names else ():
        if container is not None and not isinstance(container, TunerLayer):
            yield container
            own = (container._modules.get(name) for name in names)
            yield from (part for module in own if module is not None for part in module.modules())
