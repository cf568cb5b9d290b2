"""Quantised bases: what is planned from a config is what loading gives, and what cannot be had is refused before any weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen2Config, T5Config

from peftc.config.quantize import LIBRARIES, QuantizeSection, method_of
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import GraphCache
from peftc.graph.locate import locate
from peftc.integrations.transformers.base import load_base
from peftc.integrations.transformers.graph import graph_of, meta_model
from peftc.runtime.applying.snapshot import snapshot

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
WIDE = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
MODELS: dict[str, tuple[PretrainedConfig, str, str]] = {
    "llama": (LlamaConfig(**WIDE), "LlamaForCausalLM", "CAUSAL_LM"),
    "qwen2": (Qwen2Config(**WIDE, num_key_value_heads=2, tie_word_embeddings=True), "Qwen2ForCausalLM", "CAUSAL_LM"),
    "mixtral": (MixtralConfig(**WIDE, num_key_value_heads=1, num_local_experts=2), "MixtralForCausalLM", "CAUSAL_LM"),
    "gpt2": (
        GPT2Config(n_embd=128, n_layer=2, n_head=2, vocab_size=64, n_positions=32),
        "GPT2LMHeadModel",
        "CAUSAL_LM",
    ),
    "t5": (
        T5Config(d_model=128, d_ff=256, d_kv=64, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0),
        "T5ForConditionalGeneration",
        "SEQ_2_SEQ_LM",
    ),
}


def _ao(name: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": {}}}}


FORMS: dict[str, dict[str, Any]] = {
    "nf4 double": QuantizeSection(double=True, compute_dtype="bfloat16").as_config(),
    "fp4": QuantizeSection(type="fp4").as_config(),
    "int8": QuantizeSection(bits=8).as_config(),
    "nf4 skipping": QuantizeSection(skip=["q_proj", "lm_head"]).as_config(),
    **{f"quanto {kind}": {"quant_method": "quanto", "weights": kind} for kind in ("int8", "int4", "int2", "float8")},
    "torchao int8": _ao("Int8WeightOnlyConfig"),
    "torchao float8": _ao("Float8WeightOnlyConfig"),
    "torchao dynamic": _ao("Int8DynamicActivationInt8WeightConfig"),
}
#: Those whose packed models transformers can save.
SAVED = ("nf4 double", "int8", "torchao int8")


def _missing(form: Mapping[str, Any]) -> list[str]:
    return [name for name in LIBRARIES[method_of(form)].modules if find_spec(name.partition(".")[0]) is None]


def form(name: str) -> Any:
    """A form that is skipped, with the reason, where its library is not installed."""
    absent = _missing(FORMS[name])
    return pytest.param(
        FORMS[name], id=name, marks=pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per model, as transformers saves it."""
    folders = {}
    for name, (config, cls, _) in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("base") / name
        torch.manual_seed(0)
        getattr(transformers, cls)(config).to(torch.bfloat16).save_pretrained(folders[name])
    return folders


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path / "cache"))
    return GraphCache()


def refused(ref: BaseRef, build: Any = graph_of) -> Diagnostic:
    with pytest.raises(PeftcError) as caught:
        build(ref)
    (told,) = caught.value.diagnostics
    return told


def held(model: nn.Module) -> int:
    """Bytes of all that the model holds: parameters and buffers, what tensors are made of, and how they are scaled."""
    found = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            found[id(part)] = part
    return sum(part.numel() * part.element_size() for part in found.values())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None and type(tensor) is not nn.Parameter:
        for name in inner()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    scales = getattr(tensor, "SCB", None)
    if scales is not None:
        yield scales
    state = getattr(tensor, "quant_state", None)
    for own in (state, getattr(state, "state2", None)):
        yield from (part for part in vars(own or object.__new__(nn.Module)).values() if isinstance(part, torch.Tensor))


@pytest.mark.parametrize("options", map(form, FORMS))
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_of_a_quantised_base_is_that_of_the_loaded_model(
    saved: dict[str, Path], name: str, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    ref = BaseRef(path=str(saved[name]), task_type=MODELS[name][2], quantization=options)
    planned, loaded = graph_of(ref), load_base(ref)[0]
    assert not [told for told in recwarn if "PC" in str(told.message)]
    now = snapshot(loaded)
    assert [(n.path, n.facts) for n in planned.nodes] == [(n.path, n.facts) for n in now.nodes]
    assert planned.digest == now.digest
    assert held(meta_model(locate(ref))) == held(loaded)
    assert planned.nbytes == pytest.approx(held(loaded), rel=0.01)  # which has buffers that are not saved, too


@pytest.mark.parametrize("options", map(form, SAVED))
def test_a_folder_that_is_quantised_already(saved: dict[str, Path], options: dict[str, Any], tmp_path: Path) -> None:
    load_base(BaseRef(path=str(saved["llama"]), quantization=options))[0].save_pretrained(tmp_path / "packed")
    ref = BaseRef(path=str(tmp_path / "packed"), task_type="CAUSAL_LM")
    planned, loaded = graph_of(ref), load_base(ref)[0]
    assert planned.digest == snapshot(loaded).digest
    assert planned.nbytes == snapshot(loaded).nbytes
    assert held(meta_model(locate(ref))) == held(loaded)


@pytest.mark.parametrize("options", [form("nf4 double")])
def test_a_plan_leaves_the_library_as_it_was(saved: dict[str, Path], options: dict[str, Any]) -> None:
    """Tables that a library makes once must not be made of tensors without storage."""
    ref = BaseRef(path=str(saved["llama"]), quantization=options)
    first = load_base(ref)[0]
    graph_of(ref)
    again = load_base(ref)[0]
    x = torch.arange(6).view(1, -1)
    assert torch.equal(first(x).logits, again(x).logits)


@pytest.mark.parametrize("options", [form("nf4 double"), form("quanto int8")])
def test_the_graph_is_kept(saved: dict[str, Path], options: dict[str, Any], cache: GraphCache) -> None:
    ref = BaseRef(path=str(saved["llama"]), quantization=options)
    assert graph_of(ref).digest == graph_of(ref).digest
    assert len(cache.entries()) == 1
    graph_of(BaseRef(path=str(saved["llama"])))
    assert len(cache.entries()) == 2


# what cannot be had ---------------------------------------------------------------------------------------------------


def test_a_library_that_transformers_does_not_know() -> None:
    config = {"model_type": "llama", **WIDE, "quantization_config": {"quant_method": "quantos"}}
    told = refused(BaseRef(config=config, task_type="CAUSAL_LM"))
    assert told.code == "PC321" and "`quanto`" in told.fix


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (QuantizeSection().as_config() | {"bnb_4bit_quant_storage": "int3"}, "bnb_4bit_quant_storage"),
        ({"quant_method": "quanto", "weights": "int3"}, "int3"),
    ],
)
def test_options_that_a_library_does_not_take(saved: dict[str, Path], options: dict[str, Any], words: str) -> None:
    absent = _missing(options)
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    ref = BaseRef(path=str(saved["llama"]), quantization=options)
    for build in (graph_of, load_base):
        told = refused(ref, build)
        assert told.code == "PC322" and words in told.what


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is for machines without an accelerator")
def test_what_needs_an_accelerator_is_refused_without(saved: dict[str, Path]) -> None:
    ref = BaseRef(path=str(saved["llama"]), quantization={"quant_method": "fp8"})
    told = refused(ref)
    assert told.code == "PC322" and "GPU" in told.what


def test_a_bare_config_is_planned_quantised_and_not_loaded() -> None:
    if _missing(FORMS["nf4 double"]):
        pytest.skip("needs bitsandbytes")
    config = {"model_type": "llama", **WIDE}
    ref = BaseRef(config=config, task_type="CAUSAL_LM", quantization=FORMS["nf4 double"])
    assert any(node.facts.cls == "Linear4bit" for node in graph_of(ref).nodes)
    assert refused(ref, load_base).code == "PC322"
