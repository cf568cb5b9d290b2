"""LLaMA-Adapter: upper attention layers also look at trained prompts, through a gate that starts at zero (Zhang et al.,
arXiv:2303.16199, section 3.2). The attention's own keys, values and cache stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftc import plugin as p


@dataclass(frozen=True)
class Attention:
    """An attention that is known: its usual name, layers that it has, and layers that would make it another one."""

    name: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()


_LLAMA = Attention("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))

#: By model type. The reference's list.
ATTENTIONS: Mapping[str, Attention] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": Attention("attn", ("c_attn",), lacks=("q_attn",)),
}


class AdaptionPromptConfig(p.PeftConfig):
    """Options of an adaption prompt, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("ADAPTION_PROMPT")
    target_modules: str | None = None
    """Name of the attention modules, as the end of their paths. Left out: the one that the model's type has."""
    adapter_len: int | None = p.Field(default=None, ge=1)
    """Number of prompt tokens in each adapted attention."""
    adapter_layers: int | None = p.Field(default=None, ge=1)
    """Number of attention layers to adapt, counted from the top."""

    is_adaption_prompt: ClassVar[bool] = True


class AdaptionPromptTuner(p.ModuleTuner[AdaptionPromptConfig]):
    """`y = attention(x) + W_o · g · softmax(q Kᵀ / √d) V`, keys and values `K, V` those of the prompt."""

    inner = "model"

    def resolve(self, c: AdaptionPromptConfig, graph: p.ModuleGraph) -> p.Options:
        known = ATTENTIONS.get(graph.model.model_type or "")
        return {"target_modules": known.name} if known and c.target_modules is None else {}

    def sites(self, c: AdaptionPromptConfig, graph: p.ModuleGraph) -> Mapping[str, str]:
        known = ATTENTIONS.get(graph.model.model_type or "")
        if known is None:
            raise p.PeftcError(_unknown(graph))
        name = c.target_modules or known.name
        found = [node.path for node in graph.nodes if node.path and p.matches({name}, node.path)]
        problems = [problem for path in found if (problem := _misfit(path, known, graph))][:1]
        problems = problems or list(_too_few(c, name, found, graph))
        if problems:
            raise p.PeftcError(problems)
        return dict.fromkeys(found[-(c.adapter_layers or 0) :], name)

    def slots(self, c: AdaptionPromptConfig, node: p.ModuleNode, graph: p.ModuleGraph) -> p.Slots:
        yield p.parameter_slot("adaption_prompt", (1, c.adapter_len or 0, graph.model.dims["hidden_size"]), named=False)
        yield p.parameter_slot("adaption_gate", (1,), named=False)

    def init(self, c: AdaptionPromptConfig, slots: p.Tensors, init: p.SlotInit) -> None:
        init.normal(slots["adaption_prompt"])
        init.zeros(slots["adaption_gate"])

    def forward(self, a: p.ModuleView[AdaptionPromptConfig], args: tuple[Any, ...], kwargs: p.Options) -> Any:
        import torch.nn.functional as F

        y, *rest = a.module(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        read = _joint if "c_attn" in a.module._modules else _apart
        q, k, v = read(a.module, x, a.adaption_prompt.to(x.dtype), args, kwargs)
        k, v = (t.to(q.dtype).expand(q.shape[0], -1, -1, -1) for t in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        seen = (a.adaption_gate * seen).to(x.dtype).transpose(1, 2).flatten(2)
        return (y + _projected(a.module, seen), *rest)


def _apart(
    module: Any, x: p.Tensor, prompt: p.Tensor, args: tuple[Any, ...], kwargs: p.Options
) -> tuple[p.Tensor, p.Tensor, p.Tensor]:
    """Queries `(batch, heads, length, d)` of the input at its positions; keys and values `(1, groups, tokens, d)`."""
    import torch

    cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
    q = _heads(module.q_proj(x), module.head_dim)
    first, second = q.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    q = q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
    return q, _heads(module.k_proj(prompt), module.head_dim), _heads(module.v_proj(prompt), module.head_dim)


def _joint(
    module: Any, x: p.Tensor, prompt: p.Tensor, args: tuple[Any, ...], kwargs: p.Options
) -> tuple[p.Tensor, p.Tensor, p.Tensor]:
    """The same for GPT-2, where one layer makes all three and positions are in the embeddings."""
    q, _, _ = module.c_attn(x).chunk(3, dim=-1)
    _, k, v = module.c_attn(prompt).chunk(3, dim=-1)
    return _heads(q, module.head_dim), _heads(k, module.head_dim), _heads(v, module.head_dim)


def _heads(x: p.Tensor, size: int) -> p.Tensor:
    """`(batch, length, heads · size)` to `(batch, heads, length, size)`."""
    return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


def _projected(module: p.nn.Module, seen: p.Tensor) -> p.Tensor:
    """`W_o seen`. The bias is in the attention's own output; GPT-2 goes without, as in the reference."""
    layer: Any = module._modules.get("o_proj")
    if layer is None:
        return seen
    out: p.Tensor = layer(seen)
    return out if layer.bias is None else out - layer.bias


# problems -------------------------------------------------------------------------------------------------------------


def _unknown(graph: p.ModuleGraph) -> p.Diagnostic:
    of = f"model type `{graph.model.model_type}`" if graph.model.model_type else f"class `{graph.model.cls}`"
    return p.rules.NO_TARGETS(
        f"ADAPTION_PROMPT knows no attention of {of}",
        why="It computes the queries anew, for which it must know how the attention does.",
        fix=f"Use a model of type {', '.join(ATTENTIONS)}, or a method that adapts layers.",
    )


def _misfit(path: str, known: Attention, graph: p.ModuleGraph) -> p.Diagnostic | None:
    missing = [name for name in known.has if f"{path}.{name}" not in graph.by_path]
    strange = [name for name in known.lacks if f"{path}.{name}" in graph.by_path]
    if not missing and not strange:
        return None
    what = f"`{path}` is a {graph.by_path[path].facts.cls}, no attention of the kind that is known"
    told = [f"has no `{name}`" for name in missing] + [f"has `{name}`" for name in strange]
    return p.rules.BAD_TARGET(what, why=f"It {' and '.join(told)}.", fix=_usual(known), where="target_modules")


def _too_few(c: AdaptionPromptConfig, name: str, found: list[str], graph: p.ModuleGraph) -> p.Problems:
    if not found:
        known = ATTENTIONS[graph.model.model_type or ""]
        hint = p.did_you_mean(name, {node.name for node in graph.nodes if not node.name.isdigit()})
        fix = f"{hint} {_usual(known)}".strip()
        yield p.rules.NO_MATCH(f"No module is called `{name}`", fix=fix, where="target_modules")
    elif (c.adapter_layers or 0) > len(found):
        what = f"`adapter_layers` is {c.adapter_layers}, and the model has {len(found)} modules `{name}`"
        yield p.rules.BAD_VALUE(what, why="", fix=f"Set it to {len(found)} at most.", where="adapter_layers")


def _usual(known: Attention) -> str:
    return f"In this type of model the attention is `{known.name}`; leave `target_modules` out."


def check(c: AdaptionPromptConfig) -> p.Problems:
    """Both numbers have to be said."""
    for name, example in (("adapter_len", 10), ("adapter_layers", 30)):
        if getattr(c, name) is None:
            yield p.rules.MISSING_KEY(f"`{name}` is not set", fix=f"Set it, e.g. to {example}.", where=name)


peftc_tuner = p.method(
    AdaptionPromptConfig,
    AdaptionPromptTuner(),
    prefix="adaption_",
    layer_names=("adaption_prompt", "adaption_gate"),
    layer_class="AdaptedAttention",
    examples=({"adapter_len": 3, "adapter_layers": 1},),
    check=check,
)
