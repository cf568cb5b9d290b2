"""The one module that plugin authors import: configs and mixins, slots, tuners, and the record.

    from peftc import plugin as p

is all that a plugin needs of peftc. Names of tensors' types are for annotations: importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from peftc import rules
from peftc.compiler.match import matches
from peftc.config.base import ConfigModel, PeftConfig, PeftConfigMixin
from peftc.config.mixins import (
    AlphaMixin,
    BiasMixin,
    Count,
    Dropout,
    ExpertsMixin,
    InitWeightsMixin,
    LayersConfig,
    LayersMixin,
    ModulesToSaveMixin,
    NameList,
    Names,
    OrientationMixin,
    OwnExclusionsMixin,
    RankMixin,
    RankPatternMixin,
    ReplicationMixin,
    TargetNamesMixin,
    TargetParametersMixin,
    TargetsMixin,
    TiesMixin,
    TokensMixin,
    UpdateDropoutMixin,
    VariantMixin,
)
from peftc.config.optimizers import AdamOptions
from peftc.config.prompt import PromptLearningConfig
from peftc.config.types import PeftType, TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Rule, Severity, did_you_mean, warn
from peftc.graph.nodes import CONV_KINDS, EXPERT_KINDS, LINEAR_KINDS, Kind, LayerFacts, ModuleGraph, ModuleNode, Packed
from peftc.graph.tensors import dtype_name
from peftc.registry.hookspecs import hookimpl
from peftc.registry.manager import default_registry
from peftc.registry.record import method, starting, storing
from peftc.registry.starts import default_starts
from peftc.registry.storages import default_storages
from peftc.registry.variants import variant_key
from peftc.tuner.calls import CallTuner, CallView, Run
from peftc.tuner.layout import to_logical, to_stored
from peftc.tuner.limits import RankLimit
from peftc.tuner.maps import Former, MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.modules import ModuleTuner, ModuleView
from peftc.tuner.optimizer import NamedOptimizer, with_factors, with_factors_alone, with_linear_factors
from peftc.tuner.prompt import Place, PromptTuner
from peftc.tuner.rows import RowsTuner, wrong_rows
from peftc.tuner.slots import (
    Container,
    Share,
    Slot,
    constant_slot,
    derived_slot,
    labelled,
    linear_slots,
    module_slot,
    parameter_slot,
)
from peftc.tuner.start import Begun, Reads, Start, StartView
from peftc.tuner.steps import Changes
from peftc.tuner.storage import Storage
from peftc.tuner.variant import Variant, variant_options
from peftc.tuner.views import PromptContext, PromptView, SlotInit, TensorLists, Tensors, View

if TYPE_CHECKING:
    from torch import Tensor as Tensor
    from torch import nn as nn

    from peftc.integrations.refilling import FactorLayer as FactorLayer
    from peftc.model.functions.gathering import Target

#: What `slots` gives.
Slots = Iterable[Slot]
#: What `check` gives, of a tuner and of a record.
Problems = Iterable[Diagnostic]
#: What `thin` gives: `(A, B, s)`, A `(r, in · kernel)`, B `(out, r)`, of the update `s · B A`.
Factors = tuple["Tensor", "Tensor", float]
#: What `rescaled` gives: `(A, B, s, g)`, g `(out,)`, of the weight `g ∘ (W + s · B A)`.
Rescaled = tuple["Tensor", "Tensor", float, "Tensor"]
#: What `combine` weighs several adapters by, one number for each.
Weights = Sequence[float]
#: Slots by label, as `derive` is handed them.
LabelledSlots = Mapping[str, Slot]
#: Shapes of tensors in a checkpoint: by label, or by key of what a prompt has beside its table.
Shapes = Mapping[str, tuple[int, ...]]
#: Dimensions of a model by name (`hidden_size`, …).
Dims = Mapping[str, int]
#: Options by name.
Options = Mapping[str, Any]


def __getattr__(name: str) -> Any:
    """`Tensor` and `nn`, torch's own, for who evaluates annotations."""
    if name not in ("Tensor", "nn"):
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`", name=name)
    return getattr(import_module("torch"), name)


def register_plugin(plugin: ModuleType | TunerMethod | Callable[[], TunerMethod]) -> TunerMethod:
    """Make a method known to this process without installing it, as in a notebook, and return its record.

    `plugin` is what `method` gives, or a record, or a module with the hook. From then on the method is one like all others, by its PEFT type too; a
    type that is registered already is replaced, for models that are made afterwards. Raises `PeftcError` if the record
    breaks the contract, or its type is that of an installed plugin.
    """
    return default_registry().register(plugin, over=False)


def unregister_plugin(plugin: str | TunerMethod) -> None:
    """Undo `register_plugin`, by PEFT type or record, once no model has adapters of the method any more. Raises `PeftcError`
    if it was not registered so."""
    default_registry().unregister(plugin if isinstance(plugin, str) else plugin.peft_type)


def register_variant(plugin: ModuleType | Variant[Any] | Callable[[], Variant[Any]]) -> Variant[Any]:
    """Make a variant of a method known to this process without installing it, as in a notebook, and return its record; as
    `register_plugin` does with a method. `plugin` is the record, the hook `peftc_variant`, or a module with it."""
    return default_registry().variants.register(plugin, over=False)


def unregister_variant(variant: Variant[Any]) -> None:
    """Undo `register_variant`, once no model has adapters with it any more. Raises `PeftcError` if it was not registered so."""
    default_registry().variants.unregister(variant_key(variant.peft_type, variant.name))


def register_start(record: Start) -> Start:
    """Make a start known to this process without installing it, as in a notebook, and return it. From then on options name it.

    Raises `PeftcError` if it breaks the contract, or its name is that of an installed one.
    """
    return default_starts().register(record, over=False)


def unregister_start(record: str | Start) -> None:
    """Undo `register_start`. Raises `PeftcError` if it was not registered so."""
    default_starts().unregister(record if isinstance(record, str) else record.name)


def register_storage(record: Storage) -> Storage:
    """Make a storage of weights known to this process without installing it, as in a notebook, and return it. Layers of its
    classes are adapted from then on. Raises `PeftcError` if it breaks the contract, or its name is that of an installed one."""
    return default_storages().register(record, over=False)


def unregister_storage(record: str | Storage) -> None:
    """Undo `register_storage`. Raises `PeftcError` if it was not registered so."""
    default_storages().unregister(record if isinstance(record, str) else record.name)


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


def start_targets(model: nn.Module, config: PeftConfig) -> Mapping[str, Target]:
    """The layers of a base model on which an adapter with these options begins by the start that they name, by path: for helpers
    that gather what a start reads. Each has its `module`, `weight` and `rank`, and `gather(name=tensor)` keeps tensors that the
    start then finds as `s.data`. Raises `PeftcError`."""
    from peftc.model.functions.gathering import start_targets as find

    return find(model, config)


def begin_anew(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Let an adapter of a model begin again with other options, as a start does that chooses ranks. Raises `PeftcError`."""
    from peftc.model.functions.gathering import begin_anew as begin

    begin(model, config, adapter_name)


def refill_factors(
    model: nn.Module,
    adapter_name: str,
    find: Callable[[FactorLayer], tuple[Tensor, Tensor] | None],
    keep: Callable[[Any, str], bool] | None = None,
) -> int:
    """Let thin factors of an adapter be those that `find` gives for a layer, with its `path`, `weight`, `stored`, `rank` and
    `scaling`; None leaves a layer. `keep` hears of each. All or nothing; returns for how many layers there were others."""
    from peftc.integrations.refilling import refill

    return refill(model, adapter_name, find, keep)


def base_weights(model: nn.Module, path: str | PathLike[str] | None = None) -> Callable[[str], Tensor]:
    """A function that reads the weight of a layer, by its path in the base model, from the safetensors of the model before it was
    quantised: in a folder or file, or, left out, where the model's config says. Raises `PeftcError`."""
    from peftc.integrations.refilling import base_weights as find

    return find(model, path)


def kept_outputs(count: int, features: float, whole: float, rescale: bool, like: Tensor) -> Tensor | None:
    """Factors `(count,)` of an update's output features in training: `peftc.ops.dropping.kept_outputs`."""
    from peftc.ops import dropping

    return dropping.kept_outputs(count, features, whole, rescale, like)


def drop_outputs(a: View, update: Tensor, dim: int = -1, rescale: bool = True) -> Tensor:
    """An update without what `UpdateDropoutMixin` drops of it in training; its output features lie in dimension `dim`.

    With `rescale` what is left is scaled so that its mean stays.
    """
    if not a.training:
        return update
    from peftc.ops import dropping

    c = a.config
    return dropping.drop_outputs(update, dim, c.rank_dropout, c.module_dropout, rescale)


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of tensors as they are stored: of one that a library makes of others, those of these. They may be on the meta device."""
    from peftc.ops import stored

    return sum(map(stored.bytes_of, tensors))


def columns(A: Tensor, ids: Tensor) -> Tensor:
    """Columns of A `(r, num)` for ids `(...)`, as rows `(..., r)`: what an embedding computes of A."""
    from peftc.ops import plain

    return plain.columns(A, ids)


def linear(a: View | PromptView | CallView, label: str, x: Tensor) -> Tensor:
    """`W x + b` for rows x `(..., in)`, with what `linear_slots` declared: W is `a["<label>.weight"]`, b `a["<label>.bias"]`."""
    from peftc.ops import plain

    return plain.linear(x, a[f"{label}.weight"], a[f"{label}.bias"])


def mean_direction(x: Tensor, count: int) -> Tensor:
    """The mean of all groups of features of inputs `(..., in)`, each divided into `count`; of length one."""
    from peftc.ops import compressed

    return compressed.mean_direction(x, count)


def linear_compressed(x: Tensor, A: Tensor, direction: Tensor, count: int, scale: float) -> Tensor:
    """`x A^T` whose backward keeps of x one number for each of `count` groups of features: `peftc.ops.compressed`."""
    from peftc.ops import compressed

    return compressed.linear_compressed(x, A, direction, count, scale)


def row_norms(weight: Tensor, like: Tensor) -> Tensor:
    """Norms of the rows of a weight `(out, in · kernel)`, in the dtype of another tensor."""
    from peftc.ops import rescaled

    return rescaled.row_norms(weight, like.dtype)


def norms_of_sum(weight: Tensor, norms: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Norms of the rows of `W + s · B A` from those of W `(out,)`, W `(out, in · kernel)`, without a matrix of its size."""
    from peftc.ops import rescaled

    return rescaled.norms_of_sum(weight, norms, A, B, scale)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in single precision at least: in half precision there is no solver and no transform."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ wᵢ Tᵢ` of one tensor or more of the same shape, for `combine`."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total


__all__ = [
    "CONV_KINDS",
    "EXPERT_KINDS",
    "LINEAR_KINDS",
    "AdamOptions",
    "AlphaMixin",
    "Begun",
    "BiasMixin",
    "CallTuner",
    "CallView",
    "Changes",
    "ConfigModel",
    "Container",
    "Count",
    "Diagnostic",
    "Dims",
    "Dropout",
    "ExpertsMixin",
    "Factors",
    "Field",
    "Former",
    "InitWeightsMixin",
    "Kind",
    "LabelledSlots",
    "LayerFacts",
    "LayersConfig",
    "LayersMixin",
    "MapTuner",
    "ModuleGraph",
    "ModuleNode",
    "ModuleTuner",
    "ModuleView",
    "ModulesToSaveMixin",
    "NameList",
    "NamedOptimizer",
    "Names",
    "Options",
    "OrientationMixin",
    "OwnExclusionsMixin",
    "Packed",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "PeftcError",
    "Place",
    "Problems",
    "PromptContext",
    "PromptLearningConfig",
    "PromptTuner",
    "PromptView",
    "RankLimit",
    "RankMixin",
    "RankPatternMixin",
    "Reads",
    "ReplicationMixin",
    "Rescaled",
    "RowsTuner",
    "Rule",
    "Run",
    "Severity",
    "Shapes",
    "Share",
    "Slot",
    "SlotInit",
    "Slots",
    "Start",
    "StartView",
    "Storage",
    "TargetNamesMixin",
    "TargetParametersMixin",
    "TargetsMixin",
    "TaskType",
    "TensorLists",
    "Tensors",
    "TiesMixin",
    "TokensMixin",
    "TunerMethod",
    "UpdateDropoutMixin",
    "Variant",
    "VariantMixin",
    "View",
    "Weights",
    "base_weights",
    "begin_anew",
    "bytes_of",
    "columns",
    "constant_slot",
    "convert_adapter",
    "derived_slot",
    "did_you_mean",
    "drop_outputs",
    "dtype_name",
    "hookimpl",
    "kept_outputs",
    "labelled",
    "linear",
    "linear_compressed",
    "linear_slots",
    "matches",
    "mean_direction",
    "method",
    "model_validator",
    "module_slot",
    "norms_of_sum",
    "parameter_slot",
    "read_adapter",
    "read_weights",
    "refill_factors",
    "register_plugin",
    "register_start",
    "register_storage",
    "register_variant",
    "row_norms",
    "rules",
    "start_targets",
    "starting",
    "storing",
    "to_logical",
    "to_stored",
    "unregister_plugin",
    "unregister_start",
    "unregister_storage",
    "unregister_variant",
    "variant_options",
    "warn",
    "weighted_sum",
    "widened",
    "with_factors",
    "with_factors_alone",
    "with_linear_factors",
    "write_adapter",
    "wrong_rows",
]
