"""Starts that read data: what they find is what the reference finds, and the model computes at step 0 what it did before."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peftc_plugins.starts import eva
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import peftc
from peftc import PeftcError, PeftModel, plugin, rules
from peftc.cli.main import main
from peftc.compat import names
from tests.packaging.fresh import write_small_job

IDS = torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(IDS)
MASK[:2, 15:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
}
both_models = pytest.mark.parametrize("name", MODELS)


def options(name: str, start: str, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": MODELS[name][1], "init_lora_weights": start, **more}


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**BATCH).logits


def same_parameters(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    """Up to the signs that each pair of components shares."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for key, tensor in other.items():
        if "lora_A" in key or "lora_B" in key:
            torch.testing.assert_close(mine[key].abs(), tensor.abs(), rtol=tolerance, atol=tolerance)
        else:
            torch.testing.assert_close(mine[key], tensor, rtol=tolerance, atol=tolerance)


# CorDA ----------------------------------------------------------------------------------------------------------------


def with_corda(library: Any, name: str, folder: Path | None = None, **more: Any) -> Any:
    files = (
        {} if folder is None else {"cache_file": str(folder / "cache.pt"), "covariance_file": str(folder / "cov.pt")}
    )
    model = MODELS[name][0]()
    config = library.LoraConfig(**options(name, "corda", corda_config=library_config(library, **files, **more)))
    preprocess = peftc.preprocess_corda if library is peftc else preprocess_corda

    def run() -> None:
        for row in IDS:
            model(row[None])

    preprocess(model, config, run_model=run)
    return library.get_peft_model(model, config)


def library_config(library: Any, **values: Any) -> Any:
    cls = peftc.CordaConfig if library is peftc else CordaConfig
    return cls(**values)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@both_models
def test_corda(name: str, method: str, tmp_path: Path) -> None:
    before = logits(MODELS[name][0]())
    ours, theirs = (with_corda(library, name, corda_method=method) for library in (peftc, peft))
    torch.testing.assert_close(logits(ours), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-4)
    same_parameters(ours, theirs, 2e-3)
    assert not any("_peftc_gathered" in module.__dict__ for module in ours.modules())
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS[name][0](), tmp_path)), logits(ours))
    ours.save_pretrained(tmp_path / "turned", path_initial_model_for_weight_conversion=True)
    turned = peft.PeftModel.from_pretrained(MODELS[name][0](), tmp_path / "turned")
    torch.testing.assert_close(logits(turned), logits(ours), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_corda_keeps_what_it_found_in_the_references_files(tmp_path: Path) -> None:
    first = with_corda(peft, "llama", tmp_path)
    config = peftc.LoraConfig(
        **options("llama", "corda", corda_config=peftc.CordaConfig(cache_file=tmp_path / "cache.pt"))
    )
    for cached in (
        config,
        config.model_copy(update={"corda_config": peftc.CordaConfig(covariance_file=str(tmp_path / "cov.pt"))}),
    ):
        model = llama()
        peftc.preprocess_corda(model, cached)  # nothing is run
        same_parameters(peftc.get_peft_model(model, cached), first, 2e-3)


def test_corda_without_data() -> None:
    config = peftc.LoraConfig(**options("llama", "corda"))
    with pytest.raises(PeftcError, match=rules.START_DATA.code):
        peftc.get_peft_model(llama(), config)
    with pytest.raises(PeftcError, match="run_model"):
        peftc.preprocess_corda(llama(), config)
    with pytest.raises(PeftcError, match="did not call"):
        peftc.preprocess_corda(llama(), config, run_model=lambda: None)
    model = llama()
    peftc.preprocess_corda(model, config, run_model=lambda: model(IDS))
    other = config.model_copy(update={"r": 2})
    with pytest.raises(PeftcError, match="is of rank 4"):
        peftc.get_peft_model(model, other)


def test_a_folder_without_what_was_kept_cannot_be_repeated_with_data(tmp_path: Path) -> None:
    with_corda(peftc, "llama").save_pretrained(tmp_path)
    (tmp_path / "peftc_start.safetensors").unlink()
    with pytest.raises(PeftcError, match=rules.START_NOT_REPEATED.code):
        PeftModel.from_pretrained(llama(), tmp_path)


# LoRA-GA --------------------------------------------------------------------------------------------------------------


def with_gradients(library: Any, name: str, cache: str | None = None, **more: Any) -> Any:
    cls = peftc.LoraGAConfig if library is peftc else peft.LoraGAConfig
    preprocess = peftc.preprocess_loraga if library is peftc else peft.preprocess_loraga
    model = MODELS[name][0]()
    config = library.LoraConfig(**options(name, "lora_ga", lora_ga_config=cls(**more)))

    def step() -> None:
        for half in (slice(0, 3), slice(3, 6)):
            torch.manual_seed(4)  # the models train, and drop
            model(**{key: value[half] for key, value in BATCH.items()}).loss.backward()

    preprocess(model, config, step, cache)
    torch.manual_seed(11)
    return library.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@both_models
def test_lora_ga(name: str, direction: str, scale: str) -> None:
    before = logits(MODELS[name][0]())
    ours, theirs = (with_gradients(library, name, direction=direction, scale=scale) for library in (peftc, peft))
    torch.testing.assert_close(logits(ours), before, rtol=1e-3, atol=1e-4)
    if (name, scale) == ("gpt2", "stable"):  # the reference takes the width of the input there
        ours = with_gradients(peftc, name, direction=direction, scale="unit")
        theirs = with_gradients(peft, name, direction=direction, scale="unit")
    same_parameters(ours, theirs, 2e-3)


@pytest.mark.filterwarnings("ignore")
def test_lora_ga_leaves_the_model_as_it_was_and_reads_its_file(tmp_path: Path) -> None:
    file = str(tmp_path / "gradients.pt")
    first = with_gradients(peft, "llama", file)
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    grad = model.model.layers[0].self_attn.q_proj.weight.grad = torch.ones(32, 32)
    config = peftc.LoraConfig(**options("llama", "lora_ga", lora_ga_config=peftc.LoraGAConfig()))
    with warnings.catch_warnings():  # a first layer's input requires no gradient, which concerns nobody
        warnings.simplefilter("error")
        peftc.preprocess_loraga(model, config, lambda: model(**BATCH).loss.backward())
    assert [own.requires_grad for own in (model.lm_head.weight, model.model.norm.weight)] == [False, True]
    assert model.model.layers[0].self_attn.q_proj.weight.grad is grad
    assert not model.training
    peftc.preprocess_loraga(model, config, lambda: None, file)
    torch.manual_seed(11)
    same_parameters(peftc.get_peft_model(model, config), first, 2e-3)


def test_lora_ga_without_gradients() -> None:
    config = peftc.LoraConfig(**options("llama", "lora_ga"))
    with pytest.raises(PeftcError, match=rules.START_DATA.code):
        peftc.get_peft_model(llama(), config)
    model = llama()
    with pytest.raises(PeftcError, match="no gradient"):
        peftc.preprocess_loraga(model, config, lambda: None)
    assert all(own.requires_grad for own in model.parameters())


def test_lora_ga_spares_embeddings() -> None:
    model = llama()
    config = peftc.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights="lora_ga")
    peftc.preprocess_loraga(model, config, lambda: model(**BATCH).loss.backward())
    with pytest.warns(peftc.PeftcWarning, match=rules.START_SPARED.code):
        adapted = peftc.get_peft_model(model, config)
    torch.testing.assert_close(logits(adapted), logits(llama()), rtol=1e-3, atol=1e-4)


# EVA ------------------------------------------------------------------------------------------------------------------


def loader() -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(4):
        ids = torch.randint(0, 64, (8, 24), generator=made)
        mask = torch.ones_like(ids)
        mask[:3, 18:] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def with_eva(library: Any, name: str, more: dict[str, Any], **eva: Any) -> Any:
    cls = peftc.EvaConfig if library is peftc else peft.EvaConfig
    torch.manual_seed(2)
    model = library.get_peft_model(
        MODELS[name][0](), library.LoraConfig(**options(name, "eva", eva_config=cls(tau=0.9, **eva), **more))
    )
    library.initialize_lora_eva_weights(model, copy.deepcopy(loader()))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "eva",
    [{}, {"rho": 1.0}, {"whiten": True}, {"adjust_scaling_factors": False}, {"use_label_mask": False}],
    ids=str,
)
@both_models
def test_eva(name: str, eva: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (with_eva(library, name, {}, **eva) for library in (peftc, peft))
    before = logits(MODELS[name][0]())
    assert torch.equal(logits(ours), before)
    mine, other = (dict(model.named_parameters()) for model in (ours, theirs))
    assert mine.keys() == other.keys()
    for key, tensor in other.items():
        if not (eva.get("whiten") and name == "llama"):  # the reference divides what layers share once for each of them
            torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-4)
    ranks = [model.peft_config["default"].rank_pattern for model in (ours, theirs)]
    assert {key.removeprefix("^"): rank for key, rank in ranks[0].items()} == ranks[1]
    assert ours.peft_config["default"].alpha_pattern == pytest.approx(theirs.peft_config["default"].alpha_pattern)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    again = {library: library.PeftModel.from_pretrained(MODELS[name][0](), tmp_path) for library in (peftc, peft)}
    for model in again.values():
        assert all(torch.equal(mine[key], own) for key, own in model.named_parameters() if "lora_" in key)
    assert tensors


@pytest.mark.filterwarnings("ignore")
def test_eva_of_a_base_model_and_of_directions_that_are_given() -> None:
    config = options("llama", "eva")
    mine = peftc.get_eva_state_dict(
        llama(), copy.deepcopy(loader()), peftc.LoraConfig(**config, eva_config=peftc.EvaConfig(tau=0.9))
    )
    theirs = peft.get_eva_state_dict(
        llama(), copy.deepcopy(loader()), peft.LoraConfig(**config, eva_config=peft.EvaConfig(tau=0.9))
    )
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-4)
    model = peftc.get_peft_model(llama(), peftc.LoraConfig(**config))
    optimizer_sees = dict(model.named_parameters())
    peftc.initialize_lora_eva_weights(model, eva_state_dict={f"base_model.model.{key}": t for key, t in mine.items()})
    assert {n for n, own in model.named_parameters() if own.requires_grad} <= optimizer_sees.keys()
    assert model.active_adapters == ["default"]


def test_eva_without_what_it_needs() -> None:
    config = peftc.LoraConfig(**options("llama", "eva"))
    model = peftc.get_peft_model(llama(), config)
    plain = peftc.get_peft_model(llama(), peftc.LoraConfig(**options("llama", True)))
    for made, given in ((model, {}), (model, {"dataloader": []}), (plain, {"dataloader": loader()})):
        with pytest.raises(PeftcError, match=rules.START_DATA.code):
            peftc.initialize_lora_eva_weights(made, **given)
    with pytest.raises(PeftcError, match="is required"):
        peftc.get_eva_state_dict(llama(), loader())
    with pytest.raises(PeftcError, match="no layer"):
        peftc.get_eva_state_dict(llama(), loader(), config, prepare_layer_inputs_fn={"nowhere": lambda *given: None})


def test_the_plan_says_that_data_is_read_and_that_the_base_changes() -> None:
    from peftc.compiler.plan.render import render_plan
    from peftc.runtime.applying.snapshot import snapshot

    for start, told in (
        ("eva", ["reads inputs"]),
        ("lora_ga", ["reads gradients", "changes the base weights of 8 layers"]),
    ):
        plan = peftc.compile_plan(snapshot(llama()), {"default": peftc.LoraConfig(**options("llama", start))})
        text = " ".join(render_plan(plan).split())
        assert all(part in text for part in told)


# from a spec ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_from_a_spec_the_data_is_that_of_the_training(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec_file = write_small_job(tmp_path, "LORA")
    spec = json.loads(spec_file.read_text())
    spec["adapters"]["default"] |= {"r": 2, "init_lora_weights": start}
    if start == "eva":
        spec["adapters"]["default"]["eva_config"] = {"tau": 0.5, "rho": 1}
    spec["train"] |= {"start_samples": 2, "learning_rate": 1e-9}
    spec_file.write_text(json.dumps(spec))
    assert main(["plan", str(spec_file)]) == 0
    assert "data goes through the model before training" in " ".join(capsys.readouterr().out.split())
    assert main(["train", str(spec_file), "--device", "cpu", "--quiet"]) == 0
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, tmp_path / "out")
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    B = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert bool((B.abs() > 1e-7).any()) is (start != "eva")


def test_a_start_that_cannot_take_data_from_a_training_says_so() -> None:
    class Reading(plugin.Start):
        name = "reading-alone"

        def factors(self, s: plugin.StartView) -> plugin.Begun:
            return plugin.Begun(None, None)

    with pytest.raises(PeftcError, match="does not say how it takes data"):
        Reading().prepare(llama(), None, [])


#: Functions of starts, and their modules in the reference.
HELPERS = {
    "preprocess_corda": "corda",
    "preprocess_loraga": "loraga",
    "get_eva_state_dict": "eva",
    "initialize_lora_eva_weights": "eva",
    "save_as_lora": "conversion",
    "create_arrow_model": "arrow",
}


@pytest.mark.parametrize("name", HELPERS)
def test_the_alias_has_helpers_where_the_reference_has_them(name: str) -> None:
    module = f"peft.tuners.lora.{HELPERS[name]}"
    assert getattr(importlib.import_module(module), name).__module__ == module
    assert names.is_module(module)
    assert names.of_a_method(module, name) is getattr(peftc, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [
    peftc.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "down_proj"], init_lora_weights="eva"),
    peftc.HiraConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights="eva"),
], ids=lambda config: config.peft_type)  # fmt: skip
def test_other_methods_begin_in_the_directions_of_data(config: Any) -> None:
    """Ranks are distributed where they are an option of each layer, and else stay."""
    model = llama()
    begun = eva.Eva().prepare(model, config, [dict(batch) for batch in loader()])
    made = peftc.get_peft_model(model, begun)
    torch.testing.assert_close(logits(made), logits(llama()))
    factors = {n: p for n, p in made.named_parameters() if n.endswith(("lora_A.default", "hira_A.default"))}
    ranks = {len(rows) for rows in factors.values()}
    assert (ranks == {4}) is ("rank_pattern" not in type(config).pattern_options)
    for rows in factors.values():
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=1e-4, atol=1e-4)
