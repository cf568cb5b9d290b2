"""What transformers' own loader needs to put an adapter file into an adapted model: its renamings, made for one adapter.

Built on objects that transformers keeps to itself (checked from 5.18 to 5.24); nothing else in peftc touches them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from peftc.config.base import PeftConfig
from peftc.graph.nodes import Kind, LayerFacts
from peftc.graph.tensors import FactsByName, TensorFacts
from peftc.integrations.transformers.former_loading import former_conversions
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod

_Conversion = WeightConverter | WeightRenaming
#: Features of a layer that slots are declared for to see their names.
_WIDTH = 64


def build_peft_weight_mapping(
    weight_conversions: Sequence[_Conversion] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[_Conversion]:
    """Renamings from keys of an adapter file to names in the model that the adapter was put into.

    The wrapper's prefix goes, the adapter's name comes in after each slot, then the model's own renamings follow.
    Conversions that fuse several base weights into one are for the base weights only and are left out; slots of layers that
    were fused are joined by the adapter's plan, which is known once it was put into the model.
    """
    registry = default_registry()
    if peft_config is not None and peft_config.peft_type is not None:
        prefixes = {registry.method_of(peft_config).prefix}
    else:
        prefixes = {registry.get(name).prefix for name in registry.names}
    slots = [
        WeightRenaming(source_patterns=rf"({re.escape(prefix)}[^\.]*)", target_patterns=rf"\1.{adapter_name}")
        for prefix in sorted(prefixes - {""})
    ]
    former: list[_Conversion] = []
    if peft_config is not None and peft_config.peft_type is not None:
        slots += [
            WeightRenaming(source_patterns=rf"({name}\.{re.escape(adapter_name)})$", target_patterns=rf"\1.{tail}")
            for name, tail in _tails_left_out(registry.method_of(peft_config), peft_config).items()
        ]
    if peft_config is not None:
        former += former_conversions(adapter_name, peft_config)
    own = [conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)]
    wrapper = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    return [*former, *wrapper, *slots, *own]


def _tails_left_out(method: TunerMethod, config: PeftConfig) -> dict[str, str]:
    """Slot -> the tail of its tensor in a model, of those of a variant that a file has without it: as on any linear layer."""
    variant = method.variant_for(config)
    tuners = () if variant is None else variant.tuners
    layer = LayerFacts(
        Kind.LINEAR, "Linear", _WIDTH, _WIDTH, params=FactsByName({"weight": TensorFacts((_WIDTH, _WIDTH), "float32")})
    )
    with boundary(method.peft_type, "slots"):
        slots = [s for tuner in tuners if Kind.LINEAR in tuner.supports for s in tuner.slots(config, layer)]
    return {slot.name: slot.tail for slot in slots if slot.stored_tail == "" and slot.tail}
