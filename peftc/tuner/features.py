"""What can be done with a method, and on which layers: read off its record, for people who choose one.

Nothing is declared twice. The conformance kit holds every entry: what is here works, and what is not is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftc.graph.nodes import EXPERT_KINDS, Kind
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod


@dataclass(frozen=True)
class Feature:
    """One column of the matrix: its name, what it means, and whether a method has it."""

    name: str
    meaning: str
    has: Callable[[TunerMethod], bool]


def _option(name: str) -> Callable[[TunerMethod], bool]:
    return lambda method: name in method.config.model_fields


def _of_kind(kind: Kind) -> Callable[[TunerMethod], bool]:
    reachable = _option("target_parameters") if kind in EXPERT_KINDS else lambda method: True
    return lambda method: kind in method.supports and reachable(method)


def _combines(method: TunerMethod) -> bool:
    return any(tuner.is_rankable or tuner.is_combinable for tuner in method.map_tuners)


def _merges(method: TunerMethod) -> bool:
    return any(tuner.is_mergeable for tuner in method.map_tuners)


def _drops(method: TunerMethod) -> bool:
    return any(t.dropout_option or type(t).dropout is not MapTuner.dropout for t in method.map_tuners)


#: what can be done with adapters of a method. Every method may have several on one model, one of them active.
USES: tuple[Feature, ...] = (
    Feature("together", "several adapters active at once", lambda m: m.adapts_layers),
    Feature("rows", "another adapter for each row of a batch", lambda m: m.adapts_layers),
    Feature("mixed", "beside adapters of other methods", lambda m: m.adapts_layers),
    Feature("merge", "folded into the base weights, and exactly out again", _merges),
    Feature("combine", "several made into one, weighted", _combines),
    Feature("convert", "turned into one of thin factors, with its error", _merges),
    Feature("swap", "values exchanged in place, without compiling again", lambda m: m.adapts_layers),
    Feature("compile", "`torch.compile` sees one graph", lambda m: not m.is_prompt and m.call_tuner is None),
)

#: options that are shared by many methods
OPTIONS: tuple[Feature, ...] = (
    Feature("exclude", "`exclude_modules`", _option("exclude_modules")),
    Feature("layers", "`layers_to_transform`", _option("layers_to_transform")),
    Feature("patterns", "other options for some layers, e.g. `rank_pattern`", lambda m: bool(m.config.pattern_options)),
    Feature("save", "`modules_to_save`", _option("modules_to_save")),
    Feature("bias", "biases of the base trained along", _option("bias")),
    Feature("dropout", "inputs dropped in training", _drops),
)

_LAYERS = {
    Kind.LINEAR: "linear layers",
    Kind.CONV1D_TRANSPOSED: "linear layers stored as (in, out), transformers' `Conv1D`",
    Kind.EMBEDDING: "embeddings",
    Kind.CONV1D: "convolutions over sequences",
    Kind.CONV2D: "convolutions over images",
    Kind.CONV3D: "convolutions over volumes",
    Kind.NORM: "norms",
    Kind.EXPERTS: "single parameters, as the stacked weights of experts (`target_parameters`)",
    Kind.EXPERTS_TRANSPOSED: "those stored as (experts, in, out)",
    Kind.ATTENTION: "torch's `MultiheadAttention`: all of its projections",
    Kind.OTHER: "any module with parameters",
}
#: kinds of layer
KINDS: tuple[Feature, ...] = tuple(Feature(kind.value, _LAYERS[kind], _of_kind(kind)) for kind in Kind)

#: groups of columns, by heading
MATRIX: dict[str, tuple[Feature, ...]] = {"layers": KINDS, "uses": USES, "options": OPTIONS}


def features_of(method: TunerMethod) -> dict[str, dict[str, bool]]:
    """The method's row: group -> feature -> whether it has it."""
    return {group: {feature.name: feature.has(method) for feature in columns} for group, columns in MATRIX.items()}
