"""The one module that plugin authors import: the hook marker, configs and mixins, slots, tuners, and the record."""

from pydantic import Field, model_validator

from peftc import rules
from peftc.compiler.match import matches
from peftc.config.base import ConfigModel, PeftConfig
from peftc.config.mixins import LayersMixin, ModulesToSaveMixin, NameList, Names, RankMixin, TargetsMixin
from peftc.config.prompt import PromptLearningConfig
from peftc.config.types import PeftType, TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Rule, Severity, did_you_mean
from peftc.graph.nodes import CONV_KINDS, LINEAR_KINDS, Kind, LayerFacts, ModuleGraph, ModuleNode
from peftc.registry.hookspecs import hookimpl
from peftc.tuner.method import MapTuner, PromptTuner, TunerMethod
from peftc.tuner.modules import ModuleTuner, ModuleView
from peftc.tuner.slots import Container, Slot, module_slot, parameter_slot
from peftc.tuner.views import PromptContext, PromptView, SlotInit, Tensors, View

__all__ = [
    "CONV_KINDS",
    "LINEAR_KINDS",
    "ConfigModel",
    "Container",
    "Diagnostic",
    "Field",
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
    "PeftType",
    "PeftcError",
    "PromptContext",
    "PromptLearningConfig",
    "PromptTuner",
    "PromptView",
    "RankMixin",
    "Rule",
    "Severity",
    "Slot",
    "SlotInit",
    "TargetsMixin",
    "TaskType",
    "Tensors",
    "TunerMethod",
    "View",
    "did_you_mean",
    "hookimpl",
    "matches",
    "model_validator",
    "module_slot",
    "parameter_slot",
    "rules",
]
