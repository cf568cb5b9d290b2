"""LoRA: a low-rank update beside each frozen weight (Hu et al., arXiv:2106.09685, equation 3).

`ΔW = s · B A`, where the scaling s is `alpha / r`, or `alpha / sqrt(r)` with rank stabilisation (arXiv:2312.03732). Works on
linear layers, embeddings and convolutions; for these A is a lookup table or a convolution of the base's geometry.
"""

from __future__ import annotations

from peftc import plugin as p

from ..starts.corda import CordaConfig, preprocess_corda
from ..starts.eva import EvaConfig, get_eva_state_dict, initialize_lora_eva_weights
from ..starts.loftq import LoftQConfig, replace_lora_weights_loftq
from ..starts.lora_ga import LoraGAConfig, preprocess_loraga
from . import alora, arrow, bdlora, bias, dora, kasa, monteclora, qalora, velora
from .config import LoraConfig, LoraRuntimeConfig, check, check_start
from .functions import (
    convert_to_lora,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
    reduce_intruder_dimension,
    save_as_lora,
)
from .nested import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from .optimizers import OPTIMIZERS
from .plain import GroupedLoraTuner, LoraTuner

_TUNER, _GROUPED = LoraTuner(), GroupedLoraTuner()
#: Each in a file of its own.
VARIANTS = (
    dora.VARIANT,
    bias.VARIANT,
    qalora.VARIANT,
    bdlora.VARIANT,
    velora.VARIANT,
    monteclora.VARIANT,
    kasa.VARIANT,
    alora.VARIANT,
    arrow.VARIANT,
)


def tuner_for(c: LoraConfig, node: p.ModuleNode) -> p.MapTuner[LoraConfig]:
    """The mathematics for a layer."""
    return _GROUPED if node.facts.groups > 1 else _TUNER


peftc_tuner = p.method(
    LoraConfig,
    tuner_for,
    choices=(_TUNER, _GROUPED),
    variants=VARIANTS,
    prefix="lora_",
    layer_names=("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    layer_options=("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias"),
    exports=(
        ArrowConfig,
        BdLoraConfig,
        KasaConfig,
        CordaConfig,
        EvaConfig,
        LoftQConfig,
        LoraGAConfig,
        LoraRuntimeConfig,
        MontecloraConfig,
        VeloraConfig,
        convert_to_lora,
        arrow.create_arrow_model,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        create_riemannian_optimizer,
        get_eva_state_dict,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
        reduce_intruder_dimension,
        replace_lora_weights_loftq,
        save_as_lora,
    ),
    model_methods={"_get_monteclora_loss": monteclora.get_monteclora_loss, "_get_kasa_loss": kasa.get_kasa_loss},
    optimizers=OPTIMIZERS,
    tags=("lora",),
    examples=(
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "use_rslora": True},
        {"r": 4, "init_lora_weights": "gaussian"},
        *(example for variant in VARIANTS for example in variant.examples),
    ),
    example_values=alora.example_values,
    check=check,
    check_start=check_start,
    start_option="init_lora_weights",
    own_starts=("gaussian",),
    identity_at_start=lambda c: c.init_lora_weights is not False and c.arrow_config is None and c.kasa_config is None,
)
