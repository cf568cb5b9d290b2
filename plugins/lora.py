"""LoRA: a low-rank update beside each frozen weight (Hu et al., arXiv:2106.09685, equation 3).

`ΔW = s · B A`, where the scaling s is `alpha / r`, or `alpha / sqrt(r)` with rank stabilisation (arXiv:2312.03732). Works on
linear layers, embeddings and convolutions; for these A is a lookup table or a convolution of the base's geometry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from peftc import plugin as p

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from peftc import PeftModel

_T = TypeVar("_T")
#: An option that files of the reference may carry and this version cannot act on; its default means "off".
_NotYet = Annotated[_T, p.Field(description="Not available yet.")]
#: All of these, and those that only say how a fresh adapter begins.
NOT_YET = (
    "use_dora",
    "trainable_token_indices",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "ensure_weight_tying",
)
STARTS_NOT_YET = ("eva_config", "corda_config", "lora_ga_config")
#: Starts that this version makes, and those of the reference that it cannot make but whose trained adapters mean what the
#: factors say. All others change the base's weights as well: their adapters belong to a base that is not the original.
STARTS = (True, False, "gaussian")
STARTS_OF_FACTORS = ("eva", "orthogonal", "mica")


class LoraRuntimeConfig(p.ConfigModel):
    """What describes a run and not the adapter."""

    ephemeral_gpu_offload: bool = False
    """Move weights from main memory to the accelerator where a start is computed from them; no start here is."""


class LoraConfig(p.TargetParametersMixin, p.RankPatternMixin, p.OrientationMixin, p.BiasMixin, p.LayersConfig):
    """Options of a LoRA adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("LORA")
    lora_alpha: int | float = 8
    """Numerator of the scaling `alpha / r`."""
    lora_dropout: p.Dropout = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` instead of `alpha / r`."""
    init_lora_weights: bool | str = True
    """How A starts (B is zero): `true` uniform, `gaussian` normal; `false` starts both at random."""
    alpha_pattern: dict[str, int | float] = p.Field(default_factory=dict)
    """Other numerators for some modules: pattern over the end of the path -> `lora_alpha`."""
    megatron_config: _NotYet[dict[str, Any] | None] = None
    megatron_core: str | None = "megatron.core"
    """Kept for files of the reference."""
    trainable_token_indices: _NotYet[list[int] | dict[str, list[int]] | None] = None
    loftq_config: dict[str, Any] = p.Field(default_factory=dict)
    """Kept for files of the reference."""
    eva_config: _NotYet[dict[str, Any] | None] = None
    corda_config: _NotYet[dict[str, Any] | None] = None
    lora_ga_config: _NotYet[dict[str, Any] | None] = None
    use_dora: _NotYet[bool] = False
    velora_config: _NotYet[dict[str, Any] | None] = None
    alora_invocation_tokens: _NotYet[list[int] | None] = None
    use_qalora: _NotYet[bool] = False
    qalora_group_size: int = 16
    """Kept for files of the reference."""
    monteclora_config: _NotYet[dict[str, Any] | None] = None
    layer_replication: _NotYet[list[list[int]] | None] = None
    runtime_config: LoraRuntimeConfig = p.Field(default_factory=LoraRuntimeConfig, exclude=True)
    """How a run goes about it; never written."""
    lora_bias: _NotYet[bool] = False
    use_bdlora: _NotYet[dict[str, Any] | None] = None
    arrow_config: _NotYet[dict[str, Any] | None] = None
    kasa_config: _NotYet[dict[str, Any] | None] = None
    ensure_weight_tying: _NotYet[bool] = False

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


class LoraTuner(p.MapTuner[LoraConfig]):
    """`y = W x + s · B (A x)`."""

    supports = p.LINEAR_KINDS | p.CONV_KINDS | p.EXPERT_KINDS | {p.Kind.EMBEDDING}
    stacks_experts = True
    dropout_option = "lora_dropout"
    rank_limit = p.RankLimit(most=lambda layer: min(layer.groups**2 * layer.fan_in, layer.out_features))

    def slots(self, c: LoraConfig, layer: p.LayerFacts) -> p.Slots:
        if layer.kind is p.Kind.EMBEDDING:
            yield p.parameter_slot("lora_embedding_A", (c.r, layer.in_features))
            yield p.parameter_slot("lora_embedding_B", (layer.out_features, c.r))
        elif layer.experts:
            yield p.module_slot("lora_A", (c.r * layer.experts, layer.in_features))
            yield p.module_slot("lora_B", (layer.out_features, c.r * layer.experts))
        else:
            first = p.module_slot("lora_A", (c.r, layer.in_features, *layer.kernel))
            yield replace(first, blocks=layer.groups)
            yield p.module_slot("lora_B", (layer.out_features, max(1, c.r // layer.groups), *layer.ones))

    def init(self, c: LoraConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        first, second = slots.values()
        embeds = layer.kind is p.Kind.EMBEDDING
        if c.init_lora_weights is False:
            for factor in (first, second):
                init.normal(factor) if embeds else init.kaiming_uniform(factor)
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
            init.kaiming_uniform(first)
        init.zeros(second)

    def scaling(self, c: LoraConfig, layer: p.LayerFacts) -> float:
        own = c.lora_alpha / (math.sqrt(c.r) if c.use_rslora else c.r)
        counts_twice = layer.kind is p.Kind.LINEAR and layer.cls == "MultiheadAttention"
        return 2 * own if counts_twice else own  # of its output layer: what the reference computes, files of it mean

    def of_rank(self, c: LoraConfig, rank: int) -> LoraConfig:
        plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return c.model_copy(update=plain)

    def of_thin(self, c: LoraConfig, layer: p.LayerFacts, A: p.Tensor, B: p.Tensor) -> p.Tensors:
        first, second = self.slots(c, layer)
        return {first.name: A.reshape(first.shape), second.name: B.reshape(second.shape)}

    def joined(
        self, c: LoraConfig, layer: p.LayerFacts, label: str, experts: Sequence[Sequence[p.Former[p.Tensor] | None]]
    ) -> p.Tensor:
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

    def parted(self, c: LoraConfig, layer: p.LayerFacts, parts: int, slots: p.Tensors) -> Sequence[Sequence[p.Tensors]]:
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

    def check(self, c: LoraConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        if c.r % layer.groups:
            what = f"`{path}` is a convolution of {layer.groups} groups, and a rank of {c.r} is no multiple of them"
            fix = "Set `r`, or a `rank_pattern` for it, to a multiple, or exclude it with `exclude_modules`."
            yield p.rules.BAD_TARGET(what, why="Each group has an equal part of the rank.", fix=fix, where=path)

    def thin(self, a: p.View[LoraConfig]) -> p.Factors:
        if a.layer.kind is p.Kind.EMBEDDING:
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

    supports = p.CONV_KINDS
    beside = "it reads the channels of all groups, and the weight only those of its own"
    additive = False
    thin = p.MapTuner.thin

    def branch(self, a: p.View[LoraConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        return a.up(a.lora_B, a.down(a.lora_A, x)) * a.scaling


_TUNER, _GROUPED = LoraTuner(), GroupedLoraTuner()


def tuner_for(c: LoraConfig, node: p.ModuleNode) -> p.MapTuner[LoraConfig]:
    """The mathematics for a layer."""
    return _GROUPED if node.facts.groups > 1 else _TUNER


def check(c: LoraConfig) -> p.Problems:
    """Options without effect in this version are refused, not ignored: they would change the mathematics."""
    yield from _given(c, NOT_YET)
    if c.init_lora_weights not in (*STARTS, *STARTS_OF_FACTORS):
        yield p.rules.OPTION_NOT_AVAILABLE(
            f"`init_lora_weights` cannot be `{c.init_lora_weights}` in this version",
            why="This start changes the base model's weights, and an adapter trained from it belongs to the changed ones.",
            fix="Use `true`, `false` or `gaussian`. For a trained adapter: set it to `true` if the changed base was saved and is "
            "what you load; otherwise convert it where it was trained (`path_initial_model_for_weight_conversion`).",
            where="init_lora_weights",
        )


def check_start(c: LoraConfig) -> p.Problems:
    """The same of options that matter to a fresh adapter alone."""
    yield from _given(c, STARTS_NOT_YET)
    if c.init_lora_weights in STARTS_OF_FACTORS:
        what = f"`init_lora_weights` cannot be `{c.init_lora_weights}` in this version"
        yield p.rules.OPTION_NOT_AVAILABLE(what, fix="Use `true`, `false` or `gaussian`.", where="init_lora_weights")


def _given(c: LoraConfig, options: tuple[str, ...]) -> p.Problems:
    for option in options:
        if getattr(c, option):
            what = f"`{option}` is not available in this version"
            yield p.rules.OPTION_NOT_AVAILABLE(what, fix=f"Remove `{option}`.", where=option)


def convert_to_lora(
    model: p.nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: p.Options | None = None,
) -> tuple[p.PeftConfig, p.Tensors]:
    """An adapter of any method that changes weights as a LoRA: its config, and its tensors by checkpoint key.

    Each layer's change is replaced by the closest one of the rank, or of the smallest rank that keeps a share of the squared
    singular values, if `rank` is a fraction. Warns of the error; `peftc.convert_adapter` gives it layer by layer.
    `compile_kwargs` is accepted and not needed. Raises `PeftcError`, also a `ValueError` and `TypeError`, for what cannot be
    converted.
    """
    if compile_kwargs is not None:
        p.warn([p.rules.WITHOUT_EFFECT("`compile_kwargs` compiles nothing here", fix="Leave it out.")])
    return p.convert_adapter(model, "LORA", rank, adapter_name, progressbar)


def save_as_lora(
    path: str | PathLike[str],
    model: p.nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: p.Options | None = None,
) -> None:
    """Save what `convert_to_lora` gives, whole or not at all, into a folder that is made if needed."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    p.write_adapter(fspath(path), config, tensors)


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


peftc_tuner = p.method(
    LoraConfig,
    tuner_for,
    choices=(_TUNER, _GROUPED),
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
    check=check,
    check_start=check_start,
    identity_at_start=lambda c: c.init_lora_weights is not False,
)
