"""What every model with adapters has: the levels round its base, the session, and adapters that come and go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from torch import nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.types import PeftType
from peftc.diagnostics import PeftcError
from peftc.host.layers import recomputes
from peftc.model.parts.activation import ActivationMixin
from peftc.model.parts.loading import LoadOptions, needed_sources
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import apply_plan, hold, let_go, mixed_types, session_of
from peftc.runtime.applying.classes import model_class
from peftc.runtime.applying.handed import with_handed
from peftc.runtime.applying.planning import hollow, plan_for
from peftc.runtime.collector import collector_paused
from peftc.runtime.journal import keep, keep_entry, whole
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.session.session import Session

#: What an adapter is called that nobody names; its files lie at the root of a folder, those of others in subfolders.
DEFAULT = "default"


class AdaptedModel(ActivationMixin, nn.Module):
    """A base model with adapters: `PeftModel` without its API.

    `peft_config` maps adapter names to configs; `base_model` is the level that gives parameters their names.
    """

    #: whether adapters of several methods may be on the model
    mixes: ClassVar[bool] = False

    @whole
    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        let_go(model)
        plan = plan_for(model, {adapter_name: peft_config}, autocast_adapter_dtype)
        plan = with_handed(plan, model, {adapter_name: peft_config})
        self._start(model, plan, {adapter_name: hollow(plan.adapters[0])} if low_cpu_mem_usage else {})

    @classmethod
    @whole
    def from_plan(cls, model: nn.Module, plan: InjectionPlan, sources: dict[str, Source] | None = None) -> Self:
        """Apply a compiled plan. Raises `PeftcError`, with the model as it was, if it does not fit."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._start(model, plan, sources or {})
        return self

    def _start(self, model: nn.Module, plan: InjectionPlan, sources: Mapping[str, Source]) -> None:
        let_go(model)
        if session_of(model) is not None:
            what = "The model has adapters already; wrapping it again would nest them"
            raise PeftcError(rules.MIXED_TYPES(what, fix="Use `add_adapter`, or `unload()` first."))
        registry = default_registry()
        checkpointed = recomputes(model)
        first = plan.adapters[0]
        method = registry.get(first.peft_type)
        if method.is_prompt:
            self._refuse_several(plan.active)
        self.peft_config: dict[str, PeftConfig] = {}
        self.peft_type = PeftType(first.peft_type)
        self.prompt_encoder = nn.ModuleDict() if method.is_prompt else None
        sources = {**needed_sources(plan, LoadOptions()), **sources}
        trains = not first.config.inference_mode
        with collector_paused():
            session = apply_plan(model, plan, registry=registry, sources=sources, mixed=self.mixes, trains=trains)
            self.base_model = self._level(plan, session)
            self.__dict__["_session"] = session
            for adapter in plan.adapters:
                if not adapter.needed_by:
                    self._join(adapter, sources.get(adapter.name))
        for name, encoder in self._encoders().items():
            encoder.set_trainable(trains and name in plan.active)
        if checkpointed:
            self.prepare_model_for_gradient_checkpointing(self.get_base_model())

    def _level(self, plan: InjectionPlan, session: Session) -> nn.Module:
        """What stands between this object and the base model: nothing, for a method that wraps no layers."""
        method = default_registry().get(plan.adapters[0].peft_type)
        return session.model if method.is_prompt else model_class(method).around(session, self.peft_config)

    def _join(self, adapter: AdapterPlan, source: Source | None) -> None:
        """What an adapter has beside its layers."""
        self._add_encoder(adapter, source)
        keep(adapter.config)
        keep_entry(self.peft_config, adapter.name)
        adapter.config.base_model_name_or_path = adapter.config.base_model_name_or_path or self._base_name()
        self.peft_config[adapter.name] = adapter.config

    def _base_name(self) -> str | None:
        return getattr(self.get_base_model(), "name_or_path", None) or None

    @property
    def session(self) -> Session:
        """The adapters that are applied. Raises `PeftcError` after unloading."""
        session: Session | None = self.__dict__.get("_session")
        if session is None or (not session.plans and session_of(session.model) is not session):
            raise PeftcError(
                rules.NOT_ADAPTED("The model has no adapter any more", fix="Wrap it again.", also=AttributeError)
            )
        return session

    def get_base_model(self) -> nn.Module:
        """The base model, without the levels above it."""
        base = self.base_model
        return base if self.prompt_encoder is not None else base.model  # type: ignore[return-value]

    def _attach(self, plan: InjectionPlan, source: Source | None) -> None:
        """Add the plan's one adapter, from a checkpoint or fresh."""
        adapter = plan.adapters[0]
        sources = needed_sources(plan, LoadOptions()) | ({} if source is None else {adapter.name: source})
        apply_plan(self.get_base_model(), plan, sources=sources, mixed=self.mixes)
        self._join(adapter, source)

    def _refuse_type(self, config: PeftConfig) -> None:
        if config.peft_type != self.peft_type:
            raise PeftcError(mixed_types(config, {str(self.peft_type)}))
        hold(self.get_base_model(), self.session)

    def _drop(self, name: str) -> None:
        """Remove an adapter; nothing takes over."""
        self.session.remove(name)
        self._forget([name])
