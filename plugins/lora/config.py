"""What a LoRA adapter can be told, and which of it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from peftc import plugin as p

from ..starts.corda import CordaConfig
from ..starts.eva import EvaConfig
from ..starts.loftq import LoftQConfig
from ..starts.lora_ga import LoraGAConfig
from .nested import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

#: Options that choose a variant of the mathematics, for methods that share this config and have none.
OF_VARIANTS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
)
#: Options that say how a start goes about it -> the start that reads them.
OF_STARTS = {"loftq_config": "loftq", "eva_config": "eva", "corda_config": "corda", "lora_ga_config": "lora_ga"}


class LoraRuntimeConfig(p.ConfigModel):
    """What describes a run and not the adapter."""

    ephemeral_gpu_offload: bool = False
    """Taken as in the reference, which computes with weights in main memory on the accelerator while an adapter is made. What
    comes out is the same; here they stay where they are."""


class LoraConfig(
    p.VariantMixin,
    p.TargetParametersMixin,
    p.RankPatternMixin,
    p.OrientationMixin,
    p.BiasMixin,
    p.TokensMixin,
    p.TiesMixin,
    p.ReplicationMixin,
    p.LayersConfig,
):
    """Options of a LoRA adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("LORA")
    lora_alpha: int | float = 8
    """Numerator of the scaling `alpha / r`."""
    lora_dropout: p.Dropout = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead of `alpha / r`."""
    init_lora_weights: bool | str = True
    """How A starts (B is zero): `true` uniform, `gaussian` normal; `false` starts both at random; or the name of a start, such
    as `pissa`, which begins both in a way of its own (`peftc plugins` lists them)."""
    alpha_pattern: dict[str, int | float] = p.Field(default_factory=dict)
    """Other numerators for some modules: pattern over the end of the path -> `lora_alpha`."""
    megatron_config: dict[str, Any] | None = None
    """Options of Megatron's layers, which need the package `megatron-core`. All other layers are adapted as ever."""
    megatron_core: str | None = "megatron.core"
    """Kept for files of the reference."""
    loftq_config: dict[str, Any] = p.Field(default_factory=dict)
    """How `init_lora_weights: loftq` quantises the base: `loftq_bits`, `loftq_iter`."""
    eva_config: EvaConfig | None = None
    """How `init_lora_weights: eva` finds directions and ranks."""
    corda_config: CordaConfig | None = None
    """How `init_lora_weights: corda` finds the components of weights."""
    lora_ga_config: LoraGAConfig | None = None
    """How `init_lora_weights: lora_ga` uses gradients."""
    use_dora: bool = False
    """Train magnitude and direction of each output apart (DoRA, arXiv:2402.09353)."""
    velora_config: VeloraConfig | None = None
    """Keep compressed inputs for backward (VeLoRA, arXiv:2405.17991)."""
    alora_invocation_tokens: list[int] | None = None
    """The ids of an invocation: the update acts from its last one in each row on (aLoRA)."""
    use_qalora: bool = False
    """Let A read means over groups of inputs (QALoRA, arXiv:2309.14717)."""
    qalora_group_size: p.Count = 16
    """Inputs in such a group."""
    monteclora_config: MontecloraConfig | None = None
    """Sample A in training (MonteCLoRA, arXiv:2411.04358)."""
    kasa_config: KasaConfig | None = None
    """Drop the weakest components of the base, and train singular values (KaSA, arXiv:2412.06071)."""
    runtime_config: LoraRuntimeConfig = p.Field(default_factory=LoraRuntimeConfig, exclude=True)
    """How a run goes about it; never written."""
    lora_bias: bool = False
    """Give the update a bias of its own."""
    use_bdlora: BdLoraConfig | None = None
    """Make one of the factors block-diagonal (BD-LoRA)."""
    arrow_config: ArrowConfig | None = None
    """Weigh the other adapters on each layer, token by token, in place of an update of its own (Arrow, arXiv:2405.11157)."""

    @p.model_validator(mode="before")
    @classmethod
    def _as_it_is_written(cls, given: Any) -> Any:
        """`LoftQConfig` is given as an object, and kept as its options, as in the reference."""
        how = given.get("loftq_config") if isinstance(given, dict) else None
        return {**given, "loftq_config": how.model_dump()} if isinstance(how, LoftQConfig) else given

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


def check(c: LoraConfig) -> p.Problems:
    """Options of layers that come with a package which is not there."""
    if c.megatron_config and find_spec("megatron") is None:  # looked for, and not imported
        yield p.rules.DEPENDENCY_MISSING(
            "`megatron_config` is about layers of Megatron, which is not installed",
            why="The adapter belongs to layers that only this package has.",
            fix="Install it, `pip install megatron-core`; or leave the option out where no layer is Megatron's.",
            where="megatron_config",
        )


def check_start(c: LoraConfig) -> p.Problems:
    """Options of starts that the adapter does not begin by."""
    named = str(c.init_lora_weights).lower()
    for option, start in OF_STARTS.items():
        if getattr(c, option) and named != start:
            what = f"`{option}` will be ignored when `init_lora_weights` is not '{start}'"
            yield p.rules.WITHOUT_EFFECT(what, fix=f"Remove it, or set `init_lora_weights: {start}`.", where=option)
