"""X-LoRA: a mixture of trained adapters, weighed for each token and layer (Buehler & Buehler, arXiv:2402.07148).

A first pass of the model, adapters off, gives hidden states; a classifier makes coefficients of them; a second pass has
each adapter's update multiplied by its coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain, pairwise, repeat
from typing import Any

from peftc import plugin as p


class XLoraConfig(p.PeftConfig):
    """Options of an X-LoRA adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("XLORA")
    hidden_size: int | None = p.Field(default=None, ge=1)
    """Width of the model's hidden states; left out, it is taken from the model."""
    adapters: dict[str, str] | None = None
    """The adapters to mix: a name for each, and the folder or repository that it is read from."""
    enable_softmax: bool = True
    """Let the coefficients of a token on a layer be shares that sum up to one."""
    enable_softmax_topk: bool = False
    """Make shares of the `top_k_lora` chosen ones instead."""
    layerwise_scalings: bool = False
    """Coefficients for each layer, instead of the same for all."""
    xlora_depth: p.Count = 1
    """Number of the classifier's layers."""
    xlora_size: p.Count = 2048
    """Width of the classifier's hidden layers, of which there are some from a depth of 2 on."""
    xlora_dropout_p: p.Dropout = 0.2
    """Probability of dropping hidden units of the classifier in training."""
    use_trainable_adapters: bool = False
    """Train the adapters along with the classifier."""
    softmax_temperature: float = p.Field(default=1.0, gt=0.0)
    """Divides the logits before the softmax: below 1 sharper, above it flatter."""
    top_k_lora: int | None = p.Field(default=None, ge=1)
    """Use only so many adapters for each token and layer, those with the largest coefficients."""
    scaling_pass_value: float = 0.0
    """The coefficient of all adapters in the first pass."""
    global_scaling_weight: float = 1.0
    """Multiplies every coefficient."""


class XLoraTuner(p.CallTuner[XLoraConfig]):
    """The classifier: linear layers with ReLU between, from hidden states to a logit for each adapter (and layer)."""

    owner = "internal_xlora_classifier"

    def needs(self, c: XLoraConfig) -> Mapping[str, str]:
        return c.adapters or {}

    def trains_needed(self, c: XLoraConfig) -> bool:
        return c.use_trainable_adapters

    def resolve(self, c: XLoraConfig, dims: p.Dims) -> p.Options:
        return {"hidden_size": dims["hidden_size"]} if c.hidden_size is None and "hidden_size" in dims else {}

    def check(self, c: XLoraConfig, dims: p.Dims) -> p.Problems:
        width = dims.get("hidden_size")
        if c.hidden_size is None or c.hidden_size != (width or c.hidden_size):
            what = f"`hidden_size` is {c.hidden_size}, the model's is {width}"
            yield p.rules.BAD_VALUE(what, fix="Set it to the width of the model's hidden states.", where="hidden_size")
        if not c.adapters:
            fix = "Name at least one, with its folder or repository: `{style: path/to/adapter}`."
            yield p.rules.BAD_VALUE("`adapters` names none to mix", fix=fix, where="adapters")
        elif (c.top_k_lora or 0) > len(c.adapters):
            what = f"`top_k_lora` is {c.top_k_lora}, but there are {len(c.adapters)} adapters"
            yield p.rules.BAD_VALUE(what, fix="Choose fewer.", where="top_k_lora")
        if c.enable_softmax_topk and c.top_k_lora is None:
            what = "`enable_softmax_topk` says to normalise the chosen adapters, but all are used"
            yield p.rules.CONTRADICTION(what, fix="Set `top_k_lora`.", where="enable_softmax_topk")

    def slots(self, c: XLoraConfig, layers: int) -> p.Slots:
        wide = len(c.adapters or {}) * (layers if c.layerwise_scalings else 1)
        widths = chain((c.hidden_size or 1,), repeat(c.xlora_size, c.xlora_depth - 1), (wide,))
        for name, (fan_in, fan_out) in zip(_places(c), pairwise(widths), strict=False):
            yield from p.linear_slots("layers", fan_in, fan_out, str(name))

    def init(self, c: XLoraConfig, slots: p.Tensors, init: p.SlotInit) -> None:
        for name in _places(c):  # as a linear layer of torch
            weight = slots[f"layers.{name}.weight"]
            init.kaiming_uniform(weight)
            init.uniform(slots[f"layers.{name}.bias"], 1 / math.sqrt(weight.shape[1]))

    def around(self, a: p.CallView[XLoraConfig], run: p.Run, args: tuple[Any, ...], kwargs: p.Options) -> Any:
        import torch

        c = a.config
        first = {name: value for name, value in kwargs.items() if name != "labels"}
        with torch.no_grad():
            seen = run(
                _first_pass(c, a, args, kwargs), *args, **{**first, "output_hidden_states": True, "return_dict": True}
            )
        scalings = self.scalings(a, seen.hidden_states[-1])
        a.state["latest"] = scalings
        if a.state.get("logging"):
            a.state.setdefault("log", []).append(scalings)
        return run(_chosen(c, scalings) * c.global_scaling_weight, *args, **kwargs)

    def scalings(self, a: p.CallView[XLoraConfig], hidden: p.Tensor) -> p.Tensor:
        """Coefficients `(batch, tokens, layers, adapters)` from hidden states `(batch, tokens, hidden_size)`."""
        import torch.nn.functional as F

        c = a.config
        places = _places(c)
        h = hidden.to(a[f"layers.{places[0]}.weight"].dtype)
        for name in places:
            h = p.linear(a, f"layers.{name}", h)
            if name != places[-1]:
                h = F.dropout(h.relu(), c.xlora_dropout_p, a.training)
        adapters, layers = len(c.adapters or {}), len(a.layers)
        if c.layerwise_scalings:
            h = h.reshape(*h.shape[:-1], layers, adapters)
        else:
            h = h.unsqueeze(2).expand(-1, -1, layers, -1)
        return (h / c.softmax_temperature).softmax(-1) if c.enable_softmax else h


def _places(c: XLoraConfig) -> range:
    """Numbers of the linear layers in the reference's sequence, which counts ReLU and dropout as well."""
    step = 3 if c.xlora_dropout_p > 0 else 2
    return range(0, step * c.xlora_depth, step)


def _chosen(c: XLoraConfig, scalings: p.Tensor) -> p.Tensor:
    """Coefficients with all but the largest of each token and layer at zero, where only some are used."""
    if c.top_k_lora is None:
        return scalings
    import torch

    chosen = torch.zeros_like(scalings, dtype=torch.bool)
    chosen.scatter_(-1, scalings.topk(c.top_k_lora, dim=-1).indices, True)
    kept = scalings * chosen
    if not c.enable_softmax_topk:
        return kept
    on = kept != 0
    return kept.masked_fill(~on, float("-inf")).softmax(-1).masked_fill(~on, 0.0)


def _first_pass(
    c: XLoraConfig, a: p.CallView[XLoraConfig], args: tuple[Any, ...], kwargs: p.Options
) -> float | p.Tensor:
    value = c.scaling_pass_value
    if value == 0.0 or c.top_k_lora is None:
        return value * c.global_scaling_weight
    import torch

    given = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next(tensor for tensor in given if tensor is not None).shape[:2]
    like = a[f"layers.{_places(c)[0]}.weight"]
    constant = torch.full((*tokens, len(a.layers), len(c.adapters or {})), value, dtype=like.dtype, device=like.device)
    return _chosen(c, constant) * c.global_scaling_weight


# methods of the model -------------------------------------------------------------------------------------------------


def set_topk_lora(model: Any, value: int | None) -> None:
    """Use only so many adapters for each token and layer; None for all."""
    model.acting.config.top_k_lora = value


def set_global_scaling_weight(model: Any, weight: float) -> None:
    """Multiply every coefficient by a number."""
    model.acting.config.global_scaling_weight = weight


def get_global_scaling_weight(model: Any) -> float:
    """What every coefficient is multiplied by."""
    weight: float = model.acting.config.global_scaling_weight
    return weight


def set_scaling_pass_value(model: Any, value: float | None) -> None:
    """The coefficient of all adapters in the first pass; None for one divided by their number."""
    config = model.acting.config
    config.scaling_pass_value = 1 / len(config.adapters) if value is None else value


def get_latest_scalings(model: Any) -> p.Tensor | None:
    """The coefficients of the last call, `(batch, tokens, layers, adapters)`; None before the first."""
    latest: p.Tensor | None = model.acting.state.get("latest")
    return latest


def get_scalings_log(model: Any) -> list[p.Tensor]:
    """A list of the coefficients of all calls since logging was enabled."""
    return list(model.acting.state.get("log", ()))


def enable_scalings_logging(model: Any) -> None:
    """Log the coefficients of every call from now on."""
    model.acting.state["logging"] = True


def disable_scalings_logging(model: Any) -> None:
    """Stop logging; what was logged stays."""
    model.acting.state["logging"] = False


def clear_scalings_log(model: Any) -> None:
    """Forget what was logged."""
    model.acting.state.pop("log", None)


def get_bucketed_scalings_log(model: Any) -> dict[int, tuple[list[int], list[p.Tensor]]]:
    """The log by number of tokens: places in the log, and the coefficients there."""
    found: dict[int, tuple[list[int], list[p.Tensor]]] = {}
    for place, scalings in enumerate(get_scalings_log(model)):
        places, tensors = found.setdefault(scalings.shape[1], ([], []))
        places.append(place)
        tensors.append(scalings)
    return found


peftc_tuner = p.method(
    XLoraConfig,
    XLoraTuner(),
    prefix="internal_xlora_classifier",
    model_methods=(
        set_topk_lora,
        set_global_scaling_weight,
        get_global_scaling_weight,
        set_scaling_pass_value,
        get_latest_scalings,
        get_scalings_log,
        enable_scalings_logging,
        disable_scalings_logging,
        clear_scalings_log,
        get_bucketed_scalings_log,
    ),
    examples=({}, {"xlora_depth": 2, "xlora_size": 8, "layerwise_scalings": True, "use_trainable_adapters": True}),
    example_adapters=({"peft_type": "LORA", "r": 2}, {"peft_type": "LORA", "r": 3}),
)
