"""The level between a `PeftModel` and its base, which puts `model.` into every name; usable alone as well.

It delegates to the model's session. Each method's record gets an empty subclass, and `MixedModel` is for several methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Self

from torch import nn

from peftc import rules
from peftc.compiler.plan.sites import MapSite, ModuleSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError, Severity, warn
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import apply_plan, session_of, strip
from peftc.runtime.applying.handed import with_handed
from peftc.runtime.applying.planning import hollow, paths_in, plan_for, targeted
from peftc.runtime.applying.weighted import Combined, combined, recipe
from peftc.runtime.around.calls import CallModule
from peftc.runtime.bases.shards import refuse_sharded
from peftc.runtime.journal import keep_entries, keep_entry, whole
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.beginnings import remember
from peftc.runtime.session.described import undescribed
from peftc.runtime.session.session import Session
from peftc.runtime.session.steps import added, finished, take
from peftc.runtime.session.stored import take_saved_form
from peftc.runtime.session.succession import delete
from peftc.runtime.session.ties import part
from peftc.runtime.session.together import refuse_around
from peftc.runtime.session.values import taken, values_given

#: The config of a model without one.
NO_CONFIG = {"model_type": "custom"}


def let_property_say(module: nn.Module, name: str) -> None:
    """Ask a property again, which raised an `AttributeError`: for that Python goes on to `__getattr__`, and forgets it."""
    found = getattr(type(module), name, None)
    if isinstance(found, property):
        found.__get__(module)


class TunerModel(nn.Module):
    """A base model with adapters of one method on its layers. Final but for empty subclasses.

    Attributes that it does not have itself are those of the base model.
    """

    #: what the names of the method's slots begin with
    prefix: ClassVar[str]
    #: the class of its layers
    tuner_layer_cls: ClassVar[type[TunerLayer]] = TunerLayer
    #: targets by model type, for configs that name none
    target_module_mapping: ClassVar[Mapping[str, list[str] | str]] = {}
    #: whether layers share tensors that are stored here
    uses_shared_state: ClassVar[bool] = False
    #: whether adapters of other methods may join
    mixes: ClassVar[bool] = False

    @whole
    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Adapt the model in place; of a dict of configs, that of `adapter_name`. It is active and trainable.

        See `inject_adapter`.
        """
        super().__init__()
        self.model = model
        self.peft_config = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        self.session.stores.show_at(self)

    @classmethod
    def around(cls, session: Session, configs: dict[str, PeftConfig]) -> Self:
        """The level of a model that has its adapters already; `configs` is kept up to date."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.model = session.model
        self.peft_config = configs
        session.stores.show_at(self)
        for owner, holder in session.holders.items():
            self.add_module(owner, holder)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, without keywords that an adapter reads; in training the loss has what methods add to it."""
        session = session_of(self.model)
        outputs = self._called(session, args, kwargs)
        return finished(session, outputs) if self.training else outputs

    def _called(self, session: Session | None, args: Any, kwargs: Any) -> Any:
        acting = None if session is None else session.acting
        if session is not None and acting is not None:
            return acting.around(session.shared, self.model, args, kwargs)
        if session is None or not session.readers:
            return self.model(*args, **kwargs)
        with values_given(session, taken(session, kwargs), args, kwargs) as gates:
            outputs = self.model(*args, **kwargs)
        if gates is not None:
            remember(args, kwargs, outputs)
        return outputs

    def take_step(self, step: int) -> tuple[str, ...]:
        """Let methods that act after steps of training do so: call it after the backward of optimiser step `step`, counted
        from 1, and before gradients are zeroed. Returns the adapters that took it. Raises `PeftcError`, with them unchanged,
        if there is none, no gradient, or one is merged.
        """
        return take(self.session, step)

    def added_loss(self, adapter_names: str | Sequence[str] | None = None) -> Any:
        """What the methods of adapters, the active ones if none are named, would add to a loss after a call in training: for
        who computes the loss. Zero where there is nothing, or the model's own loss has it."""
        names = (adapter_names,) if isinstance(adapter_names, str) else adapter_names
        return added(self.session, self.session.active if names is None else names)

    def take_saved_form(self, adapter_name: str, **options: Any) -> None:
        """Give an adapter the tensors that a checkpoint would hold of it, with options that training comes to changed.
        Optimisers do not know the new tensors. Raises `PeftcError`, with nothing changed.
        """
        take_saved_form(self.session, adapter_name, options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            let_property_say(self, name)
            return getattr(self.model, name)

    # adapters -----------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """What is applied. Raises `PeftcError` if nothing is any more."""
        session = session_of(self.model)
        if session is None:
            raise PeftcError(
                rules.NOT_ADAPTED("The model has no adapter any more", fix="Adapt it again.", also=AttributeError)
            )
        return session

    @property
    def active_adapters(self) -> list[str]:
        session = session_of(self.model)
        return [] if session is None else list(session.active)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of all adapted layers, in the order of the adapters."""
        plans = self.session.plans.values()
        return list(dict.fromkeys(site.path for plan in plans for site in plan.sites if not _parameter(site)))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of all single parameters that are adapted, in the order of the adapters."""
        found = (
            f"{site.path}.{name}"
            for plan in self.session.plans.values()
            for site in plan.maps
            if (name := site.parameter)
        )
        return list(dict.fromkeys(found))

    @whole
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the adapter whose config is in `peft_config`; the first one becomes active.

        With `low_cpu_mem_usage` its tensors are on the meta device until others are loaded. With `state_dict` the modules
        that its keys name are adapted; values are not used. Raises `PeftcError`, with the model as it was.
        """
        config = self.peft_config[adapter_name]
        given = None
        if state_dict is not None:
            given = paths_in(state_dict, default_registry().method_of(config).prefix)
            config = targeted(config, given)
        plan = plan_for(
            self.model, {adapter_name: config}, autocast_adapter_dtype, task_heads=False, given=given, mixed=self.mixes
        )
        plan = with_handed(plan, self.model, {adapter_name: self.peft_config[adapter_name]})
        sources = {adapter_name: hollow(plan.adapters[0])} if low_cpu_mem_usage else {}
        apply_plan(self.model, plan, sources=sources, mixed=self.mixes)
        keep_entry(self.peft_config, adapter_name)
        self.peft_config[adapter_name] = plan.adapter(adapter_name).config

    @whole
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is others combined with weights, negative ones included; it is not activated.

        `cat` and `svd` are exact (up to the rank); `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` act on
        factors, with `_svd` on whole updates. The new scaling is 1. Methods whose updates are not thin have one way of
        their own, for the default type. Raises `PeftcError`, with nothing changed.
        """
        svd = {"clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver}
        how = recipe(
            self.session,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd,
            density,
            majority_sign_method,
        )
        self.add_combined(adapter_name, combined(self.session, how, adapter_name))

    @whole
    def add_combined(self, adapter_name: str, made: Combined, autocast_adapter_dtype: bool = True) -> None:
        """Add an adapter that was computed of others; it is not activated. Raises `PeftcError`, with nothing changed."""
        plan = plan_for(
            self.model,
            {adapter_name: made.config},
            autocast_adapter_dtype,
            loading=True,
            task_heads=False,
            given=made.paths or None,
            mixed=self.mixes,
        )
        made.require_shapes(plan.adapters[0])
        apply_plan(self.model, plan, sources={adapter_name: made.tensors.get}, mixed=self.mixes)
        keep_entry(self.peft_config, adapter_name)
        self.peft_config[adapter_name] = plan.adapter(adapter_name).config

    @whole
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or several in order; exactly their tensors become trainable."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.session.set_active(names, trainable=not inference_mode)

    @whole
    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Make the trainable tensors of adapters require gradients, or not, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        session = self.session
        session.require(names)
        for name in names:
            session.set_requires_grad(name, requires_grad)

    @whole
    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several, and their tensors. If nothing is active any more, another adapter takes over, with a
        warning, and trains if the one that was active did. Raises `PeftcError`, with nothing changed."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        delete(self.session, names)
        keep_entries(self.peft_config)
        for name in names:
            self.peft_config.pop(name, None)

    @whole
    def enable_adapter_layers(self) -> None:
        """Let the active adapters act."""
        self.session.enable(True)

    @whole
    def disable_adapter_layers(self) -> None:
        """Have the model compute as its base does. Trainability is not touched."""
        self.session.enable(False)

    # merging ------------------------------------------------------------------------------------------------------

    @whole
    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; `unmerge_adapter` restores them bit for bit."""
        self.session.merge(adapter_names, safe_merge)

    @whole
    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the base weights."""
        session = self.session
        if not session.merged:
            warn([rules.NOT_MERGED("No adapter is merged", fix="Leave the call out, or merge first.")])
        session.unmerge()

    @whole
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters folded in and no wrapper left. This object has no adapter afterwards.

        Where a module that was trained whole parts weights that the base's config says are one, the config no longer says so.
        Raises `PeftcError`, with nothing changed, if an adapter on one of them would. Replicas of layers get tensors of their
        own, so that the model is an ordinary one of so many layers, and can be saved; warns if its config cannot say so.
        """
        session, stack = self.session, self.session.stack
        plans = [session.plans[name] for name in adapter_names or session.active if name in session.plans]
        refuse_around(plans)
        refuse_sharded(session.ways_to(plans), "merged, the adapter would be lost")
        part(session, adapter_names)
        warn(undescribed(session, Severity.WARNING))
        session.enable(True)  # else what was switched off would be lost
        session.merge(adapter_names, safe_merge)
        session.keep_trained(session.active if adapter_names is None else adapter_names)
        merged = self._left(session)
        if stack is not None:
            stack.part()
        return merged

    @whole
    def unload(self) -> nn.Module:
        """The base model as it was, with the same module objects. This object has no adapter afterwards."""
        session = self.session
        session.unmerge()
        return self._left(session)

    def _left(self, session: Session) -> nn.Module:
        strip(self.model, session)
        keep_entries(self.peft_config)
        self.peft_config.clear()
        return self.model

    @property
    def acting(self) -> CallModule:
        """The active adapter that acts around calls. Raises `PeftcError` if there is none."""
        names = self.session.active
        found = next((module for name in names if (module := self.session.caller(name)) is not None), None)
        if found is None:
            what = "No active adapter acts around calls"
            raise PeftcError(rules.NOT_ADAPTED(what, fix="Activate one with `set_adapter`.", also=AttributeError))
        return found

    # facts --------------------------------------------------------------------------------------------------------

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as plain data."""
        config: Any = getattr(model, "config", NO_CONFIG)
        if isinstance(config, dict):
            return config
        if is_dataclass(config) and not isinstance(config, type):
            return asdict(config)
        to_dict = getattr(config, "to_dict", None)
        return dict(to_dict()) if to_dict is not None else NO_CONFIG

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer adds a matrix to its weight that does not depend on the weight."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in self.session.wrappers())


def _parameter(site: MapSite | ModuleSite) -> str:
    """The single parameter of its module that a site adapts, if it does not adapt the module."""
    return site.spot if isinstance(site, MapSite) else ""


class MixedModel(TunerModel):
    """The level of a model with adapters of several methods."""

    mixes = True
