"""The one module that plugin authors import: the hook marker, configs and mixins, slots, tuners, and the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from peftc import rules
from peftc.compiler.match import matches
from peftc.config.base import ConfigModel, PeftConfig, PeftConfigMixin
from peftc.config.mixins import (
    ExpertsMixin,
    LayersMixin,
    ModulesToSaveMixin,
    NameList,
    Names,
    RankMixin,
    TargetNamesMixin,
    TargetParametersMixin,
    TargetsMixin,
    UpdateDropoutMixin,
)
from peftc.config.prompt import PromptLearningConfig
from peftc.config.types import PeftType, TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Rule, Severity, did_you_mean, warn
from peftc.graph.nodes import CONV_KINDS, EXPERT_KINDS, LINEAR_KINDS, Kind, LayerFacts, ModuleGraph, ModuleNode
from peftc.registry.hookspecs import hookimpl
from peftc.registry.manager import default_registry
from peftc.tuner.calls import CallTuner, CallView, Run
from peftc.tuner.layout import to_logical, to_stored
from peftc.tuner.method import Former, MapTuner, TunerMethod
from peftc.tuner.modules import ModuleTuner, ModuleView
from peftc.tuner.prompt import Place, PromptTuner
from peftc.tuner.slots import (
    Container,
    Share,
    Slot,
    constant_slot,
    derived_slot,
    labelled,
    module_slot,
    parameter_slot,
)
from peftc.tuner.steps import Changes
from peftc.tuner.views import PromptContext, PromptView, SlotInit, Tensors, View

if TYPE_CHECKING:
    from torch import Tensor, nn


def register_plugin(plugin: ModuleType | TunerMethod) -> TunerMethod:
    """Make a method known to this process without installing it, as in a notebook, and return its record.

    `plugin` is the record, or a module with the hook. From then on the method is one like all others, by its PEFT type too; a
    type that is registered already is replaced, for models that are made afterwards. Raises `PeftcError` if the record
    breaks the contract, or its type is that of an installed plugin.
    """
    return default_registry().register(plugin, over=False)


def unregister_plugin(plugin: str | TunerMethod) -> None:
    """Undo `register_plugin`, by PEFT type or record, once no model has adapters of the method any more. Raises `PeftcError`
    if it was not registered so."""
    default_registry().unregister(plugin if isinstance(plugin, str) else plugin.peft_type)


def read_adapter(folder: str | Path) -> tuple[PeftConfig, Mapping[str, Tensor]]:
    """Config and tensors of an adapter's folder, for functions that a method brings. Raises `PeftcError`."""
    from peftc.checkpoint.load import load_adapter_tensors
    from peftc.config.files import read_config

    return read_config(folder), load_adapter_tensors(folder)


def read_weights(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a file of weights by name, of an adapter's if a folder is named. Raises `PeftcError`."""
    from peftc.checkpoint.load import load_adapter_tensors, open_weights

    return load_adapter_tensors(path) if Path(path).is_dir() else dict(open_weights(Path(path)).items())


def write_adapter(
    folder: str | Path, config: PeftConfig, tensors: Mapping[str, Tensor], *, pickled: bool = False
) -> None:
    """Save an adapter that such a function made, whole or not at all, as `torch.save` does with `pickled`. Raises `PeftcError`."""
    from peftc.checkpoint.save import save_adapter

    save_adapter(folder, tensors, config, pickled=pickled)


def convert_adapter(
    model: nn.Module, to: str, rank: int | float, adapter_name: str = "default", progressbar: bool = False
) -> tuple[PeftConfig, Mapping[str, Tensor]]:
    """Config and tensors of a model's adapter as one of the PEFT type `to`; see `peftc.convert_adapter`."""
    from peftc.model.functions.conversion import convert_adapter as convert

    made = convert(model, to, rank, adapter_name, progressbar)
    return made.config, made.tensors


def kept_outputs(count: int, features: float, whole: float, rescale: bool, like: Tensor) -> Tensor | None:
    """Factors `(count,)` of an update's output features in training: `peftc.ops.dropping.kept_outputs`."""
    from peftc.ops import dropping

    return dropping.kept_outputs(count, features, whole, rescale, like)


__all__ = [
    "CONV_KINDS",
    "EXPERT_KINDS",
    "LINEAR_KINDS",
    "CallTuner",
    "CallView",
    "Changes",
    "ConfigModel",
    "Container",
    "Diagnostic",
    "ExpertsMixin",
    "Field",
    "Former",
    "Kind",
    "LayerFacts",
    "LayersMixin",
    "MapTuner",
    "ModuleGraph",
    "ModuleNode",
    "ModuleTuner",
    "ModuleView",
    "ModulesToSaveMixin",
    "NameList",
    "Names",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "PeftcError",
    "Place",
    "PromptContext",
    "PromptLearningConfig",
    "PromptTuner",
    "PromptView",
    "RankMixin",
    "Rule",
    "Run",
    "Severity",
    "Share",
    "Slot",
    "SlotInit",
    "TargetNamesMixin",
    "TargetParametersMixin",
    "TargetsMixin",
    "TaskType",
    "Tensors",
    "TunerMethod",
    "UpdateDropoutMixin",
    "View",
    "constant_slot",
    "convert_adapter",
    "derived_slot",
    "did_you_mean",
    "hookimpl",
    "kept_outputs",
    "labelled",
    "matches",
    "model_validator",
    "module_slot",
    "parameter_slot",
    "read_adapter",
    "read_weights",
    "register_plugin",
    "rules",
    "to_logical",
    "to_stored",
    "unregister_plugin",
    "warn",
    "write_adapter",
]
