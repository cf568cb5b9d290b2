"""X-LoRA beside the reference, live: outputs, gradients, generation, files, and what its public methods do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftc import PeftcError, PeftModel, XLoraConfig, compile_plan, get_peft_model, inject_adapter_in_model
from peftc.runtime.applying.snapshot import snapshot

OPTIONS: list[dict[str, Any]] = [
    {},
    {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    {"xlora_depth": 3, "xlora_size": 8, "softmax_temperature": 0.5},
    {"top_k_lora": 1, "enable_softmax": False},
    {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True, "scaling_pass_value": 0.5},
    {"global_scaling_weight": 2.0, "scaling_pass_value": 0.3, "use_trainable_adapters": True},
]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, use_cache=False, **sizes)).double().eval()


def ids() -> Tensor:
    return torch.arange(10).view(2, 5)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for number in ("0", "1"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base(), config)
        move(model, "lora_", int(number))
        folders[number] = str(tmp_path_factory.mktemp("expert"))
        model.save_pretrained(folders[number])
    return folders


def move(model: nn.Module, part: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if part in name:
            p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def mine(experts: dict[str, str], **options: Any) -> PeftModel:
    model = get_peft_model(base(), XLoraConfig(task_type="CAUSAL_LM", adapters=experts, **options)).eval()
    move(model, "classifier", 3)
    return model


def theirs(experts: dict[str, str], **options: Any) -> peft.PeftModel:
    options = {"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": experts, **options}
    model = peft.get_peft_model(base(), peft.XLoraConfig(**options)).eval()
    model.base_model.internal_xlora_classifier.double()
    model.base_model.internal_xlora_classifier.dtype = torch.float64
    move(model, "classifier", 3)
    return model


def here(name: str) -> str:
    """A name of the reference's model as it is here."""
    if "classifier" in name:
        return name.replace("classifier.", "classifier.default.")
    return name.replace("lora_model.", "").replace("A.", "A.default_").replace("B.", "B.default_")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_gradients_and_counts_are_the_references(experts: dict[str, str], options: dict[str, Any]) -> None:
    ours, other = mine(experts, **options), theirs(experts, **options)
    found = []
    for model in (ours, other):
        out = model(input_ids=ids(), labels=ids())
        out.loss.backward()
        found.append((out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    gradients = {here(name): gradient for name, gradient in found[1][1].items()}
    assert found[0][1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-4, atol=1e-6)
    assert ours.get_nb_trainable_parameters() == other.get_nb_trainable_parameters()
    assert ours.get_latest_scalings().shape == (2, 5, 4, 2)
    torch.testing.assert_close(ours.get_latest_scalings(), other.get_latest_scalings(), rtol=1e-5, atol=1e-6)


def test_generation_is_the_references(experts: dict[str, str]) -> None:
    asked = {"input_ids": ids(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ours = mine(experts)
    ours.get_base_model().config.use_cache = ours.generation_config.use_cache = True  # which the reference refuses
    assert torch.equal(ours.generate(**asked), theirs(experts).generate(**asked))
    assert "forward" not in vars(ours.get_base_model())


def test_each_update_is_weighed_by_token(experts: dict[str, str]) -> None:
    model = mine(experts, layerwise_scalings=True)
    calls: list[tuple[Tensor, Tensor]] = []
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    layer.register_forward_hook(lambda module, args, y: calls.append((args[0], y)))
    model(input_ids=ids())
    (_, first), (x, y) = calls
    assert torch.equal(first, layer.base_layer(calls[0][0]))
    weights, wanted = model.get_latest_scalings()[:, :, 3], layer.base_layer(x)
    for number, name in enumerate(("default_0", "default_1")):
        update = x.to(torch.float32 if layer.lora_A[name].weight.dtype == torch.float32 else x.dtype)
        update = update @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T * layer.scaling[name]
        wanted = wanted + weights[:, :, number : number + 1] * update
    torch.testing.assert_close(y, wanted.to(y.dtype), rtol=1e-6, atol=1e-7)


def test_files_load_in_both(experts: dict[str, str], tmp_path: Path) -> None:
    model = mine(experts)
    y = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(input_ids=ids()).logits, y)
    other = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    other.base_model.internal_xlora_classifier.double()
    torch.testing.assert_close(other(input_ids=ids()).logits, y, rtol=1e-5, atol=1e-6)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_adapters_that_were_trained_along_are_saved_along(experts: dict[str, str], tmp_path: Path) -> None:
    model = mine(experts, use_trainable_adapters=True)
    move(model, "lora_", 7)
    y = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "moved")(input_ids=ids()).logits, y)
    model.save_pretrained(tmp_path / "first")
    other = peft.PeftModel.from_pretrained(base(), str(tmp_path / "first")).eval()
    other.base_model.internal_xlora_classifier.double()
    torch.testing.assert_close(other(input_ids=ids()).logits, y, rtol=1e-5, atol=1e-6)


def test_the_plan_has_the_adapters_that_are_weighed(experts: dict[str, str]) -> None:
    plan = compile_plan(snapshot(base()), {"default": XLoraConfig(adapters=experts)})
    assert plan.names == ("default", "default_0", "default_1")
    model = mine(experts)
    assert {p.name for p in plan.parameters() if p.trainable} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert {p.name for p in plan.parameters()} <= {name for name, _ in model.named_parameters()}
    assert plan.counts() == model.get_nb_trainable_parameters()
    assert plan.adapter("default").config.hidden_size == 16


def test_what_is_weighed_comes_and_goes_with_its_adapter(experts: dict[str, str]) -> None:
    model = mine(experts)
    model.add_adapter("other", XLoraConfig(task_type="CAUSAL_LM", adapters={"only": experts["1"]}))
    assert list(model.peft_config) == ["default", "other"]
    y = model(input_ids=ids()).logits
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert not torch.equal(model(input_ids=ids()).logits, y)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_parameters() if "other" in name]
    assert torch.equal(model(input_ids=ids()).logits, y)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids()).logits, base()(input_ids=ids()).logits)


def test_public_methods(experts: dict[str, str]) -> None:
    model = mine(experts)
    assert model.get_latest_scalings() is None
    model.enable_scalings_logging()
    model(input_ids=ids())
    model(input_ids=ids()[:, :3])
    model.disable_scalings_logging()
    model(input_ids=ids())
    assert [s.shape[1] for s in model.get_scalings_log()] == [5, 3]
    assert {length: places for length, (places, _) in model.get_bucketed_scalings_log().items()} == {5: [0], 3: [1]}
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    before = model(input_ids=ids()).logits
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0.0
    assert torch.equal(model(input_ids=ids()).logits, base()(input_ids=ids()).logits)
    model.set_global_scaling_weight(1.0)
    model.set_topk_lora(1)
    assert not torch.equal(model(input_ids=ids()).logits, before)
    model.set_topk_lora(None)
    model.set_scaling_pass_value(None)
    assert model.peft_config["default"].scaling_pass_value == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_size": 12}, "`hidden_size` is 12, the model's is 16"),
        ({"adapters": {}}, "`adapters` names none"),
        ({"top_k_lora": 3}, "`top_k_lora` is 3, but there are 2 adapters"),
        ({"enable_softmax_topk": True}, "but all are used"),
        ({"adapters": {"0": "nowhere/at-all-here/x"}}, "nowhere"),
    ],
)
def test_options_that_do_not_fit_are_refused(experts: dict[str, str], options: dict[str, Any], says: str) -> None:
    with pytest.raises(PeftcError, match=says) as caught:
        get_peft_model(base(), XLoraConfig(**{"adapters": experts, **options}))
    place = str(caught.value.diagnostics[0].where)
    assert place in ("nowhere/at-all-here/x", f"`$.adapters.default.{next(iter(options))}`")


def test_what_cannot_be_weighed_is_refused(experts: dict[str, str], tmp_path: Path) -> None:
    model = mine(experts)
    with pytest.raises(PeftcError, match="PC508"):
        model.merge_adapter()
    with pytest.raises(PeftcError, match="PC521"):
        model(input_ids=ids(), past_key_values=[()])
    with pytest.raises(PeftcError, match="PC521"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(PeftcError, match="PC521"):
        inject_adapter_in_model(XLoraConfig(adapters=experts), base())
    other = peft.get_peft_model(base(), peft.IA3Config(task_type="CAUSAL_LM"))
    other.save_pretrained(tmp_path)
    with pytest.raises(PeftcError, match="PC522"):
        get_peft_model(base(), XLoraConfig(adapters={"0": str(tmp_path)}))


def test_a_name_that_no_folder_has_is_not_looked_for_beside(experts: dict[str, str], tmp_path: Path) -> None:
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={"9" * 300: experts["0"]})
    config.save_pretrained(tmp_path)
    with pytest.raises(PeftcError):
        PeftModel.from_pretrained(base(), tmp_path)
