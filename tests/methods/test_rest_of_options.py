"""Options of LoRA that are about runs, other packages and biases of the base, on every kind of layer, beside the reference."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peftc import AdaLoraConfig, LoraConfig, LoraRuntimeConfig, PeftcError, PeftModel, get_peft_model

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30,
    "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3]])


class Layers(nn.Module):
    """A layer of each kind, with a bias where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.norm = nn.Embedding(30, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.mha, self.bare = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8, bias=False)
        self.one, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 1, groups=2)
        self.two, self.three = nn.Conv2d(1, 1, 3, padding=1), nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        h = self.norm(self.lin(self.emb(input_ids)))
        h = self.mha(h, h, h, need_weights=False)[0].transpose(1, 2)
        h = self.grouped(self.one(h)).transpose(1, 2)
        h = self.two(h.unsqueeze(1))
        return (self.bare(self.three(h.unsqueeze(1)).flatten(0, 2)),)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    return T5ForConditionalGeneration(T5Config(**sizes))


def experts() -> nn.Module:
    more = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **more))


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "layers": (Layers, {"target_modules": ["lin", "mha", "one", "grouped", "two", "three", "emb", "bare"]}),
    "norms alone": (Layers, {"target_modules": ["bare"]}),
    "transposed": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)), {
        "target_modules": ["c_attn"], "fan_in_fan_out": True,
    }),
    "tied biases": (lambda: BertForMaskedLM(BertConfig(**SIZES)), {"target_modules": ["query"]}),
    "replicas": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)), {
        "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]],
    }),
    "experts": (experts, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
}  # fmt: skip


def y_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS)[0]


#: Where only norms have biases, those of adapted layers are none.
TRAINED = [
    (kind, mode) for kind in KINDS for mode in ("all", "lora_only") if (kind, mode) != ("norms alone", "lora_only")
]


@pytest.mark.parametrize(("kind", "mode"), TRAINED)
def test_biases_train_and_travel_as_in_the_reference(kind: str, mode: str, tmp_path: Path) -> None:
    make, asked = KINDS[kind]

    def base() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, bias=mode, **asked))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = PeftModel.from_pretrained(base(), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(y_of(ours), y_of(theirs.eval()))
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]
    assert {p.name for p in ours.session.plans["default"].parameters()} == trained[0]
    for model in (ours, theirs):
        y_of(model).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None and name.endswith(".bias"):
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(y_of(again), y_of(theirs))
    if kind not in ("layers", "replicas"):  # there the reference merges otherwise
        torch.testing.assert_close(y_of(ours.merge_and_unload()), y_of(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [LoraConfig, lambda **o: AdaLoraConfig(total_step=9, **o)], ids=["lora", "adalora"])
def test_megatron_is_told_plainly_where_it_is_not(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"r": 2, "target_modules": ["0"], "megatron_config": {"hidden_size": 4}}
    with pytest.raises(PeftcError, match="pip install megatron-core") as caught:
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), make(**asked))
    assert [(d.code, d.where.path) for d in caught.value.diagnostics if d.severity == "error"] == [
        ("PC305", "$.adapters.default.megatron_config")
    ]
    assert isinstance(caught.value, ImportError)
    module = type(sys)("megatron")
    module.__spec__ = importlib.machinery.ModuleSpec("megatron", None)
    monkeypatch.setitem(sys.modules, "megatron", module)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), make(**asked))
    assert model.peft_config["default"].to_dict()["megatron_core"] == "megatron.core"


def test_how_a_run_goes_about_it_changes_nothing_that_is_computed_or_saved(tmp_path: Path) -> None:
    asked = LoraConfig(target_modules=["0"], runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    y = base(x)
    model = get_peft_model(base, asked)
    assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload
    torch.testing.assert_close(model(x), y)
    model.save_pretrained(tmp_path)
    assert "ephemeral" not in (tmp_path / "adapter_config.json").read_text()
