"""transformers: how the weights of a model are stored in checkpoints, where the live model has them fused or renamed.

transformers 5 loads checkpoints through lists of conversions (`transformers.conversion_mapping`), which it also runs
backwards to save. The names on the other side are those of transformers 4, of published adapters and of their configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from peftc.graph.former import EXPERT, FormerLayers, filled
from peftc.registry.boundary import is_out_of_memory

#: What transformers' conversions raise on tensors that they do not fit, or where a release lacks what is used here.
_UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

#: Sizes of a probe: rows and columns can be divided into 2, 3, 4 or 6 parts.
_EXPERTS, _ROWS, _COLUMNS = 2, 12, 24
#: Layer numbers in probes begin here, so that they are not taken for an expert's.
_FIRST_NUMBER = 7001

_WEIGHT = ".weight"


def former_layers(model: nn.Module, weights: Iterable[tuple[str, str, int]]) -> tuple[FormerLayers, ...]:
    """What the weights of a model of transformers were when its checkpoints were made; those that were the same are left out.

    `weights` are (module path with `*` for numbers, parameter, number of dimensions), one for all modules alike.

    Relies on: `conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)` (5.0.0), which gives what loading
    does as a list of `WeightRenaming` and `WeightConverter` (`core_model_loading`, 5.0.0), scoped to submodels (5.6);
    their `reverse_transform()` and `rename_source_key(key)` (5.0.0). A release or a model without them has no former names.
    """
    try:
        conversions = _conversions(model)
        return tuple(_former(conversions, model, weights)) if conversions else ()
    except _UNFIT as error:
        if is_out_of_memory(error):  # which is no answer of the model's
            raise
        return ()


def is_converted(model: nn.Module, key: str) -> bool:
    """Whether transformers turns what a checkpoint has under this name of a parameter into another tensor, or makes it of others.

    Relies on what `former_layers` does. What cannot be asked counts as converted.
    """
    try:
        names = _Names(_conversions(model))
        return names.now(key) != key or names.is_made(key)
    except _UNFIT as error:
        if is_out_of_memory(error):  # which is no answer of the model's
            raise
        return True


def _conversions(model: nn.Module) -> Sequence[Any]:
    """The model's conversions, without changes of a prefix: those depend on the checkpoint, not on the model."""
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    change = getattr(core_model_loading, "PrefixChange", ())  # since 5.6
    found: Sequence[Any] = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    return [conversion for conversion in found if not isinstance(conversion, change)]


def _former(
    conversions: Sequence[Any], model: nn.Module, weights: Iterable[tuple[str, str, int]]
) -> Iterator[FormerLayers]:
    names = _Names(conversions)
    for module, parameter, dimensions in weights:
        numbers = [str(_FIRST_NUMBER + i) for i in range(module.split(".").count("*"))]
        key = f"{filled(module, numbers)}.{parameter}"
        layers: tuple[str, ...] = ()
        try:
            if dimensions == 3:
                layers = _layers_of_experts(_stored(conversions, model, key), key)
            elif parameter == "weight":
                layers = names.before(key)
            layers = layers if all(names.now(_keyed(layer)) == key for layer in layers) else ()
        except _UNFIT as error:
            if is_out_of_memory(error):  # which is no answer of the model's
                raise
            continue  # a conversion that needs more than one tensor, or sizes of the config: no linear layers, fused
        layers = tuple(_general(layer, numbers) for layer in layers)
        if layers and layers != (module,):
            yield FormerLayers(module, parameter, layers)


class _Names:
    """Renaming of single keys, both ways.

    Relies on the order in which transformers renames: all renamings, then at most one converter; backwards the converter
    first, then the renamings from the last to the first (5.6; before, in the order of the list).
    """

    def __init__(self, conversions: Sequence[Any]) -> None:
        from transformers.core_model_loading import WeightRenaming

        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if not isinstance(c, WeightRenaming)]
        self._back = [c.reverse_transform() for c in reversed(self._renamings)]
        self._converters_back = [c.reverse_transform() for c in self._converters]

    def now(self, key: str) -> str:
        """The live model's name of a tensor in a checkpoint."""
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        for converter in self._converters:
            key, matched = converter.rename_source_key(key)
            if matched is not None:
                break
        return key

    def is_made(self, key: str) -> bool:
        """Whether a converter makes the tensor of this name, of one of the same name too."""
        every = (*self._converters, *self._converters_back)
        return any(converter.rename_source_key(key)[1] is not None for converter in every)

    def before(self, key: str) -> tuple[str, ...]:
        """The former path of a layer whose weight has this name now, empty if more than its name was different."""
        if any(converter.rename_source_key(key)[1] is not None for converter in self._converters_back):
            return ()
        for renaming in self._back:
            key, _ = renaming.rename_source_key(key)
        return (key.removesuffix(_WEIGHT),) if key.endswith(_WEIGHT) else ()


def _stored(conversions: Sequence[Any], model: nn.Module, key: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint that this parameter is made of, for a parameter whose values say their places.

    Relies on `core_model_loading.revert_weight_conversion(model, state_dict)` (5.0.0): what `save_pretrained` uses. Of the
    model it asks the conversions (`_weight_conversions`) and the config.
    """
    from transformers.core_model_loading import revert_weight_conversion

    asked: Any = SimpleNamespace(_weight_conversions=list(conversions), config=model.config)
    stored: Mapping[str, torch.Tensor] = revert_weight_conversion(asked, {key: _probe()})
    return stored


def _probe() -> torch.Tensor:
    return torch.arange(_EXPERTS * _ROWS * _COLUMNS, device="cpu").reshape(_EXPERTS, _ROWS, _COLUMNS)


def _layers_of_experts(stored: Mapping[str, torch.Tensor], key: str) -> tuple[str, ...]:
    """Former paths of one expert's layers, in the order of their rows; empty if they were no linear layers."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    known = {piece for piece in key.split(".") if piece.isdigit()}
    for name, tensor in stored.items():
        pieces = name.split(".")
        indices = [at for at, piece in enumerate(pieces) if piece.isdigit() and piece not in known]
        if len(indices) != 1 or not name.endswith(_WEIGHT) or tensor.dim() != 2:
            return ()
        expert = int(pieces[indices[0]])
        pieces[indices[0]] = EXPERT
        parts.setdefault(".".join(pieces).removesuffix(_WEIGHT), {})[expert] = tensor
    for whole in (_probe(), _probe().transpose(1, 2)):
        ordered = _by_rows(parts, whole)
        if ordered:
            return ordered
    return ()


def _by_rows(parts: Mapping[str, Mapping[int, torch.Tensor]], whole: torch.Tensor) -> tuple[str, ...]:
    """The layers by where their rows are in `whole` (experts, out, in); empty unless each has an equal part of its own."""
    rows = whole.shape[1] // max(len(parts), 1)
    places = {}
    for start in range(0, whole.shape[1], rows):
        wanted = whole[:, start : start + rows]
        for layer, experts in parts.items():
            if sorted(experts) == [*range(_EXPERTS)] and all(torch.equal(t, wanted[e]) for e, t in experts.items()):
                places[start] = layer
    return tuple(places.values()) if len(places) == len(parts) else ()


def _keyed(layer: str) -> str:
    """The key of one expert's weight, or of a single layer's."""
    return layer.replace(EXPERT, "0") + _WEIGHT


def _general(layer: str, numbers: Sequence[str]) -> str:
    """The path with `*` for the numbers that the probe put in. Raises `ValueError` if they are not there, in order."""
    found = re.findall(r"(?:(?<=\.)|^)7\d{3}(?=\.|$)", layer)
    if found != list(numbers):
        raise ValueError(layer)
    return ".".join("*" if piece in numbers else piece for piece in layer.split("."))
