"""What comes before adapters are applied: compiling for a live model, and opening what is to be loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.load import AdapterFile, open_adapter
from peftc.checkpoint.report import LoadReport, match_file
from peftc.checkpoint.values import dtype_name
from peftc.checkpoint.weights import device_of
from peftc.compiler.compile import compile_plan, conflicts
from peftc.compiler.plan import AdapterPlan, InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.config.mixins import TargetsMixin
from peftc.diagnostics import ConfigError, PeftcError, warn
from peftc.graph.nodes import TensorFacts
from peftc.registry.manager import default_registry
from peftc.runtime.apply import session_of
from peftc.runtime.layer import Source
from peftc.runtime.session import Session
from peftc.runtime.snapshot import snapshot
from peftc.runtime.storage import torch_dtype

#: Warnings about how training would start, which say nothing of an adapter that is loaded.
_OF_THE_START = frozenset({rules.NOT_IDENTITY.code})


def plan_for(
    model: nn.Module,
    configs: Mapping[str, PeftConfig],
    autocast_adapter_dtype: bool = True,
    loading: bool = False,
    task_heads: bool = True,
    given: frozenset[str] | None = None,
) -> InjectionPlan:
    """Compile configs for a live model and show the compiler's warnings; the first config's adapter is to be active,
    unless the model has adapters already; `given` are the paths to adapt, where they are known exactly. Raises
    `PeftcError` with every problem."""
    if not isinstance(model, nn.Module):
        what = f"A {type(model).__name__} is not a `torch.nn.Module`"
        raise PeftcError(rules.NOT_A_MODEL(what, fix="Give the model first, then the config."))
    session = session_of(model)
    plan = compile_plan(
        snapshot(model) if session is None else session.graph,
        configs,
        active=None if session is None else [],
        registry=default_registry(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        task_heads=task_heads,
        given=given,
    )
    others = [] if session is None else [p for name, p in session.plans.items() if name not in configs]
    problems = conflicts([*others, *plan.adapters])
    if problems:
        raise PeftcError(problems)
    warn(w for w in plan.warnings if not loading or w.code not in _OF_THE_START)
    return plan


def targeted(config: PeftConfig, paths: Collection[str]) -> PeftConfig:
    """The config, saying which modules it adapts if it does not: what is saved has to be found again."""
    if isinstance(config, TargetsMixin) and config.target_modules is None:
        return config.model_copy(update={"target_modules": set(paths)})
    return config


def hollow(plan: AdapterPlan) -> Source:
    """Slots without memory, on the meta device, for an adapter whose values come later."""
    facts = {
        site.key(slot, plan.name).disk(): (slot.shape, torch_dtype(slot.dtype or site.dtype))
        for site in plan.sites
        for slot in site.slots
    }

    def find(key: str) -> Tensor | None:
        if key not in facts:
            return None
        shape, dtype = facts[key]
        return torch.empty(shape, dtype=dtype, device="meta")

    return find


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How an adapter is read. `hub` are all further keywords: those that the hub's client takes, `subfolder` among them.

    `device` is where tensors are read to before they go to their layers; `key_mapping` see `peftc.checkpoint.keys.renamed`.
    """

    is_trainable: bool = False
    autocast_adapter_dtype: bool = True
    device: str | torch.device | int | None = None
    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loadable:
    """An adapter that is compiled for a model and whose file fits: nothing but carrying it out is left."""

    plan: InjectionPlan
    source: Source
    report: LoadReport

    @property
    def adapter(self) -> AdapterPlan:
        """The one adapter."""
        return self.plan.adapters[0]


def opened(
    model_id: str | PathLike[str], config: PeftConfig | None, options: LoadOptions
) -> tuple[PeftConfig, AdapterFile]:
    """Config and weights of an adapter folder, or of a repository of the hub; a config that is given is used itself."""
    if config is None:
        config = read_config(model_id, **options.hub)
    elif not isinstance(config, PeftConfig):
        what = f"`config` is a {type(config).__name__}, not a `PeftConfig`"
        raise ConfigError(
            rules.BAD_VALUE(what, fix="Leave it out, or make one, e.g. with `PeftConfig.from_pretrained`.")
        )
    file = open_adapter(fspath(model_id), **options.hub)
    config.inference_mode = not options.is_trainable
    return config, file


def loadable(model: nn.Module, name: str, config: PeftConfig, file: AdapterFile, options: LoadOptions) -> Loadable:
    """Compile an adapter for a live model and find its tensors in a file.

    Raises `PeftcError` if one does not fit or none would be loaded; the model is not touched.
    """
    plan = plan_for(model, {name: config}, options.autocast_adapter_dtype, loading=True)
    mapping = options.key_mapping
    if mapping is None and not config.is_prompt_learning:  # what the model's class says about its former names
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    if mapping:
        file = file.mapped(mapping)
    session = session_of(model) or Session(model, plan.graph or snapshot(model))
    vocabulary = vocabulary_facts(session, plan.adapters[0])
    ignored = options.ignore_mismatched_sizes
    report = match_file(plan.adapters[0], file, plan.model, vocabulary, ignored).require()
    device = None if options.device is None else device_of(options.device)

    def find(key: str) -> Tensor | None:
        stored = report.sources.get(key)
        tensor = None if stored is None else file.tensor(stored)
        return tensor if tensor is None or device is None else tensor.to(device)

    return Loadable(plan, find, report)


def vocabulary_facts(session: Session, plan: AdapterPlan) -> dict[str, TensorFacts]:
    """The base model's embeddings, which a checkpoint of the adapter may carry, by key."""
    return {
        carried.disk: TensorFacts(tuple(carried.tensor.shape), dtype_name(carried.tensor))
        for carried in session.vocabulary(plan)
    }
