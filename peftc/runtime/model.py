"""`PeftModel`: the wrapped model with the API people know. It delegates; what is applied is in its session."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.load import AdapterFile, open_adapter
from peftc.checkpoint.report import LoadReport, match_file
from peftc.checkpoint.save import save_adapter
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan import AdapterPlan, InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.config.types import PeftType
from peftc.diagnostics import PeftcError, warn
from peftc.graph.nodes import ModuleGraph
from peftc.registry.manager import Registry, default_registry
from peftc.runtime.apply import SESSION, apply_plan, mixed, name_taken, session_of
from peftc.runtime.classes import model_class
from peftc.runtime.collector import collector_paused
from peftc.runtime.journal import Journal
from peftc.runtime.layer import Source
from peftc.runtime.prompt import PromptDriver, PromptEncoder
from peftc.runtime.session import Session
from peftc.runtime.snapshot import snapshot
from peftc.tuner.method import PromptTuner

DEFAULT = "default"


class PeftModel(nn.Module):
    """A base model with adapters. Attributes that it does not have itself are those of the base model.

    `peft_config` maps adapter names to configs; `base_model` is the level that gives parameters their names.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        registry = default_registry()
        plan = plan_for(model, {adapter_name: peft_config}, registry, autocast_adapter_dtype)
        self._start(model, plan, registry)

    @classmethod
    def from_plan(cls, model: nn.Module, plan: InjectionPlan, sources: dict[str, Source] | None = None) -> Self:
        """Apply a compiled plan. Raises `PeftcError`, with the model as it was, if it does not fit."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._start(model, plan, default_registry(), sources)
        return self

    def _start(
        self, model: nn.Module, plan: InjectionPlan, registry: Registry, sources: dict[str, Source] | None = None
    ) -> None:
        if session_of(model) is not None:
            what = "The model has adapters already; wrapping it again would nest them"
            raise PeftcError(rules.MIXED_TYPES(what, fix="Use `add_adapter`, or `unload()` first."))
        first = plan.adapters[0]
        method = registry.get(first.peft_type)
        self.peft_config: dict[str, PeftConfig] = {}
        self.peft_type = PeftType(first.peft_type)
        self.prompt_encoder = nn.ModuleDict() if method.is_prompt else None
        with Journal() as journal, collector_paused():
            session = apply_plan(model, plan, registry=registry, sources=sources)
            journal.note(_strip, model, session)
            self.base_model = model if method.is_prompt else model_class(method)(model, method.prefix)
            self.__dict__["_session"] = session
            for adapter in plan.adapters:
                self._join(adapter, registry, (sources or {}).get(adapter.name))
        self.set_adapter(list(plan.active), inference_mode=first.config.inference_mode)
        if _get(model, "is_gradient_checkpointing", False):
            self._require_input_gradients()

    def _join(self, adapter: AdapterPlan, registry: Registry, source: Source | None) -> None:
        """What an adapter has beside its layers."""
        if adapter.prompt is not None:
            tuner = registry.get(adapter.peft_type).tuner
            assert isinstance(tuner, PromptTuner) and self.prompt_encoder is not None
            encoder = PromptEncoder(adapter, tuner)
            encoder.fill(self.get_base_model().get_input_embeddings(), source)  # type: ignore[operator]
            self.prompt_encoder[adapter.name] = encoder
        adapter.config.base_model_name_or_path = adapter.config.base_model_name_or_path or self._base_name()
        self.peft_config[adapter.name] = adapter.config

    def _base_name(self) -> str | None:
        name = _get(self.get_base_model(), "name_or_path", None)
        return name or None

    # the model ----------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The adapters that are applied. Raises `PeftcError` after unloading."""
        session: Session | None = self.__dict__.get("_session")
        if session is None or not self.peft_config:
            raise PeftcError(rules.NOT_ADAPTED("The model has no adapter any more", fix="Wrap it again."))
        return session

    def get_base_model(self) -> nn.Module:
        """The base model, without the levels above it."""
        base = self.base_model
        return base if self.prompt_encoder is not None else base.model  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters in effect."""
        driver = self._driver()
        if driver is None:
            return self.get_base_model()(*args, **kwargs)
        if kwargs.get("position_ids") is not None:
            what = "`position_ids` are ignored: the virtual tokens move every position"
            warn([rules.POSITIONS_IGNORED(what, fix="Leave them out.")])
        return driver.model(**driver.widened(args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generation with the active adapters in effect."""
        base = self.get_base_model()
        driver = self._driver()
        if driver is None:
            return base.generate(*args, **kwargs)  # type: ignore[operator]
        with driver.generating():
            return base.generate(*args, **kwargs)  # type: ignore[operator]

    def _driver(self) -> PromptDriver | None:
        if self.prompt_encoder is None or not self.session.enabled or not self.session.active:
            return None
        encoder = self.prompt_encoder[self.session.active[0]]
        assert isinstance(encoder, PromptEncoder)
        return PromptDriver(self.get_base_model(), encoder)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's; also makes the inputs require gradients, without which re-entrant checkpointing cuts
        the path to every adapter."""
        self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]
        self._require_input_gradients()

    def _require_input_gradients(self) -> None:
        enable = _get(self.get_base_model(), "enable_input_require_grads", None)
        if enable is not None:
            enable()

    # adapters -----------------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        return list(self.session.active)

    @property
    def active_adapter(self) -> str:
        active = self.session.active
        return active[0] if active else ""

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @collector_paused()
    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add an adapter beside those there are; it is not activated. Raises `PeftcError`, with nothing changed."""
        self._add(adapter_name, peft_config, None, autocast_adapter_dtype)

    def _add(self, name: str, config: PeftConfig, source: Source | None, autocast: bool = True) -> None:
        session, registry = self.session, default_registry()
        self._refuse(name, config)
        plan = compile_plan(session.graph, {name: config}, active=[], registry=registry, autocast_adapter_dtype=autocast)
        warn(plan.warnings)
        sources = {} if source is None else {name: source}
        apply_plan(self.get_base_model(), plan, registry=registry, sources=sources)
        self._join(plan.adapters[0], registry, source)

    def _refuse(self, name: str, config: PeftConfig) -> None:
        if name in self.peft_config:
            raise PeftcError(name_taken(name))
        if config.peft_type != self.peft_type:
            raise PeftcError(mixed(config, {str(self.peft_type)}))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or several in order; exactly their tensors become trainable."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.session.set_active(names, trainable=not inference_mode)
        for name, encoder in (self.prompt_encoder or {}).items():
            encoder.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors."""
        self.session.delete(adapter_name)
        if self.prompt_encoder is not None:
            self.prompt_encoder._modules.pop(adapter_name, None)
        del self.peft_config[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as its base does. Trainability is not touched."""
        session = self.session
        before = session.enabled
        session.enable(False)
        try:
            yield
        finally:
            session.enable(before)

    # merging ------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; `unmerge_adapter` restores them bit for bit."""
        self._refuse_merge()
        self.session.merge(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the base weights."""
        self.session.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters folded in and no wrapper left. This object has no adapter afterwards."""
        self._refuse_merge()
        session, model = self.session, self.get_base_model()
        session.merge(adapter_names, safe_merge)
        session.keep_copies()
        self._leave(session)
        return model

    def unload(self) -> nn.Module:
        """The base model as it was, with the same module objects. This object has no adapter afterwards."""
        session, model = self.session, self.get_base_model()
        session.unmerge()
        self._leave(session)
        return model

    def _refuse_merge(self) -> None:
        if self.prompt_encoder is not None:
            fix = "Keep the adapter beside the model."
            raise PeftcError(rules.CANNOT_MERGE("A prompt changes the input, not the weights", fix=fix))

    def _leave(self, session: Session) -> None:
        _strip(self.get_base_model(), session)
        self.peft_config = {}

    # counting -----------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` parameters; a shared tensor counts once."""
        trainable = total = 0
        for parameter in self.parameters():
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """One line with both counts and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save adapters: `default` at the root of the folder, others in subfolders. Each save is atomic.

        Further keywords of the reference are accepted. Raises `PeftcError` with the folder as it was.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.session.require(names)
        if not is_main_process:
            return
        for name in names:
            folder = Path(save_directory) if name == DEFAULT else Path(save_directory) / name
            config, tensors = self.peft_config[name], self.adapter_tensors(name, bool(save_embedding_layers))
            save_adapter(folder, tensors, self._with_mapping(config), self._plan(name))

    def adapter_tensors(self, name: str, save_embedding_layers: bool = True) -> dict[str, Tensor]:
        """What a checkpoint of the adapter holds: key on disk -> tensor."""
        tensors = self.session.tensors(name, save_embedding_layers)
        plan = self.session.plans[name]
        if plan.prompt is not None and self.prompt_encoder is not None:
            with torch.no_grad():
                tensors[plan.prompt.disk] = self.prompt_encoder[name]()
        return tensors

    def _plan(self, name: str) -> InjectionPlan:
        session = self.session
        return InjectionPlan(session.graph.model, (session.plans[name],), (name,), session.graph.numel, graph=session.graph)

    def _with_mapping(self, config: PeftConfig) -> PeftConfig:
        """Without a task type, a file names the base model's class, for information."""
        if config.task_type is not None or config.auto_mapping is not None:
            return config
        cls = type(self.get_base_model())
        mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        return config.model_copy(update={"auto_mapping": mapping})

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load an adapter onto a base model. Raises `PeftcError`, with the model as it was."""
        config, file = _opened(model_id, config, is_trainable, kwargs)
        plan = plan_for(model, {adapter_name: config}, default_registry(), autocast_adapter_dtype)
        report = match_file(plan.adapters[0], file, plan.model).require()
        return cls.from_plan(model, plan, {adapter_name: _source(file, report)})

    @collector_paused()
    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> LoadReport:
        """Load a further adapter, not activated; one of that name is overwritten. The report names every key.

        Raises `PeftcError`, with nothing changed, if a tensor does not fit or nothing would be loaded.
        """
        session, registry = self.session, default_registry()
        config, file = _opened(model_id, None, is_trainable, kwargs)
        replaced = adapter_name in session.plans
        self._refuse("" if replaced else adapter_name, config)
        plan = compile_plan(
            session.graph,
            {adapter_name: config},
            active=[],
            registry=registry,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        report = match_file(plan.adapters[0], file, plan.model).require()
        warn(plan.warnings)
        source, active = _source(file, report), session.active
        if replaced:
            self.delete_adapter(adapter_name)
        apply_plan(self.get_base_model(), plan, registry=registry, sources={adapter_name: source})
        self._join(plan.adapters[0], registry, source)
        if replaced:
            self.set_adapter(active, inference_mode=not is_trainable)
        return report


def _opened(
    model_id: str | Path, config: PeftConfig | None, is_trainable: bool, kwargs: dict[str, Any]
) -> tuple[PeftConfig, AdapterFile]:
    """Config and weights of an adapter folder, or of a repository of the hub."""
    config = config or read_config(model_id, **kwargs)
    config.inference_mode = not is_trainable
    return config, open_adapter(model_id, **kwargs)


def _source(file: AdapterFile, report: LoadReport) -> Source:
    """Tensors of a matched file by planned key."""

    def find(key: str) -> Tensor | None:
        stored = report.sources.get(key)
        return None if stored is None else file.tensor(stored)

    return find


def plan_for(
    model: nn.Module, configs: dict[str, PeftConfig], registry: Registry, autocast_adapter_dtype: bool = True
) -> InjectionPlan:
    """Compile configs for a live model, and show the compiler's warnings."""
    session = session_of(model)
    graph: ModuleGraph = session.graph if session is not None else snapshot(model)
    plan = compile_plan(graph, configs, registry=registry, autocast_adapter_dtype=autocast_adapter_dtype)
    warn(plan.warnings, stacklevel=4)
    return plan


@collector_paused()
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A `PeftModel` round the model, its adapter fresh, active and trainable. Raises `PeftcError`, model unchanged."""
    if revision is not None:
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = DEFAULT, low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Adapt the model in place and return it; it stays of its own class. For methods on layers."""
    registry = default_registry()
    if registry.method_of(peft_config).is_prompt:
        what = "A prompt adapts the call, which a model without wrapper does not let through"
        raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Use `get_peft_model`."))
    plan = plan_for(model, {adapter_name: peft_config}, registry)
    session = apply_plan(model, plan, registry=registry)
    model.__dict__["peft_config"] = {name: p.config for name, p in session.plans.items()}
    return model


def get_peft_model_state_dict(model: PeftModel, adapter_name: str = DEFAULT, **kwargs: Any) -> dict[str, Tensor]:
    """What a checkpoint of the adapter holds: key on disk -> tensor."""
    return model.adapter_tensors(adapter_name)


def _strip(model: nn.Module, session: Session) -> None:
    session.unload()
    model.__dict__.pop(SESSION, None)
    model.__dict__.pop("peft_config", None)


def _get(module: nn.Module, name: str, default: Any) -> Any:
    """An optional attribute of a model that may be of any library."""
    return inspect.getattr_static(module, name, default) if name in module.__dict__ else getattr(module, name, default)
