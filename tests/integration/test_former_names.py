"""What transformers says that fused weights were, for each family built tiny, and against a checkpoint that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peftc.graph.former import FormerLayers
from peftc.graph.nodes import ModuleGraph
from peftc.host import fused
from peftc.runtime.applying.snapshot import snapshot

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral() -> transformers.PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=3, **SIZES))


def qwen3() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2, **SIZES)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> transformers.PreTrainedModel:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(num_local_experts=3, head_dim=8, **SIZES))


EXPERTS = "model.layers.*.mlp.experts"
OLD = "model.layers.*.block_sparse_moe"


@pytest.mark.parametrize(
    ("build", "former"),
    [
        (
            mixtral,
            {
                FormerLayers(EXPERTS, "gate_up_proj", (f"{OLD}.experts.{{expert}}.w1", f"{OLD}.experts.{{expert}}.w3")),
                FormerLayers(EXPERTS, "down_proj", (f"{OLD}.experts.{{expert}}.w2",)),
                FormerLayers("model.layers.*.mlp.gate", "weight", (f"{OLD}.gate",)),
            },
        ),
        (
            qwen3,
            {
                FormerLayers(
                    EXPERTS, "gate_up_proj", (f"{EXPERTS}.{{expert}}.gate_proj", f"{EXPERTS}.{{expert}}.up_proj")
                ),
                FormerLayers(EXPERTS, "down_proj", (f"{EXPERTS}.{{expert}}.down_proj",)),
            },
        ),
        (gpt_oss, set()),  # fused by its own design: there are no layers of single experts
    ],
)
def test_the_graph_says_what_weights_were(
    build: Callable[[], transformers.PreTrainedModel], former: set[FormerLayers]
) -> None:
    with torch.device("meta"):
        model = build()
    assert set(snapshot(model).former) == former


@pytest.mark.parametrize("build", [mixtral, qwen3])
def test_former_layers_are_the_tensors_of_a_checkpoint(
    build: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    graph = snapshot(model)
    found = 0
    for key, tensor in saved.items():
        place = graph.former_names.find(key.removesuffix(".weight"))
        if place is None:
            continue
        whole = model.get_parameter(f"{place.module}.{place.parameter}")
        one = whole if place.expert is None else whole[place.expert]
        assert torch.equal(one.chunk(place.parts)[place.part], tensor), key
        found += 1
    assert found == sum(len(former.layers) * (3 if former.of_experts else 1) for former in graph.former)


def test_a_graph_keeps_former_names_and_the_loaded_model_has_the_same(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    with torch.device("meta"):
        planned = snapshot(mixtral())
    assert ModuleGraph.from_json(planned.to_json()).former == planned.former == snapshot(loaded).former


def test_a_release_without_conversions_has_no_former_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> object:
        raise ImportError("no such module")

    monkeypatch.setattr(fused, "_conversions", gone)
    assert snapshot(mixtral()).former == ()
