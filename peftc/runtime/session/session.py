"""The operations on what is applied to one model: adding, activating, merging, removing.

A session is kept on the model it was applied to. Every operation here costs time proportional to the adapters it touches,
never to the model or to what else is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import PeftcError, Severity, warn
from peftc.graph.nodes import ModuleGraph
from peftc.host.attention import is_read_past
from peftc.registry.manager import Registry
from peftc.registry.starts import start_of
from peftc.runtime.around.calls import CallModule
from peftc.runtime.around.modules import ModuleWrapper, wrapper_class
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.bases import rounding
from peftc.runtime.bases.places import device_of
from peftc.runtime.bases.shards import note_adding, refuse_sharded
from peftc.runtime.bases.splits import agree, refuse_split_sites
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_trained, note, whole
from peftc.runtime.layer.beside import slip_under
from peftc.runtime.layer.wrapper import Source, TunerLayer
from peftc.runtime.session import starts
from peftc.runtime.session.applied import Applied, Wrapper
from peftc.runtime.session.base_tensors import BaseTensors
from peftc.runtime.session.drift import drift, home_of
from peftc.runtime.session.replicas import Stack, replicate
from peftc.runtime.session.together import gained, keep_ties, merged_already, refuse_around, refuse_clashes
from peftc.runtime.slots.stores import Stock
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod

W = TypeVar("W", TunerLayer, ModuleWrapper, ModulesToSaveWrapper)

#: makes the wrapper for a site of a PEFT type
LayerFactory = Callable[[str, MapSite, nn.Module], TunerLayer]


class Session(Applied):
    """Adapters on one base model, and the operations on them."""

    def __init__(self, model: nn.Module, graph: ModuleGraph) -> None:
        super().__init__(model, graph)
        #: base tensors that adapters train, or carry in their checkpoints
        self.base = BaseTensors(self)
        #: the model's own layers, where some are replicated
        self.stack: Stack | None = None

    @property
    def is_apart(self) -> bool:
        """Whether nothing of its adapters is in the model itself: they are prompts alone."""
        inside = self.layers or self.modules or self.copies or self.holders or self.base.is_changed
        return not inside and all(plan.prompt is not None for plan in self.plans.values())

    def lay_out(self, graph: ModuleGraph) -> None:
        """Give the model, which has no adapter yet, the layers that a graph has, once."""
        if graph.replication is not None and self.stack is None:
            keep(self)
            self.graph, self.stack = graph, replicate(self.model, graph.replication)

    # adding -------------------------------------------------------------------------------------------------------

    @whole
    def add(self, plan: AdapterPlan, registry: Registry, make: LayerFactory, source: Source | None = None) -> None:
        """Carry out an adapter's plan, or raise with the model as it was. The adapter is not active yet."""
        if plan.saves or self.copies:  # what deleted adapters left would be copied, or adapted, in place of the module
            self.prune()
        if self.plans:  # else the whole model was looked at before it was planned for
            note_adding(self.model, self.ways_to([plan]))
        problems = tuple(drift(self, plan))
        if problems:
            raise PeftcError(problems)
        refuse_split_sites(self.model, plan, self._base_at)
        method = registry.method_of(plan.config)
        stock, chosen = Stock(self.stores), start_of(method, plan.config)
        starts.refuse_unready(self, plan, chosen, source)
        tuners = {(site.path, site.spot): site.tuner(method, plan.config, self.graph) for site in plan.maps}
        with torch.no_grad():
            for site in plan.maps:
                layer = home_of(self.layers.get(site.path), site)
                if layer is None:
                    layer = self._layer(site, partial(make, plan.peft_type, site))
                    layer.join(self.shared)
                layer.add(plan.name, site, tuners[site.path, site.spot], source, stock, chosen)
            starts.let_go(self, plan, chosen)
            self.stores.show()
            self._add_around(plan, method, source)
            self._add_call(plan, method, source)
            for save in plan.saves:
                copy = self.copies.get(save.path)
                if copy is None:
                    copy = self._wrap(save.path, ModulesToSaveWrapper)
                    self._remember(self.copies, save.path, copy)
                    copy.join(self.shared)
                copy.add(plan.name, f"{plan.root}{save.path}.", source, save.lifted)
            for save in plan.saves:
                for tail, home in save.tied:
                    self._tie(plan.name, save.path, tail, home)
            self.base.change(plan, source)
            for known in (self.readers, self.seams, self.plans):
                keep_entry(known, plan.name)
            readers = [tuner for tuner in tuners.values() if tuner.keywords or tuner.waits]
            if readers:
                self.readers[plan.name] = readers[0]
            self.seams[plan.name] = frozenset[str]().union(*{tuner.seams for tuner in tuners.values()})
            self.plans[plan.name] = plan
            agree(self.model, partial(self.tensors, plan.name))
            self.base.act(self.active if self.enabled else ())

    def _tie(self, name: str, path: str, tail: str, home: str) -> None:
        """Let a parameter of an adapter's copy be one with that of another copy, which the base calls `home`."""
        at, _, own = home.rpartition(".")
        first = self.copies[at].modules_to_save[name].get_parameter(own)
        twin = self.copies[path].modules_to_save[name]
        twin.get_submodule(tail.rpartition(".")[0])._parameters[tail.rpartition(".")[2]] = first

    def _base_at(self, path: str) -> nn.Module:
        """The base model's module at a path, under wrappers of layers."""
        module = self._place(path)[2]
        return module.get_base_layer() if isinstance(module, TunerLayer) else module

    def _layer(self, site: MapSite, wrap: Callable[[nn.Module], TunerLayer]) -> TunerLayer:
        """A new wrapper round what is at a site's path; of rows that train beside a method, under all that is there."""
        outermost = self.layers.get(site.path)
        if site.inside and outermost is not None:
            return slip_under(outermost, wrap)
        layer = self._wrap(site.path, wrap)
        self._remember(self.layers, site.path, layer)
        return layer

    def _add_around(self, plan: AdapterPlan, method: TunerMethod, source: Source | None) -> None:
        """The part of an adapter that acts around modules."""
        for site in plan.modules:
            wrapper = self.modules.get(site.path)
            if wrapper is None:
                parent, _, module = self._place(site.path)
                wrapper = wrapper_class(method)(module, site, parent)
                self._remember(self.modules, site.path, wrapper)
            assert method.module_tuner is not None
            wrapper.add(plan.name, site, method.module_tuner, source)

    def _add_call(self, plan: AdapterPlan, method: TunerMethod, source: Source | None) -> None:
        """The part of an adapter that acts around calls."""
        if plan.call is None or method.call_tuner is None:
            return
        module = CallModule(plan, plan.call, method.call_tuner)
        module.fill(source, device_of(self.model))
        keep_entry(self.holders, plan.call.owner)
        holder = self.holders.setdefault(plan.call.owner, nn.ModuleDict())
        keep_entry(holder._modules, plan.name)
        holder._modules[plan.name] = module.train(self.model.training)

    def _wrap(self, path: str, wrap: Callable[[nn.Module], W]) -> W:
        parent, name, module = self._place(path)
        wrapper = wrap(module)
        wrapper.training = module.training
        if isinstance(wrapper, TunerLayer):
            wrapper.read_past = is_read_past(parent, wrapper.get_base_layer())
        keep_entry(parent._modules, name)
        parent._modules[name] = wrapper
        return wrapper

    @staticmethod
    def _remember(known: dict[str, W], path: str, wrapper: W) -> None:
        keep_entry(known, path)
        known[path] = wrapper

    def prune(self) -> None:
        """Take out wrappers that hold no adapter: what is left where others took one out."""
        keep_entries(self.layers, self.modules, self.copies)
        for path, layer in [item for item in self.layers.items() if not item[1].adapters]:
            below: nn.Module = layer
            while isinstance(below, TunerLayer) and not below.adapters:
                below = below.base_layer
            self._put_back(path, below)
            if isinstance(below, TunerLayer):
                self.layers[path] = below
            else:
                del self.layers[path]
        for path in [path for path, wrapper in self.modules.items() if not wrapper.adapters]:
            del self.modules[path]  # it has left the model already
        for path in [path for path, copy in self.copies.items() if not copy.modules_to_save]:
            self._put_back(path, self.copies.pop(path).original_module)
        self.stores.prune()

    # activation ---------------------------------------------------------------------------------------------------

    @whole
    def set_active(self, names: Sequence[str], trainable: bool = True) -> None:
        """Activate adapters, in this order. Their slots require gradients if `trainable`, those of others do not."""
        self.require(names)
        names = list(dict.fromkeys([*names, *self.needed_by(names)]))
        self.refuse_clashes(names)
        self._take_out_merged(names)
        for name in {*self.requiring, *self.active} & self.plans.keys() - set(names):
            self.set_requires_grad(name, False)
        for name in names:
            self.set_requires_grad(name, trainable)
        self.activate(names)

    def refuse_clashes(self, names: Iterable[str]) -> None:
        """Raise `PeftcError` if these adapters cannot act at the same time."""
        refuse_clashes([self.plans[name] for name in dict.fromkeys(names)], self._tuner)

    def _tuner(self, plan: AdapterPlan, site: MapSite) -> MapTuner[Any] | None:
        layer = self.layer_of(plan.name, site.path, site.spot)
        return None if layer is None else layer.part(plan.name).tuner

    def activate(self, names: Sequence[str]) -> None:
        """Let these adapters act, in this order. What requires gradients of their own tensors stays as it is."""
        keep(self.shared)
        self.shared.gated = frozenset([*self.needed_by(names), *(n for n in names if self.waits(n))])
        touched = [n for n in dict.fromkeys((*self.active, *names)) if n in self.plans]
        layers = {id(layer): layer for name in touched for layer in self.layers_of(name)}
        modules = {id(module): module for name in touched for module in self.modules_of(name)}
        copies = {id(copy): copy for name in touched for copy in self.copies_of(name)}
        for wrapper in (*layers.values(), *modules.values(), *copies.values()):
            wrapper.activate(names)
            if wrapper.disable_adapters == self.enabled:
                wrapper.enable_adapters(self.enabled)
        self.base.take_turns([self.plans[name] for name in touched], names)
        self.active = tuple(names)
        self.base.act(self.active if self.enabled else ())

    def _take_out_merged(self, names: Sequence[str]) -> None:
        """Unmerge, with a warning, before others than the active adapters are activated."""
        if self.merged and set(names) != set(self.active):
            what = f"{', '.join(f'`{name}`' for name in self.merged)} is taken out of the base weights again"
            fix = "Call `unmerge_adapter()` before others are activated."
            warn([rules.WHILE_MERGED(what, fix=fix, severity=Severity.WARNING)])
            self.unmerge()

    @whole
    def bring_in(self, name: str, trainable: bool = True) -> None:
        """Activate an adapter in place of those of its own method, beside those of others. What trained before goes on to."""
        own = self.plans[name].peft_type
        others = [n for n in self.active if n in self.plans and self.plans[n].peft_type != own]
        self.refuse_clashes([*others, name])
        self._take_out_merged([*others, name])
        self.set_requires_grad(name, trainable)
        self.activate([*others, name])

    @whole
    def let_rows_differ(self) -> None:
        """From now on layers look whether a call names adapters by row."""
        if not self.shared.by_rows:
            keep(self.shared)
            self.shared.by_rows = True
            for layer in self.wrappers():
                layer.join(self.shared)

    @whole
    def set_requires_grad(self, name: str, required: bool) -> None:
        """Make an adapter's trainable tensors require gradients, or not: those of adapters that it weighs as well."""
        keep_entries(self.requiring)
        (self.requiring.add if required else self.requiring.discard)(name)
        for layer in self.layers_of(name):
            layer.set_requires_grad(name, required)
        for wrapper in self.modules_of(name):
            for trainable, parameter in wrapper.parameters_of(name):
                keep_trained(parameter, trainable and required)
        if (caller := self.caller(name)) is not None:
            caller.set_trainable(required)
        for parameter in [p for copy in self.copies_of(name) for p in copy.parameters_of(name)]:
            if parameter.is_floating_point():
                keep_trained(parameter, required)
        self.base.let_train(self.plans[name], name in self.active)
        for weighed in self.needed_by([name]):
            self.set_requires_grad(weighed, required)

    @whole
    def enable(self, enabled: bool) -> None:
        """Let the active adapters, and merged ones, act, or not; what they train of the base is theirs, or as it was before."""
        keep(self)
        # what is switched on is all: another adapter may be on a layer by now than when it was switched off
        among = self.all_wrappers() if enabled else self.acting_wrappers()
        wrappers = [wrapper for wrapper in among if wrapper.disable_adapters is enabled]
        note(_enable, wrappers, not enabled)
        _enable(wrappers, enabled)
        self.enabled = enabled
        self.base.act(self.active if enabled else ())

    # removing -----------------------------------------------------------------------------------------------------

    @whole
    def remove(self, name: str) -> None:
        """Remove an adapter; its layers keep the others, and nothing takes over."""
        self.set_requires_grad(name, False)
        for layer in self.layers_of(name):
            layer.remove(name)
        for module in (*self.modules_of(name), *self.copies_of(name)):
            module.delete_adapter(name)
        for needed in self.needed_by([name]):
            self.remove(needed)
        call = self.plans[name].call
        if call is not None:
            keep_entries(self.holders[call.owner]._modules)
            del self.holders[call.owner]._modules[name]
        keep_entries(self.plans, self.seams, self.steps, self.readers)
        del self.plans[name], self.seams[name]
        self.steps.pop(name, None)
        self.readers.pop(name, None)
        self.base.restore([name])
        self.activate([n for n in self.active if n != name])

    @whole
    def merge(self, names: Sequence[str] | None = None, safe: bool = False) -> None:
        """Fold adapters into the base weights where they are; all layers or none."""
        names = self.active if names is None else names
        self.require(names)
        if not names:
            what, why = "No adapter is active, so nothing is merged", "The base weights stay as they are."
            warn([rules.NOT_MERGED(what, why=why, fix="Activate one, or name some.")])
        again = [name for name in names if name in self.merged]
        if again:
            warn([merged_already(again, names, "unmerge_adapter")])
        refuse_around([self.plans[name] for name in names])
        refuse_sharded(self.ways_to(self.plans[name] for name in names), "merged, the adapter would be lost")
        self.refuse_clashes([*self.merged, *names])
        self.base.act(self.active)  # what trains along is folded in as it was trained, also while all are disabled
        with rounding.told():
            for path in dict.fromkeys(site.path for name in names for site in self.plans[name].maps):
                for layer in self.layers[path].chain() if not self.enabled else ():
                    layer.enable_adapters(False)
                self.layers[path].merge(safe, names)
        keep_ties(self.graph, self.layers)
        warn(gained(self.layers))
        self.base.still()
        self.base.act(self.active if self.enabled else ())

    @whole
    def unmerge(self) -> None:
        """Restore the base weights, bit for bit."""
        keep(self.shared)
        for layer in self.layers.values():
            layer.unmerge()
        self.shared.merges = False

    @whole
    def unload(self) -> None:
        """Take every wrapper out again: the same module objects as before are back in their places."""
        keep(self, self.shared)
        for name in self.plans:
            for parameter in self.base.trained(self.plans[name]).values():
                keep_trained(parameter, False)
        for path, layer in self.layers.items():
            layer.rest()
            self._put_back(path, layer.get_base_layer())
        for wrapper in self.modules.values():
            wrapper.take_out()
        for path, copy in self.copies.items():
            self._put_back(path, copy.original_module)
        self.base.restore(self.plans)
        self.stores.clear()
        if self.stack is not None:
            self.stack.put_back()
            self.stack = None
        self.layers, self.modules, self.copies, self.plans = {}, {}, {}, {}
        self.seams, self.steps, self.readers, self.requiring, self.active = {}, {}, {}, set(), ()
        for holder in self.holders.values():
            keep_entries(holder._modules)
            holder.clear()

    def keep_trained(self, names: Iterable[str]) -> None:
        """Before unloading: what these adapters, or others that are merged, trained whole becomes the model's, active or not."""
        keep(self)
        self.stack = None  # the replicas as well
        merged = (*names, *self.merged)
        self.base.act(merged)
        self.base.keep_changes()
        keep_entries(self.copies)
        for path, copy in list(self.copies.items()):
            self._put_back(path, copy.taking_over(merged))
            del self.copies[path]

    def _put_back(self, path: str, module: nn.Module) -> None:
        parent, name, _ = self._place(path)
        keep_entry(parent._modules, name)
        parent._modules[name] = module

    # state --------------------------------------------------------------------------------------------------------

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What an adapter has of its own to be saved, attached to the model: disk key -> tensor."""
        plan = self.plans[name]
        tensors: dict[str, Tensor] = {}
        for site in plan.sites:
            layer = self.layer_of(name, site.path, site.spot) if isinstance(site, MapSite) else self.modules[site.path]
            if layer is None:
                continue
            for slot, (_, tensor) in zip(site.slots, layer.parameters_of(name), strict=True):
                if slot.saved:
                    tensors[site.key(slot, name).disk()] = tensor
        for save in plan.saves:
            twin = self.copies[save.path].modules_to_save[name]
            tied = {tail for tail, _ in save.tied}
            own = {k: t for k, t in twin.state_dict(keep_vars=True).items() if k not in tied}
            for key, tensor in own.items():
                tensors[f"{plan.root}{save.path}.{key}"] = tensor
        tensors |= self.base.values(plan)
        caller = self.caller(name)
        return tensors if caller is None else tensors | caller.tensors()


def _enable(wrappers: Sequence[Wrapper], enabled: bool) -> None:
    for wrapper in wrappers:
        wrapper.enable_adapters(enabled)
