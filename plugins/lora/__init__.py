"""LoRA: a low-rank update beside each frozen weight (Hu et al., arXiv:2106.09685, equation 3).

`ΔW = s · B A`, where the scaling s is `alpha / r`, or `alpha / sqrt(r)` with rank stabilisation (arXiv:2312.03732). Works on
linear layers, embeddings and convolutions; for these A is a lookup table or a convolution of the base's geometry.
"""

from __future__ import annotations

from peftc import plugin as p

from . import alora
from .config import LoraConfig, LoraRuntimeConfig, check, check_start
from .functions import convert_to_lora, create_lorafa_optimizer, create_loraplus_optimizer, save_as_lora
from .plain import GroupedLoraTuner, LoraTuner

_TUNER, _GROUPED, _ALORA = LoraTuner(), GroupedLoraTuner(), alora.ALoraTuner()


def tuner_for(c: LoraConfig, node: p.ModuleNode) -> p.MapTuner[LoraConfig]:
    """The mathematics for a layer."""
    if c.alora_invocation_tokens:
        return _ALORA
    return _GROUPED if node.facts.groups > 1 else _TUNER


def check_all(c: LoraConfig) -> p.Problems:
    """Problems of the options, those of variants among them."""
    yield from check(c)
    yield from alora.check(c)


peftc_tuner = p.method(
    LoraConfig,
    tuner_for,
    choices=(_TUNER, _GROUPED, _ALORA),
    prefix="lora_",
    layer_names=("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    layer_options=("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias"),
    exports=(
        LoraRuntimeConfig,
        convert_to_lora,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        save_as_lora,
    ),
    tags=("lora",),
    examples=({"r": 4, "lora_alpha": 8}, {"r": 4, "use_rslora": True}, {"r": 4, "init_lora_weights": "gaussian"}),
    check=check_all,
    check_start=check_start,
    identity_at_start=lambda c: c.init_lora_weights is not False,
)
