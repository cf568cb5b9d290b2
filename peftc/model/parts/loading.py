"""What comes before adapters are applied: compiling for a live model, and opening what is to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.former import as_of_now, with_ranks
from peftc.checkpoint.load import AdapterFile, open_adapter
from peftc.checkpoint.names import START_NAME
from peftc.checkpoint.report import LoadReport, match_file
from peftc.checkpoint.weights import device_of
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import CONFIG_NAME, PeftConfig
from peftc.config.files import read_config
from peftc.config.hub import fetch
from peftc.diagnostics import ConfigError, PeftcError, warn
from peftc.graph.tensors import TensorFacts
from peftc.limits import MAX_NAME
from peftc.model.parts import identity
from peftc.model.parts.starts import chosen_by, with_kept
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import session_of
from peftc.runtime.applying.planning import plan_for
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.session.session import Session
from peftc.runtime.session.stored import fitted

#: Where adapters are saved that another one weighs, in its folder.
BESIDE = "adapters"


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
    ephemeral_gpu_offload: bool = False
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        device: str | torch.device | int | None,
        key_mapping: Mapping[str, str] | None,
        ephemeral_gpu_offload: bool,
        keywords: dict[str, Any],
    ) -> LoadOptions:
        """From the keywords of a call; of the further ones, `ignore_mismatched_sizes` is not the hub's."""
        ignored = bool(keywords.pop("ignore_mismatched_sizes", False))
        return cls(is_trainable, autocast_adapter_dtype, device, key_mapping, ignored, ephemeral_gpu_offload, keywords)


@dataclass(frozen=True, slots=True)
class Loadable:
    """An adapter that is compiled for a model and whose file fits: nothing but carrying it out is left."""

    plan: InjectionPlan
    source: Source
    report: LoadReport
    #: the adapter by its options alone, where its shapes in `plan` are those of the file
    unfitted: AdapterPlan

    @property
    def adapter(self) -> AdapterPlan:
        """The one adapter."""
        return self.plan.adapters[0]


def opened(
    model_id: str | PathLike[str], config: PeftConfig | None, options: LoadOptions
) -> tuple[PeftConfig, AdapterFile]:
    """Config and weights of an adapter folder, or of a repository of the hub; a config that is given is used itself."""
    if options.ephemeral_gpu_offload:
        what = "`ephemeral_gpu_offload` has no effect: every layer computes where its weights are"
        warn([rules.WITHOUT_EFFECT(what, fix="Leave it out, or move the model to the GPU.")])
    if config is None:
        config = read_config(model_id, **options.hub)
    elif not isinstance(config, PeftConfig):
        what = f"`config` is a {type(config).__name__}, not a `PeftConfig`"
        raise ConfigError(
            rules.BAD_VALUE(what, fix="Leave it out, or make one, e.g. with `PeftConfig.from_pretrained`.")
        )
    file = open_adapter(fspath(model_id), **options.hub)
    if chosen_by(config) is not None and not Path(model_id).is_dir():
        with suppress(PeftcError):  # of the hub, where it may not be
            fetch(fspath(model_id), START_NAME, options.hub.get("subfolder"), options.hub)
    config = _found_beside(config, file.folder)
    config.inference_mode = not options.is_trainable
    return config, file


def _found_beside(config: PeftConfig, folder: Path) -> PeftConfig:
    """The config with the adapters that it weighs read from where it lies itself, for those that were saved along."""
    tuner = default_registry().method_of(config).call_tuner
    if tuner is None:
        return config
    short = (key for key in tuner.needs(config) if len(key.encode("utf-8", "replace")) <= MAX_NAME)
    beside = {key: folder / BESIDE / key for key in short}  # no folder has a longer name
    found = {key: str(path) for key, path in beside.items() if (path / CONFIG_NAME).is_file()}
    return config.model_copy(update={tuner.option: {**tuner.needs(config), **found}})


def loadable(
    model: nn.Module, name: str, config: PeftConfig, file: AdapterFile, options: LoadOptions, mixed: bool = False
) -> Loadable:
    """Compile an adapter for a live model and find its tensors in a file.

    Raises `PeftcError` if one does not fit or none would be loaded; the model is not touched.
    """
    planned = partial(plan_for, model, autocast_adapter_dtype=options.autocast_adapter_dtype, loading=True, mixed=mixed)
    plan = planned(configs={name: config})
    mapping = options.key_mapping
    if mapping is None and not config.is_prompt_learning:  # what the model's class says about its former names
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    if mapping:
        file = file.mapped(mapping)
    read = file
    session = session_of(model) or Session(model, plan.graph or snapshot(model))
    file, former = as_of_now(file, plan.adapters[0], session.graph, config)
    if former.ranks:
        plan = planned(configs={name: with_ranks(plan.adapters[0].config, former.ranks)})
        file, former = as_of_now(read, plan.adapters[0], session.graph, config)
    unfitted = plan.adapters[0]
    plan = replace(plan, adapters=(fitted(unfitted, session.graph, file.tensors), *plan.adapters[1:]))
    vocabulary = vocabulary_facts(session, plan.adapters[0])
    ignored = options.ignore_mismatched_sizes
    report = match_file(plan.adapters[0], file, plan.model, vocabulary, ignored)
    other = identity.told(session, read.folder, config.base_model_name_or_path)
    report = replace(report, diagnostics=(*former.problems, *report.diagnostics, *other)).require()
    device = None if options.device is None else device_of(options.device)

    def find(key: str) -> Tensor | None:
        stored = report.sources.get(key)
        tensor = None if stored is None else file.tensor(stored)
        return tensor if tensor is None or device is None else tensor.to(device)

    return Loadable(plan, with_kept(plan.adapters[0], read.folder, find), report, unfitted)


def needed_sources(plan: InjectionPlan, options: LoadOptions) -> dict[str, Source]:
    """Where the adapters that others weigh are read from. Raises `PeftcError` for one that does not fit."""
    sources: dict[str, Source] = {}
    for adapter in plan.adapters:
        if adapter.needed_by:
            file = open_adapter(adapter.origin)
            if plan.graph is not None:
                file, former = as_of_now(file, adapter, plan.graph, read_config(adapter.origin))
                former.require()
            report = match_file(adapter, file, plan.model, {}, options.ignore_mismatched_sizes).require()
            own = {key: stored for key, stored in report.sources.items() if key not in report.carried}
            sources[adapter.name] = partial(_found, own, file)
    return sources


def _found(sources: Mapping[str, str], file: AdapterFile, key: str) -> Tensor | None:
    stored = sources.get(key)
    return None if stored is None else file.tensor(stored)


def vocabulary_facts(session: Session, plan: AdapterPlan) -> dict[str, TensorFacts]:
    """The base model's embeddings, which a checkpoint of the adapter may carry, by key."""
    return {carried.disk: TensorFacts.of(carried.tensor) for carried in session.base.vocabulary(plan)}
