"""Cartridges: keys and values of a text that the model has read, trained further (Eyuboglu et al., arXiv:2506.06266, section 4).

The first tokens stay frozen, as attention sinks. Further functions start an adapter from a cache or a text, and join
adapters one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from peftc import plugin as p

_FROZEN, _TRAINED = "frozen_embedding", "trainable_embedding"
_TABLE = "prompt_embeddings"
_JOINED = "The virtual tokens of all of them are put one after the other."
#: What adapters that are joined must have in common.
_COMMON = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


class CartridgeConfig(p.PromptLearningConfig):
    """Options of a cartridge, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("CARTRIDGE")
    num_frozen_tokens: int = p.Field(default=1, ge=0)
    """How many of the first virtual tokens are not trained."""

    @p.model_validator(mode="after")
    def _some_are_trained(self) -> Self:
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError("`num_frozen_tokens` must be at most `num_virtual_tokens`")
        return self


class CartridgeTuner(p.PromptTuner[CartridgeConfig]):
    """A table with the keys and values of all layers in each row, the first rows frozen."""

    place = p.Place.CACHE

    def slots(self, c: CartridgeConfig, dims: p.Dims) -> p.Slots:
        trained = (c.num_virtual_tokens or 0) - c.num_frozen_tokens
        if c.num_frozen_tokens:
            yield p.parameter_slot(_FROZEN, (c.num_frozen_tokens, c.cache_width), trainable=False)
        if trained:
            yield p.parameter_slot(_TRAINED, (trained, c.cache_width))

    def init(self, c: CartridgeConfig, slots: p.Tensors, context: p.PromptContext) -> None:
        for tensor in slots.values():
            context.init.normal(tensor)

    def embeds(self, c: CartridgeConfig, a: p.PromptView) -> p.Tensor:
        import torch

        return torch.cat([a[label] for label in (_FROZEN, _TRAINED) if label in a])

    def restore(self, c: CartridgeConfig, saved: p.Tensors) -> p.Tensors:
        frozen = c.num_frozen_tokens
        parts = {_FROZEN: saved[_TABLE][:frozen], _TRAINED: saved[_TABLE][frozen:]}
        return {label: part for label, part in parts.items() if len(part)}


# starting from what a model has read ----------------------------------------------------------------------------------


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> p.Tensor:
    """The first tokens of a cache of one sequence as a table, `(num_virtual_tokens, layers · 2 · heads · width)`.

    `past_key_values` is a cache of transformers, or for each layer its keys and values `(1, heads, length, width)`.
    Raises `PeftcError` if the cache is empty, of several sequences, too short, or if its layers differ.
    """
    import torch

    layers = [(layer[0], layer[1]) for layer in past_key_values]
    shapes = {tuple(tensor.shape) for pair in layers for tensor in pair if tensor is not None}
    if len(shapes) != 1 or any(tensor is None for pair in layers for tensor in pair):
        what = f"The cache has layers of the shapes {sorted(shapes)}" if shapes else "The cache is empty"
        raise p.PeftcError(p.rules.TABLE_REFUSED(what, fix="Give the cache of a model whose layers are alike."))
    shape = shapes.pop()
    if len(shape) != 4 or shape[0] != 1:
        what = f"Keys are {shape}, not (1, heads, length, width)"
        raise p.PeftcError(p.rules.TABLE_REFUSED(what, fix="Read one sequence."))
    if shape[2] < num_virtual_tokens:
        what = f"The cache holds {shape[2]} tokens, and {num_virtual_tokens} are needed"
        raise p.PeftcError(p.rules.TABLE_REFUSED(what, fix="Read a longer text, or use fewer virtual tokens."))
    rows = [tensor[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for pair in layers for tensor in pair]
    return torch.cat(rows, dim=1)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> p.Tensor:
    """Start an adapter of keys and values from a cache, and return the table that it now has.

    Raises `PeftcError` if the adapter is of another kind, or the table does not fit.
    """
    encoder = _encoder(model, adapter_name)
    table = prompt_embeddings_from_past_key_values(
        past_key_values, num_virtual_tokens=num_virtual_tokens or encoder.tokens
    ).detach()
    encoder.load_prompt_embeddings(table)
    return table


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> p.Tensor:
    """Start an adapter of keys and values from what the base model keeps of a text, and return the table.

    With a chat template the text is a system message. `max_length` cuts it, in tokens. Raises `PeftcError` as
    `initialize_kv_prefix_from_past_key_values` does.
    """
    import torch

    _encoder(model, adapter_name)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(model.device)
    with torch.no_grad(), model.disable_adapter():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model,
        adapter_name=adapter_name,
        past_key_values=out.past_key_values,
        num_virtual_tokens=num_virtual_tokens,
    )


def _encoder(model: Any, adapter_name: str | None) -> Any:
    """The adapter's encoder, if it holds keys and values."""
    name = adapter_name or model.active_adapter
    model.session.require([name])
    encoders = model.prompt_encoder or {}
    if name not in encoders or not encoders[name].place.is_cache:
        what = f"`{name}` does not add keys and values"
        raise p.PeftcError(p.rules.TABLE_REFUSED(what, fix="Name an adapter whose virtual tokens are in the cache."))
    return encoders[name]


# joining --------------------------------------------------------------------------------------------------------------


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Save adapters one after the other as one. The first one's frozen tokens stay frozen. Without `safe_serialization` the file
    is what `torch.save` writes.

    Raises `PeftcError` if there are fewer than two, one is no cartridge, or they are of different models.
    """
    import torch

    if len(adapter_paths) < 2:
        raise p.PeftcError(
            p.rules.TABLE_REFUSED("There is nothing to join", why=_JOINED, fix="Name two adapters or more.")
        )
    found = [(path, *p.read_adapter(path)) for path in adapter_paths]
    first = found[0][1]
    for path, config, tensors in found:
        if not isinstance(config, CartridgeConfig) or _TABLE not in tensors:
            what = f"`{path}` is a {config.peft_type}, not a cartridge"
            raise p.PeftcError(p.rules.TABLE_REFUSED(what, why=_JOINED, fix="Name cartridges only."))
        other = [name for name in _COMMON if getattr(config, name) != getattr(first, name)]
        if other:
            what = f"`{path}` has another `{other[0]}` than `{adapter_paths[0]}`"
            raise p.PeftcError(p.rules.TABLE_REFUSED(what, why=_JOINED, fix="Join adapters of one model."))
    table = torch.cat([tensors[_TABLE] for _, _, tensors in found])
    config = first.model_copy(update={"num_virtual_tokens": len(table)})
    p.write_adapter(output_path, config, {_TABLE: table}, pickled=not safe_serialization)


peftc_tuner = p.method(
    CartridgeConfig,
    CartridgeTuner(),
    prefix="cartridge_",
    encoder_class="CartridgeEncoder",
    exports=(
        compose_cartridge_adapters,
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
        prompt_embeddings_from_past_key_values,
    ),
    examples=({"num_virtual_tokens": 4, "num_frozen_tokens": 1},),
)
