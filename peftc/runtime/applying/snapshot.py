"""Facts about a live model: one pass over its modules, no tensor data touched, so it works on the meta device as well.

Decides what kind a layer is (by class: a subclass with a forward of its own is not trusted to be what its parent is), and
sees through our own wrappers: an adapted layer counts as its base layer, at the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.former import FormerLayers, starred
from peftc.graph.nodes import Kind, LayerFacts, ModelFacts, ModuleGraph, ModuleNode, Packed, block_of
from peftc.graph.roles import RoleFinder
from peftc.graph.tensors import FactsByName, TensorFacts
from peftc.host import layers, offload
from peftc.host.fused import former_layers
from peftc.host.parallel import split_styles, whole_shape
from peftc.host.torch_modules import computed_by, transient_buffers
from peftc.runtime.around.modules import ModuleWrapper
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.bases.storages import packed_facts, storage_of
from peftc.runtime.layer.wrapper import TunerLayer

#: Kind of a class with exactly this forward. Order matters only for reading.
_FORWARDS: Mapping[type[nn.Module], Kind] = {
    nn.Linear: Kind.LINEAR,
    nn.Embedding: Kind.EMBEDDING,
    nn.Conv1d: Kind.CONV1D,
    nn.Conv2d: Kind.CONV2D,
    nn.Conv3d: Kind.CONV3D,
    nn.MultiheadAttention: Kind.ATTENTION,
}

#: Rank of the weight of each kind: a layer whose `weight` is something else (packed) is not of that kind.
_WEIGHT_RANK: Mapping[Kind, int] = {
    Kind.LINEAR: 2,
    Kind.CONV1D_TRANSPOSED: 2,
    Kind.EMBEDDING: 2,
    Kind.CONV1D: 3,
    Kind.CONV2D: 4,
    Kind.CONV3D: 5,
    Kind.NORM: 1,
}

#: Tensors of lazy layers.
_SHAPELESS = (UninitializedParameter, UninitializedBuffer)

_WRAPPERS = (TunerLayer, ModuleWrapper, ModulesToSaveWrapper)

_NORM_ENDINGS = ("Norm", "Norm1d", "Norm2d", "Norm3d")


def snapshot(model: nn.Module) -> ModuleGraph:
    """The graph of a live model, linear in its modules. Raises `PeftcError` if a lazy layer has no shape yet."""
    inventory = _Inventory()
    walked = list(_walk(model))
    nodes: list[ModuleNode] = []
    facts_of = inventory.facts_of
    paths = {id(module): path for path, module in walked}
    facts = ModelFacts("") if not walked else _model_facts(model, paths)
    roles = RoleFinder(facts.output_embeddings)
    for path, module in walked:
        layer = facts_of(path, module)
        nodes.append(ModuleNode(path, layer, roles.role_of(path, layer), block_of(path)))
    if inventory.lazy:
        raise PeftcError(inventory.lazy)
    return ModuleGraph(facts, tuple(nodes), inventory.ties(), _former(model, nodes), _splits(model))


def layer_facts(module: nn.Module) -> LayerFacts:
    """Facts of one layer, wrappers of ours seen through. Raises `PeftcError` if it is lazy and has no shape yet."""
    inventory = _Inventory()
    facts = inventory.facts_of("", unwrapped(module))
    if inventory.lazy:
        raise PeftcError(inventory.lazy)
    return facts


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own module at this place: what our wrappers, nested ones too, stand for."""
    while True:
        if isinstance(module, TunerLayer):
            module = module.base_layer
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        elif isinstance(module, ModuleWrapper):
            module = module.wrapped
        else:
            return module


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base model: same order, a shared module once, under its first path."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, _WRAPPERS):
            module = unwrapped(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            stack.extend([(prefix + name, child) for name, child in reversed(children.items()) if child is not None])


class _Inventory:
    """Facts interned across modules: equal layers share one `LayerFacts`, and parameters met twice are remembered."""

    def __init__(self) -> None:
        self._facts: dict[Any, LayerFacts] = {}
        self._tensors: dict[tuple[tuple[int, ...], torch.dtype], TensorFacts] = {}
        self._classes: dict[type, tuple[Kind, str]] = {}
        self._names: dict[int, list[str]] = {}
        self.lazy: list[Diagnostic] = []

    def facts_of(self, path: str, module: nn.Module) -> LayerFacts:
        cls = type(module)
        params = self._parameters(path, module) if module._parameters else ()
        buffers = self._buffers(module) if module._buffers else ()
        storage = storage_of(module)
        if storage is not None:  # what holds the weight may lie otherwise after a call: `packed` tells of it
            params, buffers = (tuple(row for row in rows if row[0] not in storage.held) for rows in (params, buffers))
        computed = self._computed(module)
        packed = packed_facts(module)
        key = (cls, params, buffers, module.groups if isinstance(module, _CONVOLUTIONS) else 1, computed, packed)
        facts = self._facts.get(key)
        if facts is None:
            of_params, of_buffers = FactsByName(params), FactsByName(buffers)
            if packed is not None:
                facts = _describe_packed(cls, packed, of_params, of_buffers)
            else:
                kind, note = self._classes.get(cls) or self._classes.setdefault(cls, _kind_of(cls))
                facts = _describe(module, kind, note, of_params, of_buffers, computed)
            self._facts[key] = facts
        return facts

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Names of parameters that are one object, or are brought from one for calls, in the order met."""
        return tuple(tuple(names) for names in self._names.values() if len(names) > 1)

    def _parameters(self, path: str, module: nn.Module) -> tuple[tuple[str, TensorFacts], ...]:
        found = []
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            if isinstance(tensor, _SHAPELESS):
                self.lazy.append(_lazy(path, name))
                continue
            held = offload.held(module, name) if tensor.is_meta else None
            self._names.setdefault(id(tensor) if held is None else held.data_ptr(), []).append(
                f"{path}.{name}" if path else name
            )
            found.append((name, self._tensor(tensor)))
        return tuple(found)

    def _buffers(self, module: nn.Module) -> tuple[tuple[str, TensorFacts], ...]:
        transient = transient_buffers(module)
        return tuple(
            (name, self._tensor(tensor))
            for name, tensor in module._buffers.items()
            if tensor is not None and name not in transient and not isinstance(tensor, _SHAPELESS)
        )

    def _tensor(self, tensor: torch.Tensor) -> TensorFacts:
        key = (whole_shape(tensor), tensor.dtype)
        facts = self._tensors.get(key)
        if facts is None:
            facts = self._tensors[key] = replace(TensorFacts.of(tensor), shape=key[0])
        return facts

    def _computed(self, module: nn.Module) -> TensorFacts | None:
        """The weight of a layer that computes it from other tensors."""
        if "weight" not in computed_by(module):
            return None
        with torch.no_grad():
            weight = module.weight
        return self._tensor(weight) if isinstance(weight, torch.Tensor) else None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _kind_of(cls: type[nn.Module]) -> tuple[Kind, str]:
    """Kind of a class and, when it only looks like one, why it is none."""
    for parent, kind in _FORWARDS.items():
        if issubclass(cls, parent):
            known = layers.is_plain_linear(cls) or layers.is_scaled_embedding(cls)
            if cls.forward is parent.forward or known:
                return kind, ""
            return Kind.OTHER, f"a subclass of {parent.__name__} with a forward of its own"
    if layers.is_transposed_linear(cls):
        return Kind.CONV1D_TRANSPOSED, ""
    return (Kind.NORM, "") if cls.__name__.endswith(_NORM_ENDINGS) else (Kind.OTHER, "")


def _describe_packed(cls: type[nn.Module], packed: Packed, params: FactsByName, buffers: FactsByName) -> LayerFacts:
    sizes = (packed.in_features, packed.out_features)
    return LayerFacts(Kind.LINEAR, cls.__name__, *sizes, params=params, buffers=buffers, packed=packed)


def _describe(
    module: nn.Module,
    kind: Kind,
    note: str,
    params: FactsByName,
    buffers: FactsByName,
    computed: TensorFacts | None,
) -> LayerFacts:
    cls = type(module).__name__
    weight = params.get("weight", computed)
    if isinstance(module, nn.MultiheadAttention) and kind is Kind.ATTENTION:
        return LayerFacts(kind, cls, module.embed_dim, module.embed_dim, params=params, buffers=buffers)
    if kind is Kind.OTHER:
        transposed = layers.stores_transposed(module)
        return LayerFacts(Kind.OTHER, cls, params=params, buffers=buffers, note=note, transposed=transposed)
    if weight is None or len(weight.shape) != _WEIGHT_RANK[kind]:
        held = "no parameter `weight`" if weight is None else f"a weight of shape {list(weight.shape)}"
        return LayerFacts(Kind.OTHER, cls, params=params, buffers=buffers, note=f"a {kind.value} layer with {held}")
    shape = weight.shape
    if kind is Kind.LINEAR:
        sizes = (shape[1], shape[0])
    elif kind is Kind.NORM:
        sizes = (shape[0], shape[0])
    elif isinstance(module, _CONVOLUTIONS):
        sizes = (shape[1] * module.groups, shape[0])
        return LayerFacts(kind, cls, *sizes, kernel=shape[2:], groups=module.groups, params=params, buffers=buffers)
    else:
        sizes = (shape[0], shape[1])
    return LayerFacts(kind, cls, *sizes, params=params, buffers=buffers)


def _lazy(path: str, name: str) -> Diagnostic:
    return rules.LAZY_LAYER(
        f"`{name}` has no shape yet", fix="Run the model once on an example input, then adapt it.", where=path or None
    )


# the model as a whole -------------------------------------------------------------------------------------------------


def _model_facts(model: nn.Module, paths: Mapping[int, str]) -> ModelFacts:
    base = unwrapped(model)
    loaded = cast(Any, base)
    if not layers.is_pretrained(base):  # any model may tell its embeddings as those do
        return ModelFacts(
            type(base).__name__,
            input_embeddings=_embedding_path(lambda: loaded.get_input_embeddings(), paths),
            output_embeddings=_embedding_path(lambda: loaded.get_output_embeddings(), paths),
        )
    config = loaded.config
    return ModelFacts(
        cls=type(base).__name__,
        model_type=config.model_type or None,
        name_or_path=config._name_or_path or None,
        input_embeddings=_embedding_path(loaded.get_input_embeddings, paths),
        output_embeddings=_embedding_path(loaded.get_output_embeddings, paths),
        dims=dims_of(config.to_dict(), getattr(config, "num_hidden_layers", None)),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
    )


def _former(model: nn.Module, nodes: Sequence[ModuleNode]) -> tuple[FormerLayers, ...]:
    """What weights of a model of transformers were when its checkpoints were made."""
    base = unwrapped(model)
    if not layers.is_pretrained(base):
        return ()
    weights = {
        (starred(node.path), name, len(tensor.shape)): None
        for node in nodes
        for name, tensor in node.facts.params.items()
        if node.path and (name == "weight" or len(tensor.shape) == 3)
    }
    return former_layers(base, weights)


def _splits(model: nn.Module) -> tuple[tuple[str, str], ...]:
    base = unwrapped(model)
    return tuple(sorted(split_styles(base).items())) if layers.is_pretrained(base) else ()


def _embedding_path(getter: Callable[[], nn.Module | None], paths: Mapping[int, str]) -> str | None:
    try:
        module = getter()
    except (NotImplementedError, AttributeError):  # a model without a text input or head raises, or has no such method
        return None
    return None if module is None else paths.get(id(unwrapped(module)))


#: dimension -> names that configs have for it, in the order tried
_DIM_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "num_decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "global_head_dim": ("global_head_dim",),
    "num_global_key_value_heads": ("num_global_key_value_heads",),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx"),
}


def dims_of(config: Mapping[str, Any], layers: int | None = None) -> dict[str, int]:
    """Dimensions of the language model, under one name each, from a transformers config as plain data.

    A config of a multimodal model keeps them under `text_config`. `layers` is the number that the live config answers
    with, which knows aliases that the data does not have.
    """
    text = config.get("text_config")
    source: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    dims = {} if layers is None else {"num_hidden_layers": layers}
    for dim, names in _DIM_NAMES.items():
        value = next((source[n] for n in names if isinstance(source.get(n), int)), None)
        if value is not None:
            dims.setdefault(dim, value)
    if source.get("multi_query") and not source.get("new_decoder_architecture"):
        dims["num_key_value_heads"] = 1
    return dims | _widest(source, dims)


def _widest(source: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, int]:
    """Heads of the layers whose keys are widest, where a config gives sizes of single layers."""
    layers = source.get("per_layer_config")
    if not isinstance(layers, Mapping) or "head_dim" not in dims:
        return {}
    options = [layer for layer in layers.values() if isinstance(layer, Mapping)]
    widest = max(options, key=lambda layer: layer.get("head_dim", 0), default={})
    if widest.get("head_dim", 0) <= dims["head_dim"]:
        return {}
    heads = widest.get("num_key_value_heads", dims.get("num_key_value_heads"))
    found = {"global_head_dim": widest["head_dim"], "num_global_key_value_heads": heads}
    return {name: value for name, value in found.items() if isinstance(value, int)}
