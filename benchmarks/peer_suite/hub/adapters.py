"""Adapters that the tests load from the hub, written by hand: neither library is asked what one looks like."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.peer_suite.hub import tokenizers
from benchmarks.peer_suite.hub.models import HF, PEFT, VOCABULARY
from benchmarks.peer_suite.hub.repos import MAIN, repo, snapshot

_OPT = f"{PEFT}/tiny-random-OPTForCausalLM"
_BERT = f"{HF}/tiny-random-BertModel"
_CAUSAL = "CAUSAL_LM"
#: Auto class of each kind of task.
_AUTO = {
    None: "AutoModel",
    "FEATURE_EXTRACTION": "AutoModel",
    _CAUSAL: "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_RANK = 8


def lora(
    name: str,
    base: str = _OPT,
    task: str | None = _CAUSAL,
    *,
    auto: str = "",
    targets: Sequence[str] = ("q_proj", "v_proj"),
    revision: str = MAIN,
    subfolder: str = "",
    beside: Callable[[Any], Mapping[str, Tensor]] | None = None,
    tokenizer: Callable[[Path], Any] | None = None,
    options: Mapping[str, Any] = {},
) -> None:
    """A repository with a LoRA on the repository `base`, which is written before.

    `beside` gives further tensors of the file; `options` stand in the config as they are.
    """

    def build(folder: Path, hub: Path) -> None:
        model = getattr(transformers, auto or _AUTO[task]).from_pretrained(snapshot(hub, base))
        torch.manual_seed(1)
        tensors = dict(_factors(model, targets)) | dict(beside(model) if beside else {})
        out = folder / subfolder
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            **{"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "revision": None},
            **{"r": _RANK, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": list(targets)},
            **{"inference_mode": True, "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True},
            **options,
        }
        (out / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer(out)

    repo(name, revision=revision)(build)


def _factors(model: Any, targets: Sequence[str]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in targets and getattr(module, "weight", None) is not None:
            size = module.weight.shape
            into, out = size if type(module).__name__ == "Conv1D" else reversed(size)
            found[f"base_model.model.{path}.lora_A.weight"] = torch.randn(_RANK, into) / into
            found[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, _RANK) / _RANK
    return found


def _head(path: str) -> Callable[[Any], Mapping[str, Tensor]]:
    """A head that was trained whole, under the keys of a file."""

    def tensors(model: Any) -> Mapping[str, Tensor]:
        held = model.get_submodule(path).state_dict()
        return {f"base_model.model.{path}.{key}": value.clone() for key, value in held.items()}

    return tensors


def _resized(rows: int) -> Callable[[Any], Mapping[str, Tensor]]:
    """Embeddings of a vocabulary that has grown."""

    def tensors(model: Any) -> Mapping[str, Tensor]:
        table = torch.randn(rows, model.get_input_embeddings().weight.shape[1])
        root = "base_model.model"
        return {f"{root}.model.decoder.embed_tokens.weight": table, f"{root}.lm_head.weight": table.clone()}

    return tensors


def _grown(rows: int) -> dict[str, Any]:
    return {"beside": _resized(rows), "tokenizer": lambda folder: tokenizers.opt(folder, extra=rows - tokenizers.SIZE)}


_WHISPER = {
    "base_model_class": "WhisperForConditionalGeneration",
    "parent_library": "transformers.models.whisper.modeling_whisper",
}
_TRANSPOSED = {"fan_in_fan_out": True}

lora(f"{PEFT}/tiny-OPTForCausalLM-lora")
lora(f"{PEFT}/tiny_T5ForSeq2SeqLM-lora", f"{PEFT}/tiny-random-t5", "SEQ_2_SEQ_LM", targets=("q", "v"))
lora(f"{PEFT}/tiny_OPTForSequenceClassification-lora", task="SEQ_CLS", beside=_head("score"))
lora(
    f"{PEFT}/tiny_GPT2ForTokenClassification-lora",
    f"{PEFT}/tiny-random-gpt2",
    "TOKEN_CLS",
    targets=("c_attn",),
    beside=_head("classifier"),
    options=_TRANSPOSED,
)
lora(f"{PEFT}/tiny_OPTForQuestionAnswering-lora", task="QUESTION_ANS", beside=_head("qa_outputs"))
lora(f"{PEFT}/tiny_OPTForFeatureExtraction-lora", task="FEATURE_EXTRACTION")
lora(
    f"{PEFT}/tiny_WhisperForConditionalGeneration-lora",
    f"{PEFT}/tiny-random-WhisperForConditionalGeneration",
    None,
    auto="WhisperForConditionalGeneration",
    options={"auto_mapping": _WHISPER},
)
lora(f"{PEFT}/tiny-random-OPTForCausalLM-extended-vocab", **_grown(VOCABULARY + 10))
lora(f"{PEFT}/gpt2-lora-random", "gpt2", targets=("c_attn",), options=_TRANSPOSED)
lora(f"{PEFT}/opt-125m-dummy-lora", f"{PEFT}/opt-125m")
for at in ("v1.2.3", MAIN):
    lora(f"{PEFT}/tiny-random-BertModel-lora", _BERT, targets=("query", "value"), revision=at)
for at in ("test", MAIN):
    lora(f"{PEFT}/tiny-opt-lora-revision", revision=at)
lora("ybelkada/test-st-lora")
lora(f"{PEFT}/test-lora-subfolder", subfolder="test")
lora(f"{PEFT}/opt-tokenizer-revision", revision="my-revision", **_grown(VOCABULARY + 20))
lora(f"{PEFT}/opt-tokenizer-revision", tokenizer=tokenizers.opt)
