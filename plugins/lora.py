"""LoRA: a low-rank update `ΔW = s · B A` beside a frozen weight (Hu et al., arXiv:2106.09685, equation 3).

Scaling is `alpha / r`, or `alpha / sqrt(r)` with rank stabilisation (arXiv:2312.03732). Works on linear layers,
embeddings and convolutions; for these A is a lookup table or a convolution of the base's geometry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftc.plugin import (
    CONV_KINDS,
    EXPERT_KINDS,
    LINEAR_KINDS,
    ConfigModel,
    Diagnostic,
    Field,
    Former,
    Kind,
    LayerFacts,
    LayersMixin,
    MapTuner,
    ModuleNode,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    RankMixin,
    Slot,
    SlotInit,
    TargetParametersMixin,
    TargetsMixin,
    TunerMethod,
    View,
    convert_adapter,
    hookimpl,
    module_slot,
    parameter_slot,
    rules,
    warn,
    write_adapter,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from peftc import PeftModel

#: Options that files of the reference may carry and this version cannot act on, with the value that means "off".
NOT_YET: Mapping[str, Any] = {
    "use_dora": False,
    "trainable_token_indices": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "megatron_config": None,
    "ensure_weight_tying": False,
}
#: The same of options that only say how a fresh adapter begins.
STARTS_NOT_YET: Mapping[str, Any] = {"eva_config": None, "corda_config": None, "lora_ga_config": None}
#: Starts that this version makes, and those of the reference that it cannot make but whose trained adapters mean what the
#: factors say. All others change the base's weights as well: their adapters belong to a base that is not the original.
STARTS = (True, False, "gaussian")
STARTS_OF_FACTORS = ("eva", "orthogonal", "mica")


class LoraRuntimeConfig(ConfigModel):
    """What describes a run and not the adapter."""

    ephemeral_gpu_offload: bool = False
    """Move weights from main memory to the accelerator where a start is computed from them; no start here is."""


class LoraConfig(TargetsMixin, TargetParametersMixin, LayersMixin, RankMixin, ModulesToSaveMixin, PeftConfig):
    """Options of a LoRA adapter, named as in the reference."""

    peft_type: PeftType | None = PeftType("LORA")
    lora_alpha: int | float = 8
    """Numerator of the scaling `alpha / r`."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping inputs of the update in training."""
    fan_in_fan_out: bool = False
    """Whether the adapted layers store their weight as (in, out); set by itself where they do."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base model to train along: none, all, or those of adapted layers."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead of `alpha / r`."""
    init_lora_weights: bool | str = True
    """How A starts (B is zero): `true` uniform, `gaussian` normal; `false` starts both at random."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules: pattern over the end of the path -> `r`."""
    alpha_pattern: dict[str, int | float] = Field(default_factory=dict)
    """Other numerators for some modules: pattern over the end of the path -> `lora_alpha`."""
    megatron_config: dict[str, Any] | None = None
    """Not available yet."""
    megatron_core: str | None = "megatron.core"
    """Kept for files of the reference."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Not available yet."""
    loftq_config: dict[str, Any] = Field(default_factory=dict)
    """Kept for files of the reference."""
    eva_config: dict[str, Any] | None = None
    """Not available yet."""
    corda_config: dict[str, Any] | None = None
    """Not available yet."""
    lora_ga_config: dict[str, Any] | None = None
    """Not available yet."""
    use_dora: bool = False
    """Not available yet."""
    velora_config: dict[str, Any] | None = None
    """Not available yet."""
    alora_invocation_tokens: list[int] | None = None
    """Not available yet."""
    use_qalora: bool = False
    """Not available yet."""
    qalora_group_size: int = 16
    """Kept for files of the reference."""
    monteclora_config: dict[str, Any] | None = None
    """Not available yet."""
    layer_replication: list[list[int]] | None = None
    """Not available yet."""
    runtime_config: LoraRuntimeConfig = Field(default_factory=LoraRuntimeConfig, exclude=True)
    """How a run goes about it; never written."""
    lora_bias: bool = False
    """Not available yet."""
    use_bdlora: dict[str, Any] | None = None
    """Not available yet."""
    arrow_config: dict[str, Any] | None = None
    """Not available yet."""
    kasa_config: dict[str, Any] | None = None
    """Not available yet."""
    ensure_weight_tying: bool = False
    """Not available yet."""

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


class LoraTuner(MapTuner[LoraConfig]):
    """`y = W x + s · B (A x)`."""

    supports = LINEAR_KINDS | CONV_KINDS | EXPERT_KINDS | {Kind.EMBEDDING}
    stacks_experts = True

    def slots(self, c: LoraConfig, layer: LayerFacts) -> Iterable[Slot]:
        if layer.kind is Kind.EMBEDDING:
            yield parameter_slot("lora_embedding_A", (c.r, layer.in_features))
            yield parameter_slot("lora_embedding_B", (layer.out_features, c.r))
        elif layer.experts:
            yield module_slot("lora_A", (c.r * layer.experts, layer.in_features))
            yield module_slot("lora_B", (layer.out_features, c.r * layer.experts))
        else:
            ones = (1,) * len(layer.kernel)
            first = module_slot("lora_A", (c.r, layer.in_features, *layer.kernel))
            yield replace(first, blocks=layer.groups)
            yield module_slot("lora_B", (layer.out_features, max(1, c.r // layer.groups), *ones))

    def init(self, c: LoraConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        first, second = slots.values()
        embeds = layer.kind is Kind.EMBEDDING
        if c.init_lora_weights is False:
            for factor in (first, second):
                init.normal(factor) if embeds else init.kaiming_uniform(factor, math.sqrt(5))
            return
        for factor in (first, second):  # the reference's modules draw once when they are made, and A again
            init.skip_normal(factor) if embeds else init.skip_uniform(factor)
        if embeds:
            init.zeros(first)
            init.normal(second)
            return
        if c.init_lora_weights == "gaussian":
            init.normal(first, std=1 / c.r)
        else:
            init.kaiming_uniform(first, math.sqrt(5))
        init.zeros(second)

    def scaling(self, c: LoraConfig, layer: LayerFacts) -> float:
        own = c.lora_alpha / (math.sqrt(c.r) if c.use_rslora else c.r)
        counts_twice = layer.kind is Kind.LINEAR and layer.cls == "MultiheadAttention"
        return 2 * own if counts_twice else own  # of its output layer: what the reference computes, files of it mean

    def of_rank(self, c: LoraConfig, rank: int) -> LoraConfig:
        plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return c.model_copy(update=plain)

    def of_thin(self, c: LoraConfig, layer: LayerFacts, A: Tensor, B: Tensor) -> Mapping[str, Tensor]:
        first, second = self.slots(c, layer)
        return {first.name: A.reshape(first.shape), second.name: B.reshape(second.shape)}

    def joined(
        self, c: LoraConfig, layer: LayerFacts, label: str, experts: Sequence[Sequence[Former[Tensor] | None]]
    ) -> Tensor:
        """`A` of layers joined by rows under each other, `B` block-diagonal; ranks that are left over are zero."""
        first = next(former.value for expert in experts for former in expert if former is not None)
        held = first.new_zeros(layer.experts, c.r, layer.in_features)
        is_second = label.startswith("lora_B")
        if is_second:
            held = first.new_zeros(layer.experts, layer.out_features, c.r)
        for expert, parts in zip(held, experts, strict=True):
            at, rows = 0, layer.out_features // len(parts)
            for part, former in enumerate(parts):
                if former is None:
                    continue
                end = at + former.value.shape[1 if is_second else 0]
                if is_second:
                    value = former.value if former.ratio == 1 else former.value * former.ratio
                    expert[part * rows : (part + 1) * rows, at:end] = value
                else:
                    expert[at:end] = former.value
                at = end
        return held.permute(1, 2, 0).flatten(1) if is_second else held.flatten(0, 1)

    def parted(
        self, c: LoraConfig, layer: LayerFacts, parts: int, slots: Mapping[str, Tensor]
    ) -> Sequence[Sequence[Mapping[str, Tensor]]]:
        """Each part's rows of `B`, with all of `A`; with the part's own rank alone where `B` is block-diagonal."""
        first, second = self.slots(c, layer)
        A = slots[first.name].reshape(layer.experts, -1, layer.in_features)
        B = slots[second.name].reshape(layer.out_features, -1, layer.experts).permute(2, 0, 1)
        rank, rows = A.shape[1], layer.out_features // parts
        blocks = B.reshape(layer.experts, parts, rows, rank)
        own = rank // parts if rank % parts == 0 else rank
        beyond = blocks.clone()
        for part in range(parts):
            beyond[:, part, :, part * own : (part + 1) * own] = 0
        diagonal = own < rank and not bool(beyond.any())
        spans = [slice(part * own, (part + 1) * own) if diagonal else slice(None) for part in range(parts)]
        return [
            [{first.name: A[e, span], second.name: blocks[e, part, :, span]} for part, span in enumerate(spans)]
            for e in range(layer.experts)
        ]

    def dropout(self, c: LoraConfig) -> float:
        return c.lora_dropout

    def check(self, c: LoraConfig, layer: LayerFacts, path: str) -> Iterable[Diagnostic]:
        if c.r % layer.groups:
            yield rules.BAD_TARGET(
                f"`{path}` is a convolution of {layer.groups} groups, and a rank of {c.r} is no multiple of them",
                why="Each group has an equal part of the rank.",
                fix="Set `r`, or a `rank_pattern` for it, to a multiple, or exclude it with `exclude_modules`.",
                where=path,
            )
        limit = min(layer.groups * layer.in_features * math.prod(layer.kernel), layer.out_features)
        if c.r > limit:
            yield rules.RANK_BEYOND_LAYER(
                f"Rank {c.r} is beyond what `{path}` can have ({limit})",
                fix=f"Set `r`, or a `rank_pattern` for it, to at most {limit}.",
                where=path,
            )

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        if a.layer.kind is Kind.EMBEDDING:
            return a.lora_embedding_A, a.lora_embedding_B, a.scaling
        if a.layer.experts:  # experts follow each other in A, and alternate in B
            A = a.lora_A.reshape(a.layer.experts, -1, a.layer.in_features)
            B = a.lora_B.reshape(a.layer.out_features, -1, a.layer.experts)
            return A, B.permute(2, 0, 1), a.scaling
        return a.lora_A, a.lora_B, a.scaling


class GroupedLoraTuner(LoraTuner):
    """The same on a convolution of several groups, as the reference has it: `A` reads all channels, and each group of
    outputs has an equal part of the rank for itself. The layer's own weight has only the channels of its group for each
    output, so that the update is beside it and not in it."""

    supports = CONV_KINDS
    beside = "it reads the channels of all groups, and the weight only those of its own"
    additive = False
    thin = MapTuner.thin

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        return a.up(a.lora_B, a.down(a.lora_A, x)) * a.scaling


_TUNER, _GROUPED = LoraTuner(), GroupedLoraTuner()


def tuner_for(c: LoraConfig, node: ModuleNode) -> MapTuner[LoraConfig]:
    """The mathematics for a layer."""
    return _GROUPED if node.facts.groups > 1 else _TUNER


def check(c: LoraConfig) -> Iterable[Diagnostic]:
    """Options without effect in this version are refused, not ignored: they would change the mathematics."""
    for option, off in NOT_YET.items():
        if getattr(c, option) not in (off, {}, []):
            yield rules.OPTION_NOT_AVAILABLE(
                f"`{option}` is not available in this version", fix=f"Remove `{option}`.", where=option
            )
    if c.init_lora_weights not in (*STARTS, *STARTS_OF_FACTORS):
        yield rules.OPTION_NOT_AVAILABLE(
            f"`init_lora_weights` cannot be `{c.init_lora_weights}` in this version",
            why="This start changes the base model's weights, and an adapter trained from it belongs to the changed ones.",
            fix="Use `true`, `false` or `gaussian`. For a trained adapter: set it to `true` if the changed base was saved and is "
            "what you load; otherwise convert it where it was trained (`path_initial_model_for_weight_conversion`).",
            where="init_lora_weights",
        )


def check_start(c: LoraConfig) -> Iterable[Diagnostic]:
    """The same of options that matter to a fresh adapter alone."""
    for option, off in STARTS_NOT_YET.items():
        if getattr(c, option) not in (off, {}):
            yield rules.OPTION_NOT_AVAILABLE(
                f"`{option}` is not available in this version", fix=f"Remove `{option}`.", where=option
            )
    if c.init_lora_weights in STARTS_OF_FACTORS:
        yield rules.OPTION_NOT_AVAILABLE(
            f"`init_lora_weights` cannot be `{c.init_lora_weights}` in this version",
            fix="Use `true`, `false` or `gaussian`.",
            where="init_lora_weights",
        )


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PeftConfig, Mapping[str, Tensor]]:
    """An adapter of any method that changes weights as a LoRA: its config, and its tensors by checkpoint key.

    Each layer's change is replaced by the closest one of the rank, or of the smallest rank that keeps a share of the squared
    singular values, if `rank` is a fraction. Warns of the error; `peftc.convert_adapter` gives it layer by layer.
    `compile_kwargs` is accepted and not needed. Raises `PeftcError`, also a `ValueError` and `TypeError`, for what cannot be
    converted.
    """
    if compile_kwargs is not None:
        warn([rules.WITHOUT_EFFECT("`compile_kwargs` compiles nothing here", fix="Leave it out.")])
    return convert_adapter(model, "LORA", rank, adapter_name, progressbar)


def save_as_lora(
    path: str | PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Save what `convert_to_lora` gives, whole or not at all, into a folder that is made if needed."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    write_adapter(fspath(path), config, tensors)


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """LoRA+: an optimiser of that class, in which B learns `loraplus_lr_ratio` times as fast as A.

    `loraplus_lr_embedding` is the step size of adapters of embeddings, 1e-6 if left out, and `loraplus_weight_decay` the
    decay of all but biases and norms; further keywords go to the class.
    """
    from peftc import two_rate_optimizer

    own = {"loraplus_lr_embedding": "embedding_lr", "loraplus_weight_decay": "decay"}
    given = {own.get(name, name): value for name, value in kwargs.items()}
    return two_rate_optimizer(model, optimizer_cls, lr, loraplus_lr_ratio, **given)


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA: A is frozen, and B moves by AdamW so that `B A` follows the gradient of the full weight.

    `r`, `lora_alpha` and `use_rslora` are arguments of the reference: what counts is each layer's own scaling, and one that
    is given and differs from a config is warned of. Raises `PeftcError` for adapters of stacked experts.
    """
    from peftc import projected_optimizer

    return projected_optimizer(model, lr, weight_decay, r=r, lora_alpha=lora_alpha, use_rslora=use_rslora)


@hookimpl
def peftc_tuner() -> TunerMethod:
    return TunerMethod(
        "LORA",
        LoraConfig,
        tuner_for,
        choices=(_TUNER, _GROUPED),
        prefix="lora_",
        layer_names=("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        layer_options={name: name for name in ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")},
        layer_dropout="lora_dropout",
        model_class="LoraModel",
        layer_class="LoraLayer",
        exports={
            "LoraRuntimeConfig": LoraRuntimeConfig,
            "convert_to_lora": convert_to_lora,
            "create_lorafa_optimizer": create_lorafa_optimizer,
            "create_loraplus_optimizer": create_loraplus_optimizer,
            "save_as_lora": save_as_lora,
        },
        default_targets={"target_modules": "lora"},
        summary="A low-rank update beside each frozen weight.",
        paper="arXiv:2106.09685",
        tags=("lora",),
        examples=({"r": 4, "lora_alpha": 8}, {"r": 4, "use_rslora": True}, {"r": 4, "init_lora_weights": "gaussian"}),
        check=check,
        check_start=check_start,
        identity_at_start=lambda c: c.init_lora_weights is not False,
    )
