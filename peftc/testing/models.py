"""Tiny models that the checks run on: one per kind of base layer, and two language models built from configs.

Weights are seeded, so two builds are equal. `TinyModel.base` says from which config another process can plan the model;
those without are described to it by their graph.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import ModuleGraph
from peftc.integrations.transformers.architecture import quiet as quiet_transformers
from peftc.runtime.applying.snapshot import snapshot


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from this seed inside, the caller's own afterwards.

    Not by `torch.manual_seed`: for each kind of device that is not there it notes the stack of its callers, which takes
    a thousand times as long.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class TinyModel:
    """A model and its inputs. `tolerance` is what rounding explains between two ways to compute in float64. One with
    `parameters` is for methods that adapt these, and not layers."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    tolerance: float = 1e-9
    base: BaseRef | None = None
    parameters: tuple[str, ...] = ()

    @property
    def is_language_model(self) -> bool:
        return self.base is not None

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A fresh one, in evaluation mode, equal to every other."""
        model = copy.deepcopy(self._original)
        return model if dtype is None else model.to(dtype)

    @cached_property
    def _original(self) -> nn.Module:
        with seeded(0), warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            return self.make().eval()

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Keywords of a call, floating-point ones in `dtype`."""
        with seeded(1):
            inputs = self.inputs()
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}

    @cached_property
    def graph(self) -> ModuleGraph:
        return snapshot(self.build())


class Mlp(nn.Module):
    """Linear layers, with and without bias."""

    def __init__(self, ins: int = 12, width: int = 20, outs: int = 4) -> None:
        super().__init__()
        self.lin0 = nn.Linear(ins, width)
        self.lin1 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.lin2 = nn.Linear(width, outs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`."""
        out: Tensor = self.lin2(self.norm(self.lin1(self.lin0(x).relu()).relu()))
        return out


class Conv2dNet(nn.Module):
    """Convolutions over images: padded, strided, grouped, reflecting, dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")
        self.conv1 = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.strided = nn.Conv2d(8, 6, (3, 2), stride=2, dilation=(1, 2), bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 4, H, W)` -> `(N, 3)`."""
        out: Tensor = self.head(self.strided(self.grouped(self.conv1(self.conv0(x).relu())).relu()).mean((-1, -2)))
        return out


class Conv1dNet(nn.Module):
    """A convolution over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 4, L)` -> `(N, 3)`."""
        out: Tensor = self.head(self.conv0(x).relu().mean(-1))
        return out


class Conv3dNet(nn.Module):
    """A convolution over volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv3d(2, 6, (1, 2, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 2, D, H, W)` -> `(N, 3)`."""
        out: Tensor = self.head(self.conv0(x).relu().mean((-1, -2, -3)))
        return out


class EmbeddingNet(nn.Module):
    """An embedding with a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12, padding_idx=0)
        self.lin0 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, L)` ids -> `(N, 4)`."""
        out: Tensor = self.lin0(self.emb(x).mean(1))
        return out


class Stack(nn.Module):
    """Linear maps without bias in one parameter, as fused experts are, stored either way round."""

    def __init__(self, name: str, experts: int, ins: int, outs: int, transposed: bool) -> None:
        super().__init__()
        self.name, self.is_transposed = name, transposed
        shape = (experts, ins, outs) if transposed else (experts, outs, ins)
        self.register_parameter(name, nn.Parameter(torch.randn(shape) / ins**0.5))

    def forward(self, x: Tensor) -> Tensor:
        """`(experts, tokens, in)` -> `(experts, tokens, out)`."""
        weight: Tensor = getattr(self, self.name)
        return x @ (weight if self.is_transposed else weight.mT)


class ExpertsNet(nn.Module):
    """Experts that are stored as one parameter, of different sizes in and out, mixed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up = Stack("lin0", 3, 8, 12, transposed=False)
        self.down = Stack("lin1", 3, 12, 8, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens, 8)` -> `(tokens, 8)`."""
        shares = self.router(x).softmax(-1)
        y: Tensor = self.down(self.up(x.expand(3, *x.shape)).relu())
        return torch.einsum("te,etf->tf", shares, y)


LANGUAGE_MODEL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_GPT2 = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 40, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def language_model(name: str, config: Mapping[str, Any], tolerance: float) -> TinyModel:
    """A language model that transformers builds from a config."""
    base = BaseRef(config=config, task_type="CAUSAL_LM")

    def make() -> nn.Module:
        from peftc.integrations.transformers.base import load_base

        return load_base(base)[0]

    def inputs() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(3, 40, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}

    return TinyModel(name, make, inputs, tolerance, base)


#: One for each kind of layer, the usual one first. Norms of Llama compute in float32 whatever the model's dtype.
MODELS: tuple[TinyModel, ...] = (
    TinyModel("mlp", Mlp, lambda: {"x": torch.randn(2, 3, 12)}),
    TinyModel("conv2d", Conv2dNet, lambda: {"x": torch.randn(2, 4, 9, 9)}),
    TinyModel("conv1d", Conv1dNet, lambda: {"x": torch.randn(2, 4, 11)}),
    TinyModel("conv3d", Conv3dNet, lambda: {"x": torch.randn(2, 2, 3, 4, 4)}),
    TinyModel("embedding", EmbeddingNet, lambda: {"x": torch.randint(1, 20, (3, 5))}),
    TinyModel("experts", ExpertsNet, lambda: {"x": torch.randn(5, 8)}, parameters=("up.lin0", "down.lin1")),
    language_model("llama", LANGUAGE_MODEL, tolerance=1e-5),
    language_model("gpt2", _GPT2, tolerance=1e-9),
)


# one layer of each kind ------------------------------------------------------------------------------------------------


class Alone(nn.Module):
    """Ids through an embedding, one layer that is to be adapted, and a head; with labels it has a loss, as models that are
    trained have."""

    def __init__(
        self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], width: int, reads_ids: bool
    ) -> None:
        super().__init__()
        self.emb = nn.Identity() if reads_ids else nn.Embedding(20, 8)
        self.lin0, self.head = layer, nn.Linear(width, 3)
        self._call = call

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """`(N, L)` ids -> logits `(N, L, 3)`."""
        logits = self.head(self._call(self.lin0, self.emb(input_ids)).tanh())
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def _as_it_is(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _over_space(dims: int, layer: nn.Module, x: Tensor) -> Tensor:
    """Features `(N, L, C)` as channels of a convolution of so many dimensions, all but one of them of size 1."""
    image = x.mT.contiguous()[(..., *[None] * (dims - 1))]
    y: Tensor = layer(image).flatten(2).mT
    return y.contiguous()  # on other strides a linear layer rounds otherwise, once it is frozen


def _by_experts(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x.flatten(0, 1).expand(3, -1, -1)).mean(0)
    return y.unflatten(0, x.shape[:2])


def _attending(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x, x, x, need_weights=False)[0]
    return y


def _transposed() -> nn.Module:
    """The layer of GPT-2, which stores its weight the other way round."""
    model = next(model for model in MODELS if model.name == "gpt2").build()
    cls = type(model.get_submodule("transformer.h.0.attn.c_attn"))
    layer: nn.Module = cls(12, 8)
    nn.init.normal_(layer.get_parameter("weight"), std=0.3)
    return layer


def _alone(
    name: str,
    layer: Callable[[], nn.Module],
    call: Callable[[nn.Module, Tensor], Tensor] = _as_it_is,
    width: int = 12,
    reads_ids: bool = False,
    parameters: tuple[str, ...] = (),
) -> TinyModel:
    def inputs() -> dict[str, Tensor]:
        return {"input_ids": torch.randint(2, 20, (4, 8)), "labels": torch.randint(0, 3, (4, 8))}

    return TinyModel(name, lambda: Alone(layer(), call, width, reads_ids), inputs, parameters=parameters)


#: A model for each kind of layer, with that one layer to adapt, `lin0`.
KINDS: tuple[TinyModel, ...] = (
    _alone("linear", lambda: nn.Linear(8, 12)),
    _alone("transposed", _transposed),
    _alone("embedding", lambda: nn.Embedding(20, 12), reads_ids=True),
    _alone("conv1d", lambda: nn.Conv1d(8, 12, 3, padding=1), partial(_over_space, 1)),
    _alone("conv2d", lambda: nn.Conv2d(8, 12, 3, padding=1), partial(_over_space, 2)),
    _alone("conv3d", lambda: nn.Conv3d(8, 12, 3, padding=1), partial(_over_space, 3)),
    _alone("grouped", lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), partial(_over_space, 2)),
    _alone("experts", lambda: Stack("w", 3, 8, 12, transposed=False), _by_experts, parameters=("lin0.w",)),
    _alone("attention", lambda: nn.MultiheadAttention(8, 2, batch_first=True), _attending, width=8),
)
