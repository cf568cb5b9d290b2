"""Facts about a model's modules, without the model: what the compiler sees instead of tensors.

A `ModuleGraph` is frozen, comes from a live module or from a config on the meta device, and is cached as JSON. Facts that
many modules share (`LayerFacts`) are one object, so that work done per kind of layer is done once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from peftc.graph.former import FormerLayers, FormerNames
from peftc.graph.replication import Replication
from peftc.graph.tensors import (
    PLAIN_DTYPES,
    FactsByName,
    TensorFacts,
    size_of,
    tensors_from_json,
    text_of,
    texts_of,
)

#: Version of the JSON form. Files of version 1, which knew no former names, and of 2, without splits, are read as well.
GRAPH_VERSION = 3
#: Versions that are read.
READABLE = (1, 2, 3)


class Kind(StrEnum):
    """How a module uses its weight. Decides which methods can adapt it and how its weight is stored."""

    LINEAR = "linear"  # `torch.nn.Linear` and its quantised kin: weight (out, in)
    CONV1D_TRANSPOSED = "conv1d_transposed"  # transformers' `Conv1D`: a linear map, weight stored as (in, out)
    EMBEDDING = "embedding"  # `torch.nn.Embedding`: weight (num, dim), a map from ids to vectors
    CONV1D = "conv1d"  # `torch.nn.Conv1d`: weight (out, in / groups, k)
    CONV2D = "conv2d"  # `torch.nn.Conv2d`: weight (out, in / groups, k, k)
    CONV3D = "conv3d"  # `torch.nn.Conv3d`: weight (out, in / groups, k, k, k)
    NORM = "norm"  # norms, torch's and transformers': only their parameters are known, so only `params` serves
    EXPERTS = "experts"  # one parameter of a module: weights (experts, out, in), or a single (out, in)
    EXPERTS_TRANSPOSED = "experts_transposed"  # the same, stored as (experts, in, out)
    ATTENTION = "attention"  # `torch.nn.MultiheadAttention`: what is adapted are its weights, as `EXPERTS` and `LINEAR`
    OTHER = "other"  # any other module: only its parameters are known, as of norms


#: Kinds that `all-linear` means: a method with these serves linear layers however they store their weight.
LINEAR_KINDS = frozenset({Kind.LINEAR, Kind.CONV1D_TRANSPOSED})
#: Convolutions; `a.layer.kernel` and `a.layer.groups` say which.
CONV_KINDS = frozenset({Kind.CONV1D, Kind.CONV2D, Kind.CONV3D})
#: Kinds of which only the parameters are known, not what the layer computes from them.
OPAQUE_KINDS = frozenset({Kind.NORM, Kind.OTHER})
#: Kinds of single parameters, which `target_parameters` means.
EXPERT_KINDS = frozenset({Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED})


class Role(StrEnum):
    """What a module is for, where names and structure tell."""

    Q = "q"
    K = "k"
    V = "v"
    QKV = "qkv"
    O = "o"  # noqa: E741 - the field's name for it
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    ROUTER = "router"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    TOWER = "tower"  # of another sense than text
    CONNECTOR = "connector"  # between a tower and the language model
    TEXT = "text"  # the language model of a model that has other parts


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight `(out, in)` that is not stored as numbers of its own shape: by which storage, with which sizes."""

    #: name of the storage (`peftc.storages`)
    storage: str
    #: columns of the weight
    in_features: int
    #: rows of the weight
    out_features: int
    #: dtype of the weight as it is opened
    dtype: str
    #: all bytes of the weight as it is stored, scales and the like counted
    nbytes: int
    #: whether a call of the layer has a derivative by its input; where it has none, adapters nearer to the model's input learn
    #: nothing through it
    passes_gradients: bool = True


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What a method may know about a layer when it declares its slots: everything but the place.

    `in_features` and `out_features` are those of the logical map whatever the storage: an embedding maps from
    `num_embeddings` to `embedding_dim`, a convolution from `in_channels` to `out_channels` with `kernel` and `groups`.
    `params` and `buffers` (persistent ones) are the module's own by name, in registration order, given as pairs or as a
    mapping. `note` says why a layer that looks like one of the kinds is none of them, e.g. a linear layer with a forward of
    its own. `transposed` says that a module stores the weights of experts as (experts, in, out).

    Facts of a single parameter (`of_parameter`) have that alone in `params`, and how many `experts` it holds.
    """

    #: how the module uses its weight
    kind: Kind
    #: name of the module's class
    cls: str
    #: numbers that go in: an embedding's `num_embeddings`, a convolution's `in_channels`, of all groups
    in_features: int = 0
    #: numbers that come out: an embedding's `embedding_dim`, a convolution's `out_channels`
    out_features: int = 0
    #: size of a convolution's kernel; empty for other layers
    kernel: tuple[int, ...] = ()
    #: groups of a convolution
    groups: int = 1
    #: the module's own parameters by name, in registration order, each with the `shape` and `dtype` that it is stored in; with
    #: a bias `"bias"` is among them
    params: FactsByName = FactsByName()  # noqa: RUF009  # frozen
    #: its persistent buffers, likewise
    buffers: FactsByName = FactsByName()  # noqa: RUF009
    #: why a layer that looks like one of the kinds is none of them, e.g. a linear layer with a forward of its own
    note: str = ""
    #: how many experts a single parameter holds; 0 for what is no such parameter
    experts: int = 0
    #: whether a module stores the weights of experts as (experts, in, out)
    transposed: bool = False
    #: how the weight is stored, where that is in a form of its own; what holds it is not among `params` and `buffers` then
    packed: Packed | None = None

    def __post_init__(self) -> None:
        for name, given in (("params", self.params), ("buffers", self.buffers)):
            if not isinstance(given, FactsByName):
                object.__setattr__(self, name, FactsByName(given))

    def of_parameter(self, name: str) -> LayerFacts | None:
        """Facts of one parameter of the module as maps of their own; None if it has another number of dimensions."""
        tensor = self.params.get(name)
        if tensor is None or len(tensor.shape) not in (2, 3):
            return None
        transposed = self.transposed and len(tensor.shape) == 3
        first, second = tensor.shape[-2:]
        sizes = (first, second) if transposed else (second, first)
        kind = Kind.EXPERTS_TRANSPOSED if transposed else Kind.EXPERTS
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        return LayerFacts(kind, self.cls, *sizes, params=FactsByName({name: tensor}), experts=experts)

    @property
    def weight(self) -> TensorFacts | None:
        """The parameter called `weight`, if there is one."""
        return self.params.get("weight")

    @property
    def has_bias(self) -> bool:
        """Whether there is a parameter called `bias`."""
        return "bias" in self.params

    @property
    def dtype(self) -> str:
        """The dtype of the weight, or of the first parameter of a layer that has none; as it is opened where it is packed."""
        if self.packed is not None:
            return self.packed.dtype
        first = self.weight or next(iter(self.params.values()), None)
        return first.dtype if first else "float32"

    @property
    def fan_in(self) -> int:
        """Numbers that each output is computed from: columns of the weight as a matrix `(out, in · kernel)`."""
        return self.in_features // self.groups * math.prod(self.kernel)

    @property
    def rank(self) -> int:
        """The largest rank that this matrix can have."""
        return min(self.fan_in, self.out_features)

    @property
    def ones(self) -> tuple[int, ...]:
        """The kernel of a convolution of single points, as the second of two factors is; empty for other layers."""
        return (1,) * len(self.kernel)

    @property
    def numel(self) -> int:
        """Parameters of the module itself, children not counted; of a packed weight as many as it has opened."""
        if self.packed is None:
            return sum(tensor.numel for tensor in self.params.values())
        bias = self.params.get("bias")
        return self.in_features * self.out_features + (bias.numel if bias else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of these as they are stored."""
        if self.packed is None:
            return sum(tensor.nbytes for tensor in self.params.values())
        bias = self.params.get("bias")
        return self.packed.nbytes + (bias.nbytes if bias else 0)


@dataclass(frozen=True, slots=True)
class ModuleNode:
    """One module: its place in the model, and its facts."""

    #: dotted path, empty for the model itself
    path: str
    #: facts of the module, one object for all that are alike
    facts: LayerFacts
    #: what the module is for (`q`, `up`, `head`, …), where names and structure tell
    role: Role | None = None
    #: path of the list of blocks that it is in and the index in that, e.g. `("model.layers", 3)`: the first number in the path
    block: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def is_router(self) -> bool:
        """Whether it routes by a weight (experts, hidden) of its own: what was a linear layer and is a class of its own."""
        weight = self.facts.weight
        if self.role is not Role.ROUTER or self.facts.kind is not Kind.OTHER or weight is None:
            return False
        return len(weight.shape) == 2 and weight.dtype in PLAIN_DTYPES  # others are packed

    def of_parameter(self, name: str, facts: LayerFacts) -> ModuleNode:
        """One of the module's parameters, of which these are the facts, as if it were a module."""
        return replace(self, path=f"{self.path}.{name}", facts=facts)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model as a whole. `dims` are numbers of its config (hidden_size, num_hidden_layers, …)."""

    cls: str
    model_type: str | None = None
    name_or_path: str | None = None
    input_embeddings: str | None = None
    output_embeddings: str | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    is_encoder_decoder: bool = False


@dataclass(frozen=True)
class ModuleGraph:
    """All modules of a model, and which parameters share storage."""

    #: facts about the whole: `model.cls`, `model.model_type`, `model.dims` (`hidden_size`, `num_hidden_layers`, …)
    model: ModelFacts
    #: all modules in `named_modules` order, the model itself first
    nodes: tuple[ModuleNode, ...]
    #: groups of full parameter names that are one tensor, the name that `named_parameters` reports first
    ties: tuple[tuple[str, ...], ...] = ()
    #: what weights were in checkpoints, where the model has them fused or under other names
    former: tuple[FormerLayers, ...] = ()
    #: how tensor parallelism would split modules and parameters, a style by name, with `*` for numbers; as the model says
    splits: tuple[tuple[str, str], ...] = ()
    #: which layers are replicas of others; their parameters are in `ties`
    replication: Replication | None = field(default=None, compare=False)

    @cached_property
    def by_path(self) -> Mapping[str, ModuleNode]:
        """The modules by path."""
        return {node.path: node for node in self.nodes}

    @cached_property
    def former_names(self) -> FormerNames:
        """What weights were, found by either name."""
        return FormerNames(self.former)

    @cached_property
    def alias_of(self) -> Mapping[str, str]:
        """Tied parameter name -> the name it is counted under (the first of its group)."""
        return {name: group[0] for group in self.ties for name in group[1:]}

    def parameters(self) -> Iterator[tuple[str, TensorFacts]]:
        """Every parameter once, under the name that `named_parameters` gives it."""
        aliases = self.alias_of
        for node in self.nodes:
            prefix = f"{node.path}." if node.path else ""
            for name, tensor in node.facts.params.items():
                full = prefix + name
                if full not in aliases:
                    yield full, tensor

    @cached_property
    def numel(self) -> int:
        """All parameters, tied ones counted once."""
        aliases = self.alias_of
        tied = {name.rpartition(".")[0] for name in aliases}
        total = 0
        for node in self.nodes:
            if node.path not in tied:
                total += node.facts.numel
                continue
            prefix = f"{node.path}." if node.path else ""
            total += sum(t.numel for n, t in node.facts.params.items() if prefix + n not in aliases)
        return total

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parameters, tied ones counted once; of packed layers those of all that holds the weight."""
        packed = {node.path for node in self.nodes if node.facts.packed is not None}
        plain = sum(tensor.nbytes for name, tensor in self.parameters() if name.rpartition(".")[0] not in packed)
        return plain + sum(node.facts.nbytes for node in self.nodes if node.facts.packed is not None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over structure, shapes, dtypes and ties: what a plan depends on.

        Where the model came from and what is only said for readers (roles, notes, former names, splits) are left out: the
        same model from another folder, or described by a later version, is the same.
        """
        data = self.to_json()
        del data["model"]["name_or_path"]
        del data["former"]
        del data["splits"]
        data["version"] = READABLE[0]  # since when what is left has been as it is
        data["nodes"] = [[path, index] for path, index, _, _ in data["nodes"]]
        data["facts"] = [{key: value for key, value in facts.items() if key != "note"} for facts in data["facts"]]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """JSON types only; layer facts once, referred to by index."""
        table: dict[LayerFacts, int] = {}
        nodes: list[list[Any]] = []
        for node in self.nodes:
            index = table.setdefault(node.facts, len(table))
            nodes.append([node.path, index, node.role and node.role.value, node.block and list(node.block)])
        model = self.model
        return {
            "version": GRAPH_VERSION,
            "model": {
                "cls": model.cls,
                "model_type": model.model_type,
                "name_or_path": model.name_or_path,
                "input_embeddings": model.input_embeddings,
                "output_embeddings": model.output_embeddings,
                "dims": dict(model.dims),
                "is_encoder_decoder": model.is_encoder_decoder,
            },
            "facts": [facts_to_json(facts) for facts in table],
            "nodes": nodes,
            "ties": [list(group) for group in self.ties],
            "former": [[former.module, former.parameter, list(former.layers)] for former in self.former],
            "splits": [list(split) for split in self.splits],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModuleGraph:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on data of another form."""
        if data["version"] not in READABLE:
            raise ValueError(f"graph version {data['version']} is not known")
        table = [facts_from_json(item) for item in data["facts"]]
        nodes = tuple(_node_from_json(row, table) for row in data["nodes"])
        ties = tuple(texts_of(group) for group in data["ties"])
        former = tuple(
            FormerLayers(text_of(at), text_of(name), texts_of(was)) for at, name, was in data.get("former", ())
        )
        if not (nodes and all(ties) and all(known.layers for known in former)):
            raise ValueError("no modules, or names of nothing")
        splits = tuple((text_of(name), text_of(style)) for name, style in data.get("splits", ()))
        made = cls(model_from_json(data["model"]), nodes, ties, former, splits)
        for path in (made.model.input_embeddings, made.model.output_embeddings):
            if path is not None and path not in made.by_path:
                raise ValueError(f"the embeddings `{path}` are no module")
        return made


def facts_to_json(facts: LayerFacts) -> dict[str, Any]:
    """JSON types only. What only some layers have is left out of the others."""
    of_some = {
        "experts": facts.experts,
        "transposed": facts.transposed,
        "packed": facts.packed and asdict(facts.packed),
    }
    return {
        **{name: value for name, value in of_some.items() if value},
        "kind": facts.kind.value,
        "cls": facts.cls,
        "in_features": facts.in_features,
        "out_features": facts.out_features,
        "kernel": list(facts.kernel),
        "groups": facts.groups,
        "params": [[name, list(tensor.shape), tensor.dtype] for name, tensor in facts.params.items()],
        "buffers": [[name, list(tensor.shape), tensor.dtype] for name, tensor in facts.buffers.items()],
        "note": facts.note,
    }


def facts_from_json(data: Mapping[str, Any]) -> LayerFacts:
    """The inverse of `facts_to_json`. Raises `KeyError`, `TypeError` or `ValueError` on data of another form."""
    made = LayerFacts(
        kind=Kind(data["kind"]),
        cls=text_of(data["cls"]),
        in_features=size_of(data["in_features"]),
        out_features=size_of(data["out_features"]),
        kernel=tuple(map(size_of, data["kernel"])),
        groups=size_of(data["groups"]),
        params=FactsByName(tensors_from_json(data["params"])),
        buffers=FactsByName(tensors_from_json(data["buffers"])),
        note=text_of(data["note"]),
        experts=size_of(data.get("experts", 0)),
        transposed=data.get("transposed", False) is True,
        packed=_packed_from_json(data.get("packed")),
    )
    if made.experts and not made.params:
        raise ValueError("experts without a parameter that holds them")
    return made


def _packed_from_json(data: Any) -> Packed | None:
    if data is None:
        return None
    made = Packed(**data)
    texts_of((made.storage, made.dtype))
    for size in (made.in_features, made.out_features, made.nbytes):
        size_of(size)
    if type(made.passes_gradients) is not bool:
        raise ValueError("`passes_gradients` is true or false")
    return made


def model_from_json(data: Mapping[str, Any]) -> ModelFacts:
    """Facts about a model. Raises `TypeError` or `ValueError` on data of another form."""
    made = ModelFacts(**data)
    names = (made.model_type, made.name_or_path, made.input_embeddings, made.output_embeddings)
    texts_of([made.cls, *(name for name in names if name is not None)])
    if not isinstance(made.dims, dict) or any(type(size) is not int for size in made.dims.values()):
        raise ValueError("`dims` are whole numbers by name")
    if type(made.is_encoder_decoder) is not bool:
        raise ValueError("`is_encoder_decoder` is true or false")
    return made


_ROLES: Mapping[str | None, Role | None] = {None: None, **{role.value: role for role in Role}}


def _node_from_json(row: Any, table: list[LayerFacts]) -> ModuleNode:
    path, index, role, block = row
    if type(path) is not str or type(index) is not int or index < 0:
        raise ValueError(f"`{path}` is no module")
    if block is None:
        return ModuleNode(path, table[index], _ROLES[role])
    blocks, number = block
    return ModuleNode(path, table[index], _ROLES[role], (text_of(blocks), size_of(number)))


def block_of(path: str) -> tuple[str, int] | None:
    """The first numbered segment of a path: `model.layers.3.mlp` -> `("model.layers", 3)`."""
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), int(part)
    return None


def suffixes(path: str) -> Iterable[str]:
    """The path and each of its suffixes at a dot, longest first."""
    while True:
        yield path
        _, dot, path = path.partition(".")
        if not dot:
            return
