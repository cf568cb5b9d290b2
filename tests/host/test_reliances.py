"""What peftc relies on in other libraries, one test for each: when a release breaks it, this names what it was."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)  # fmt: skip

from peftc.host import (
    architectures,
    attention,
    caches,
    clients,
    generation,
    layers,
    loading,
    offload,
    parallel,
    torch_modules,
    trainer,
)
from peftc.ops import lowrank
from peftc.testing.models import seeded

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7]])


def llama() -> Any:
    with seeded(0):
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    with seeded(0):
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


# caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, t5])
def test_a_call_takes_a_cache_under_its_keyword_and_outputs_hold_it(build: Any) -> None:
    model = build()
    name = caches.keyword(model)
    assert name in caches.NAMES
    assert caches.fills(model, name) is True
    cache = caches.made(model.config)
    call = {"decoder_input_ids": IDS} if caches.encodes(model.config) else {}
    with torch.no_grad():
        outputs = model(input_ids=IDS, **call, **{name: cache}, use_cache=True)
    assert caches.length(cache) == 3
    assert caches.of_outputs(outputs) is cache
    assert caches.of_outputs(outputs.to_tuple()) is cache


def test_a_model_whose_signature_says_nothing_is_asked_by_a_call() -> None:
    class Silent(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().forward(*args, **kwargs)

    silent = Silent(LlamaConfig(**SIZES))
    assert caches.keyword(silent) == caches.keyword(llama())


def test_a_model_that_drops_a_cache_does_not_fill_it() -> None:
    class Dropping(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            caches.taken(kwargs)
            return super().forward(*args, **kwargs)

    assert caches.fills(Dropping(LlamaConfig(**SIZES)), caches.NAMES[0]) is False


def test_a_classifier_takes_none_and_plain_torch_takes_none() -> None:
    small = BertConfig(**SIZES)
    assert caches.keyword(nn.Linear(2, 2)) is None
    assert caches.keyword(BertForSequenceClassification(small).bert) in caches.NAMES


def test_caches_of_both_kinds_and_their_room() -> None:
    config, both = LlamaConfig(**SIZES), t5().config
    assert isinstance(caches.made(config), DynamicCache)
    assert isinstance(caches.made(both), EncoderDecoderCache)
    assert caches.decoding(caches.made(both)) is not None
    static = StaticCache(config=config, max_cache_len=5)
    assert (caches.capacity(static), caches.capacity(caches.made(config))) == (5, None)
    assert caches.capacity(caches.room_for(static, config, 3)) == 8
    grows = caches.made(config)
    assert caches.room_for(grows, config, 3) is grows
    assert caches.keeps_keys(grows, 1)
    assert caches.keeps_keys(DynamicCache(), 1)  # its layers are made when they are filled


# generation -----------------------------------------------------------------------------------------------------------


def test_generation_asks_for_each_step_and_calls_the_model_with_it() -> None:
    model, asked, called = llama(), [], []
    before = sorted(vars(model))

    def prepared(prepare: Any, ids: Any, kwargs: Any) -> Any:
        asked.append(ids.shape[1])
        return prepare(ids, **kwargs)

    def shown(kwargs: Any) -> None:
        called.append((kwargs["input_ids"].shape[1], caches.length(caches.of_call(kwargs))))

    with (
        generation.steps_prepared(model, prepared),
        generation.calls_watched(model, shown, lambda kwargs: None),
    ):
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert asked == [3, 4, 5]
    assert called == [(3, 0), (1, 3), (1, 4)]
    assert sorted(vars(model)) == before


def test_a_step_computes_as_many_ids_as_it_is_told() -> None:
    model = llama()
    found = model.prepare_inputs_for_generation(torch.cat([IDS, IDS], dim=1), **{generation.NEXT_LENGTH: 2})
    assert found["input_ids"].tolist() == [[6, 7]]


def test_generation_calls_what_stands_in_for_forward() -> None:
    model, calls = llama(), []

    def answer(forward: Any, args: Any, kwargs: Any) -> Any:
        calls.append(len(args))
        return forward(*args, **kwargs)

    with generation.calls_replaced(model, answer):
        model.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert len(calls) == 2
    assert "forward" not in vars(model)


# layers and architectures ---------------------------------------------------------------------------------------------


def test_transformers_layers_are_told_apart() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=40))
    assert layers.is_transposed_linear(type(gpt2.transformer.h[0].attn.c_attn))
    assert not layers.is_transposed_linear(nn.Linear)
    assert layers.is_pretrained(gpt2)
    assert not layers.is_pretrained(nn.Linear(2, 2))
    assert not isinstance(gpt2, layers.loaded_class("pytorch_utils", "NoSuchThing"))


def test_falcons_linear_layer_is_plain() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    assert layers.is_plain_linear(FalconLinear)
    layer, x = FalconLinear(3, 2), torch.randn(4, 3)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_scaled_embeddings_multiply_by_embed_scale() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    embedding = Gemma3TextScaledWordEmbedding(5, 4, 0, embed_scale=3.0)
    assert layers.is_scaled_embedding(type(embedding))
    assert float(layers.embedding_scale(embedding)) == 3.0
    assert layers.embedding_scale(nn.Embedding(2, 2)) is None
    torch.testing.assert_close(embedding(torch.tensor([2])), 3 * embedding.weight[[2]])


def test_experts_say_that_they_are_transposed() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 8}
    with torch.device("meta"):
        oss, mixtral = GptOssForCausalLM(GptOssConfig(**sizes)), MixtralForCausalLM(MixtralConfig(**sizes))
    assert layers.stores_transposed(oss.model.layers[0].mlp.experts)
    assert not layers.stores_transposed(mixtral.model.layers[0].mlp.experts)


def test_checkpointing_sets_a_flag() -> None:
    model = llama()
    assert not layers.recomputes(model)
    model.gradient_checkpointing_enable()
    assert layers.recomputes(model)


def test_a_split_model_says_between_how_many() -> None:
    assert parallel.parts(nn.Linear(2, 2)) == 1
    assert parallel.parts(llama()) == 1
    source = inspect.getsource(importlib.import_module("transformers.modeling_utils"))
    assert "_tp_size" in source


def test_automatic_classes_know_their_models() -> None:
    config = LlamaConfig(**SIZES)
    assert architectures.classes_in("AutoModelForCausalLM", config) == (LlamaForCausalLM,)
    assert LlamaForCausalLM not in architectures.classes_in("AutoModelForSeq2SeqLM", config)
    assert AutoModelForCausalLM.__name__ in architectures.auto_classes()
    assert {"llama", "bert", "t5"} <= set(architectures.known_types())


# loading --------------------------------------------------------------------------------------------------------------


def test_what_stays_in_float32_is_planned() -> None:
    model = t5()
    found = loading.kept_in_float32(model, torch.float16)
    assert found is not None
    assert [name for name, _ in model.named_parameters() if found.search(name)] == [
        name for name, _ in model.named_parameters() if name.endswith(".wo.weight")
    ]
    assert loading.kept_in_float32(llama(), torch.float16) is None


def test_gguf_files_are_unpacked_without_a_bar() -> None:
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    shown = module.tqdm
    with loading.bar_on_terminals_only():
        assert module.tqdm.keywords == {"disable": None}
    assert module.tqdm is shown
    assert "tqdm(" in inspect.getsource(module)
    options = loading.dense_options()
    assert options == {} or options["quantization_config"].dequantize is True


def test_headers_of_gguf_files_are_read_once() -> None:
    gguf: Any = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with loading.gguf_read_once():
        arch = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(arch, 1) is gguf.get_tensor_name_map(arch, 1)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_dense_model_forgets_that_it_was_quantised() -> None:
    model = llama()
    model.hf_quantizer = model.quantization_method = SimpleNamespace()
    model.config.quantization_config = {"quant_method": "gguf"}
    loading.forget_quantization(model)
    assert not {"hf_quantizer", "quantization_method"} & set(vars(model))
    assert "quantization_config" not in model.config.to_dict()


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trainer.REPLACED)
def test_trainer_has_what_a_subclass_replaces(name: str) -> None:
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert tuple(parameters[: len(trainer.REPLACED[name])]) == trainer.REPLACED[name]


def test_trainer_calls_what_is_replaced() -> None:
    source = inspect.getsource(Trainer)
    for name in trainer.REPLACED:
        assert f"self.{name}(" in source, name


def test_arguments_are_kept_on_one_device(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **{trainer.RECOMPUTE: True})
    trainer.use_one_device(arguments)
    assert arguments.n_gpu <= 1
    assert getattr(arguments, trainer.RECOMPUTE) is True


def test_models_say_whether_they_take_loss_keywords() -> None:
    class Says(nn.Module):
        accepts_loss_kwargs = False

        def forward(self, **kwargs: Any) -> None: ...

    assert not trainer.takes_loss_keywords(Says())
    assert trainer.takes_loss_keywords(llama())
    assert "accepts_loss_kwargs" in inspect.getsource(Trainer)


# torch ----------------------------------------------------------------------------------------------------------------


def test_hooks_are_in_dictionaries_that_stay() -> None:
    layer = nn.Linear(2, 2)
    own = torch_modules.own_hooks(layer)
    assert not any(own)
    handle = layer.register_forward_hook(lambda *args: None)
    assert any(own)
    handle.remove()
    other = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert any(torch_modules.GLOBAL_HOOKS)
    other.remove()
    assert not any(torch_modules.GLOBAL_HOOKS)


def test_buffers_that_are_not_saved_have_names() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("passing", torch.ones(1), persistent=False)
    assert set(torch_modules.transient_buffers(layer)) == {"passing"}


def test_modules_are_counted_while_a_model_is_built() -> None:
    with torch_modules.counted_modules(3, lambda: OverflowError("too many")):
        nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)])
        with pytest.raises(OverflowError):
            nn.Sequential(nn.Linear(1, 1))
    nn.ModuleList([nn.Linear(1, 1) for _ in range(5)])  # not after it


@pytest.mark.parametrize("move", ["to", "half", "to_empty"])
def test_casts_and_moves_come_down_to_one_function_of_every_module(move: str) -> None:
    outer = nn.Sequential(torch_modules.KeepsAside())
    keeper = outer[0]
    assert isinstance(keeper, torch_modules.KeepsAside)
    keeper._pristine["weight"] = own = nn.Parameter(torch.ones(2, dtype=torch.float64))
    if move == "to_empty":
        outer.to_empty(device="meta")
        assert keeper._pristine["weight"].is_meta
        return
    outer.to(torch.float16) if move == "to" else outer.half()
    assert keeper._pristine["weight"] is own
    assert own.dtype == torch.float16
    assert not list(outer.parameters()), "what is aside is no part of the model"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_repeat_what_is_given_in_place_of_a_function(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["torch.utils.checkpoint"]
    monkeypatch.setattr(module.CheckpointFunction, "forward", module.CheckpointFunction.forward)
    name = "_checkpoint_without_reentrant_generator"
    monkeypatch.setattr(module, name, getattr(module, name))
    runs: list[int] = []

    def rebound(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return function(*args, **kwargs)

        return run

    torch_modules.checkpoints_call(rebound)
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda t: t.sin().sin(), x, use_reentrant=reentrant)
    runs.clear()
    y.sum().backward()
    assert len(runs) == 1


def test_parametrized_modules_say_what_they_compute() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert list(torch_modules.computed_by(layer)) == ["weight"]
    assert not torch_modules.computed_by(nn.Linear(2, 2))
    assert not any(torch_modules.all_hooks(layer))


def test_forward_derivatives_have_a_level() -> None:
    from torch.autograd import forward_ad

    assert not lowrank.is_traced()
    with forward_ad.dual_level():
        assert lowrank.is_traced()


# accelerate, and wrappers of whole models -----------------------------------------------------------------------------


def test_an_offloaded_module_has_a_hook_that_brings_its_tensors() -> None:
    from accelerate import cpu_offload

    layer = nn.Linear(2, 2)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    assert offload.hook_of(layer) is None
    cpu_offload(model, torch.device("cpu"))
    assert layer.weight.is_meta
    brought = offload.brought(layer, "weight")
    assert brought is not None and torch.equal(brought, weight)
    before = offload.kept(layer)
    assert before is not None
    offload.keep(layer, offload.changed(before, {"weight": weight * 2}))
    x = torch.ones(1, 2)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight * 2, before["bias"]))
    with offload.own_forward(layer):
        assert layer(x.to("meta")).is_meta
    assert not any(p.is_meta for p in offload.whole_copy(layer).parameters())


def test_wrappers_of_whole_models_are_seen_through() -> None:
    layer = nn.Linear(2, 2)
    assert parallel.unwrapped(torch.compile(layer)) is layer
    assert parallel.unwrapped(nn.DataParallel(layer)) is layer
    assert parallel.unwrapped(nn.Sequential(layer)) is not layer
    assert parallel.sharded(layer) is None
    assert parallel.gathered(layer.weight) is layer.weight
    layer.weight.ds_shape = torch.Size([4, 4])  # as DeepSpeed notes it
    assert parallel.whole_shape(layer.weight) == (4, 4)


def test_who_shards_is_known_by_class_and_marks() -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, _common_utils, _unshard_param_utils
    from torch.distributed.tensor import DTensor

    assert {FSDPModule.__name__, FullyShardedDataParallel.__name__} == parallel._SHARDERS
    assert all(cls.__module__.startswith("torch.distributed.") for cls in (FSDPModule, FullyShardedDataParallel))
    assert parallel._FLATTENED == _common_utils.FSDP_FLATTENED
    assert parallel._FLAT == _unshard_param_utils.FLAT_PARAM
    assert DTensor.__name__ == "DTensor"
    assert {"grad_placements"} <= set(inspect.signature(DTensor.full_tensor).parameters)
    assert parallel.sharded_by([nn.Linear(2, 2)]) is None


def test_deepspeeds_engine_brings_parameters_that_are_looked_up() -> None:
    offload = pytest.importorskip("deepspeed.runtime.zero.parameter_offload", exc_type=ImportError)
    assert "all_gather" in inspect.getsource(offload.ZeROOrderedDict.__getitem__)
    assert "_parameters" in inspect.getsource(offload._inject_parameters)


# who asks for `peft` --------------------------------------------------------------------------------------------------


def test_libraries_keep_their_answer_where_it_is_looked_for() -> None:
    for name, flag in clients.LOOKED_ONCE.items():
        module = importlib.import_module(name)
        assert flag in vars(module) or f"{flag} " in inspect.getsource(module), f"{name}.{flag}"
    for name, functions in clients.REMEMBERED.items():
        module = importlib.import_module(name)
        assert callable(vars(module)[functions[0]]), f"{name}.{functions[0]}"


# attention ------------------------------------------------------------------------------------------------------------


def noting(called: list[str], layer: nn.Module) -> Any:
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        called.append(type(layer).__name__)
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention_and_encoders_read_parameters_of_layers_and_do_not_call_these(padded: bool) -> None:
    with seeded(0):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1).eval()
    block, called = encoder.layers[0], []
    for layer in (block.self_attn, block.self_attn.out_proj, block.linear1, block.norm1):
        assert attention.is_read_past(block if layer is not block.self_attn.out_proj else block.self_attn, layer)
        layer.forward = noting(called, layer)
    mask = torch.tensor([[False, False, True]]) if padded else None
    with torch.no_grad():
        encoder(torch.ones(1, 3, 16), src_key_padding_mask=mask)
        assert called == []  # one kernel
        block.self_attn(*[torch.ones(1, 3, 16)] * 3)
        assert called == ["MultiheadAttention"]  # its output layer is read
    assert all(name in vars(block.self_attn) for name in attention.PRIVATE)


def test_a_context_of_a_device_is_one_entry_of_a_stack() -> None:
    depth = torch_modules.context_depth()
    torch.device("meta").__enter__()  # and whoever was to leave it was cut off
    assert torch.empty(1).is_meta and torch_modules.context_depth() == depth + 1
    torch_modules.leave_contexts(depth)
    assert not torch.empty(1).is_meta and torch_modules.context_depth() == depth
