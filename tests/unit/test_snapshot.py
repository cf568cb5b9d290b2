"""Facts of live modules: kinds, sizes, shared parameters, our wrappers seen through, time linear in modules."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from peftc.diagnostics import PeftcError
from peftc.graph.nodes import Kind
from peftc.runtime.applying.snapshot import dims_of, layer_facts, snapshot, unwrapped
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.layer.wrapper import TunerLayer


class Grouped(nn.Linear):
    """A linear layer by inheritance that is none in effect."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).mean(-2) @ self.weight.T[: self.in_features // 2]


class Scaled(nn.Embedding):
    """An embedding that is not a lookup alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class Renamed(nn.Linear):
    """A subclass that computes what its parent does."""


class TinyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))


class Doubling(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


@pytest.mark.parametrize(
    ("module", "kind", "sizes"),
    [
        (nn.Linear(3, 5), Kind.LINEAR, (3, 5)),
        (Renamed(3, 5, bias=False), Kind.LINEAR, (3, 5)),
        (nn.MultiheadAttention(4, 2).out_proj, Kind.LINEAR, (4, 4)),
        (FalconLinear(3, 5), Kind.LINEAR, (3, 5)),
        (Conv1D(5, 3), Kind.CONV1D_TRANSPOSED, (3, 5)),
        (nn.Embedding(7, 4), Kind.EMBEDDING, (7, 4)),
        (nn.LayerNorm(6), Kind.NORM, (6, 6)),
        (nn.BatchNorm2d(6), Kind.NORM, (6, 6)),
        (TinyRMSNorm(), Kind.NORM, (6, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kind_and_sizes(module: nn.Module, kind: Kind, sizes: tuple[int, int]) -> None:
    facts = layer_facts(module)
    assert (facts.kind, facts.in_features, facts.out_features) == (kind, *sizes)
    assert facts.note == ""
    assert facts.has_bias == (getattr(module, "bias", None) is not None)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_convolutions_tell_channels_kernel_and_groups(dimension: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1](6, 4, kernel_size=3, groups=2)
    facts = layer_facts(conv)
    assert facts.kind is (Kind.CONV1D, Kind.CONV2D, Kind.CONV3D)[dimension - 1]
    assert (facts.in_features, facts.out_features, facts.groups) == (6, 4, 2)
    assert facts.kernel == (3,) * dimension


def test_groups_alone_tell_convolutions_apart() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(2, 4, 3))
    one, other = (node.facts for node in snapshot(model).nodes[1:])
    assert one.params == other.params
    assert (one.in_features, other.in_features) == (4, 2)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Grouped(4, 4), "a subclass of Linear with a forward of its own"),
        (Scaled(4, 4), "a subclass of Embedding with a forward of its own"),
        (nn.LayerNorm(4, elementwise_affine=False), "no parameter `weight`"),
    ],
    ids=["grouped", "scaled", "bare norm"],
)
def test_what_only_looks_like_a_kind_is_none_and_says_why(module: nn.Module, told: str) -> None:
    facts = layer_facts(module)
    assert facts.kind is Kind.OTHER
    assert told in facts.note


def test_a_layer_that_computes_its_weight_is_of_its_kind() -> None:
    facts = layer_facts(parametrize.register_parametrization(nn.Linear(3, 5), "weight", Doubling()))
    assert (facts.kind, facts.in_features, facts.out_features) == (Kind.LINEAR, 3, 5)
    assert "weight" not in dict(facts.params)


def test_the_linear_subclasses_trusted_by_name_are_affine() -> None:
    torch.manual_seed(0)
    layer, x = FalconLinear(5, 7), torch.randn(3, 5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_dtypes_by_name(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False))
    assert next(iter(layer_facts(module).params.values())).dtype == str(dtype).removeprefix("torch.")


def test_persistent_buffers_count_and_others_do_not() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(2))
    module.register_buffer("derived", torch.zeros(3), persistent=False)
    module.register_buffer("absent", None)
    assert list(layer_facts(module).buffers) == ["kept"]


def test_equal_layers_share_one_object() -> None:
    graph = snapshot(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 3, bias=False)))
    facts = [node.facts for node in graph.nodes[1:]]
    assert len({id(item) for item in facts[:4]}) == 1
    assert facts[4] != facts[0]


class Shared(nn.Module):
    """A module at two places, and a parameter at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.twin = self.a
        self.b.weight = self.a.weight
        self.none = None
        self.nested = nn.ModuleDict({"c": nn.Linear(3, 3), "d": self.b})


def models() -> dict[str, nn.Module]:
    llama = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 11,
    }
    with torch.device("meta"):
        return {
            "shared": Shared(),
            "llama": LlamaForCausalLM(LlamaConfig(**llama)),
            "tied llama": LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)),
            "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=16)),
            "t5": T5ForConditionalGeneration(
                T5Config(d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2, vocab_size=11)
            ),
            "single": nn.Linear(2, 3),
        }


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
def test_modules_and_parameters_are_those_torch_reports(name: str) -> None:
    model = MODELS[name]
    graph = snapshot(model)
    assert [node.path for node in graph.nodes] == [path for path, _ in model.named_modules()]
    assert {n: t.shape for n, t in graph.parameters()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert graph.numel == sum(p.numel() for p in model.parameters())


def test_ties_name_the_parameter_that_torch_reports_first() -> None:
    assert snapshot(MODELS["shared"]).ties == (("a.weight", "b.weight"),)
    assert snapshot(MODELS["tied llama"]).ties == (("model.embed_tokens.weight", "lm_head.weight"),)
    (group,) = snapshot(MODELS["t5"]).ties
    assert group[0] == "shared.weight"
    assert set(group) == {
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }


def test_lazy_layers_are_all_named() -> None:
    with pytest.raises(PeftcError) as caught:
        snapshot(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.LazyConv2d(3, 3)))
    assert {d.code for d in caught.value.diagnostics} == {"PC301"}
    assert {d.where.path for d in caught.value.diagnostics} == {"0", "2"}


class Standing(TunerLayer):
    """A wrapper without a plan: only that it is one matters here."""

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.some_slot = nn.ModuleDict({"default": nn.Linear(3, 2)})


def test_our_wrappers_are_seen_through() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4)), nn.Linear(4, 2))
    model[2].weight = nn.Parameter(torch.zeros(2, 4))
    before, inner = snapshot(model), model[1][0]
    model[1][0] = Standing(Standing(inner))
    saved = ModulesToSaveWrapper(model[2])
    saved.modules_to_save.add_module(
        "default", nn.Linear(4, 3)
    )  # another shape, so that it cannot pass for the original
    model[2] = saved
    after = snapshot(model)
    assert after == before
    assert unwrapped(model[1][0]) is inner
    assert layer_facts(model[1][0]) == before.by_path["1.0"].facts


def test_embeddings_of_a_transformers_model() -> None:
    facts = snapshot(MODELS["llama"]).model
    assert (facts.input_embeddings, facts.output_embeddings) == ("model.embed_tokens", "lm_head")
    assert (facts.cls, facts.model_type, facts.is_encoder_decoder) == ("LlamaForCausalLM", "llama", False)
    assert snapshot(MODELS["t5"]).model.is_encoder_decoder
    assert snapshot(nn.Linear(1, 1)).model.input_embeddings is None


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("llama", {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}),
        ("gpt2", {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}),
        ("t5", {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}),
    ],
)
def test_dimensions_under_one_name_each(name: str, dims: dict[str, int]) -> None:
    found = snapshot(MODELS[name]).model.dims
    assert {key: found.get(key) for key in dims} == dims


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (
            {"n_embd": 4, "n_layer": 3, "n_head": 2},
            {"hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2},
        ),
        ({"d_model": 4, "encoder_attention_heads": 2}, {"hidden_size": 4, "num_attention_heads": 2}),
        (
            {"hidden_size": 9, "text_config": {"hidden_size": 4, "num_layers": 1}},
            {"hidden_size": 4, "num_hidden_layers": 1},
        ),
        ({"hidden_size": None, "d_model": 4, "num_heads": [2, 4]}, {"hidden_size": 4}),
        ({}, {}),
    ],
)
def test_names_that_configs_have_for_a_dimension(config: dict[str, Any], dims: dict[str, int]) -> None:
    assert dims_of(config) == dims


def test_time_grows_with_modules_and_not_faster() -> None:
    def seconds(count: int) -> float:
        model = nn.ModuleList(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))) for _ in range(count))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            snapshot(model)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(800) < 3 * 8 * seconds(100)


class Recorder(TorchDispatchMode):
    """Notes every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_operation_runs_on_a_tensor() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(3, 2))
    with Recorder() as recorder:
        snapshot(model)
        assert recorder.called == []
        model[0].weight.sum()
    assert recorder.called  # it does notice


def test_a_scaled_word_embedding_is_an_embedding() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    assert layer_facts(Gemma3TextScaledWordEmbedding(32, 8, 0, embed_scale=4.0)).kind is Kind.EMBEDDING
