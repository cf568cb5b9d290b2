"""What docs/reference-bugs.md says of the reference, and of peftc, is so: each row is tried on both, side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftc
from peftc import PeftcError
from tests.golden.models import base_model


class Small(nn.Module):
    """Three linear layers in a row; `(batch, 16)` to `(batch, 4)`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


def warned(action: Callable[[], Any]) -> list[str]:
    """Texts of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


def quietly(action: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def lora(library: ModuleType, **options: Any) -> Any:
    return library.get_peft_model(Small(), library.LoraConfig(**({"r": 4, "target_modules": ["a"]} | options)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["a", "bee"]}, "bee"),
        ({"modules_to_save": ["nope"]}, "nope"),
        ({"target_modules": ["a", "head"], "modules_to_save": ["head"]}, "head"),
        ({"r": 64}, "64"),
    ],
    ids=["half of the targets", "module to save", "target that is saved whole", "rank beyond the layer"],
)
def test_options_without_effect_are_told(options: dict[str, Any], named: str) -> None:
    assert warned(lambda: lora(peft, **options)) == []
    assert any(f"{named}" in text for text in warned(lambda: lora(peftc, **options)))


@pytest.mark.parametrize("rank", ["8", None])
def test_values_of_another_type_are_refused(rank: object) -> None:
    assert peft.LoraConfig(r=rank).r == rank
    with pytest.raises(PeftcError):
        peftc.LoraConfig(r=rank)


def test_disabling_leaves_a_frozen_adapter_frozen() -> None:
    def trainable_after(library: ModuleType) -> bool:
        model = lora(library, inference_mode=True)
        with model.disable_adapter():
            pass
        return any(p.requires_grad for p in model.parameters())

    assert trainable_after(peft)
    assert not trainable_after(peftc)


def test_unmerging_in_bfloat16_restores_the_weights() -> None:
    def changed(library: ModuleType) -> float:
        base = Small().bfloat16()
        before = base.a.weight.clone()
        config = library.LoraConfig(r=4, target_modules=["a"], init_lora_weights=False)
        model = library.get_peft_model(base, config, autocast_adapter_dtype=False)
        model.merge_adapter()
        model.unmerge_adapter()
        return (model.base_model.model.a.base_layer.weight != before).float().mean().item()

    assert changed(peft) > 0.05
    assert changed(peftc) == 0


def test_merging_one_of_two_active_adapters_leaves_the_other_in_effect() -> None:
    def difference(library: ModuleType) -> float:
        options = {"init_lora_weights": False}
        model = lora(library, **options)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["a"], **options))
        model.base_model.model.a.set_adapter(["default", "other"])
        x = torch.randn(2, 16)
        before = model(x)
        model.merge_adapter(["default"])
        return (model(x) - before).abs().max().item()

    assert difference(peft) > 0.01
    assert difference(peftc) < 1e-5


def test_unmerging_a_scale_of_zero_restores_the_weights() -> None:
    def difference(library: ModuleType) -> float:
        model = library.get_peft_model(Small(), library.IA3Config(target_modules=["a"], feedforward_modules=[]))
        layer = model.base_model.model.a
        before = layer.base_layer.weight.clone()
        with torch.no_grad():
            layer.ia3_l["default"][3] = 0
        model.merge_adapter()
        model.unmerge_adapter()
        return (layer.base_layer.weight - before).abs().max().item()

    assert quietly(lambda: difference(peft)) > 0.01
    assert difference(peftc) == 0


@pytest.mark.parametrize(("config", "scaled"), [("LoHaConfig", {}), ("LoKrConfig", {"rank_dropout_scale": True})])
def test_a_dropout_that_takes_every_row_drops_the_update(config: str, scaled: dict[str, bool]) -> None:
    def output(library: ModuleType) -> Tensor:
        options = getattr(library, config)(
            r=2, target_modules=["a"], init_weights=False, rank_dropout=0.999999, **scaled
        )
        return library.get_peft_model(Small(), options).train()(torch.ones(2, 16))

    assert output(peft).isnan().all()
    assert torch.equal(output(peftc), Small()(torch.ones(2, 16)))


def test_an_update_of_the_weight_itself_is_told_as_a_change() -> None:
    def added(library: ModuleType) -> float:
        config = library.HiraConfig(r=2, target_modules=["a"], init_weights=False)
        layer, x = library.get_peft_model(Small(), config).base_model.model.a, torch.ones(2, 16)
        return (layer(x) - layer.base_layer(x) - x @ layer.get_delta_weight("default").T).abs().max().item()

    assert added(peft) > 0.01
    assert added(peftc) < 1e-5


@pytest.mark.parametrize(("options", "told_by_reference"), [({"r": 3}, True), ({"r": 4, "apply_GS": True}, False)])
def test_a_start_that_changes_the_model_is_told(options: dict[str, Any], told_by_reference: bool) -> None:
    def start(library: ModuleType) -> Any:
        return library.get_peft_model(Small(), library.HRAConfig(target_modules=["a"], **options))

    assert bool(warned(lambda: start(peft))) == told_by_reference
    assert any("PC104" in text for text in warned(lambda: start(peftc)))
    model, x = quietly(lambda: start(peftc)), torch.randn(2, 16)
    with model.disable_adapter():
        base = model(x)
    assert not torch.allclose(model(x), base)


def test_loading_a_file_without_any_key_of_the_adapter_is_an_error(tmp_path: Path) -> None:
    saved = lora(peft)
    saved.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"x.{key}": tensor for key, tensor in load_file(file).items()}, file)

    assert warned(lambda: saved.load_adapter(tmp_path, "second")) == []
    model = lora(peftc)
    with pytest.raises(PeftcError, match=r"x\.base_model"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


def both_ways(action: Callable[[ModuleType], Any]) -> tuple[Any, Any]:
    """The same with the reference and with peftc."""
    return quietly(lambda: action(peft)), quietly(lambda: action(peftc))


def test_combining_rank_stabilised_adapters_scales_as_asked() -> None:
    def factor(library: ModuleType) -> float:
        model = lora(library, use_rslora=True, init_lora_weights=False)
        model.add_weighted_adapter(["default"], [1.0], "same")
        layer = model.base_model.model.a
        return (layer.get_delta_weight("same").norm() / layer.get_delta_weight("default").norm()).item()

    assert both_ways(factor) == (pytest.approx(2.0, rel=1e-3), pytest.approx(1.0, rel=1e-3))


def test_combined_ranks_are_those_of_the_config(tmp_path: Path) -> None:
    def loads_again(library: ModuleType) -> bool:
        model = lora(library, target_modules=["a", "b"], rank_pattern={"b": 2}, init_lora_weights=False)
        model.add_weighted_adapter(["default"], [0.5], "halved")
        model.save_pretrained(str(tmp_path), selected_adapters=["halved"])
        try:
            library.PeftModel.from_pretrained(Small(), str(tmp_path / "halved"))
        except RuntimeError:
            return False
        return True

    assert both_ways(loads_again) == (False, True)


def test_a_combination_has_the_trained_module() -> None:
    def trained(library: ModuleType) -> bool:
        model = lora(library, modules_to_save=["head"])
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["default"].weight.fill_(7.0)
        model.add_adapter("second", library.LoraConfig(r=4, target_modules=["a"]))
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", "cat")
        return bool((model.base_model.model.head.modules_to_save["both"].weight == 7).all())

    assert both_ways(trained) == (False, True)


def test_combining_under_a_taken_name_is_told() -> None:
    assert warned(lambda: lora(peft).add_weighted_adapter(["default"], [2.0], "default")) == []
    with pytest.raises(PeftcError, match="PC501"):
        lora(peftc).add_weighted_adapter(["default"], [2.0], "default")


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_saved_after_an_exchange_acts_as_before(padded: bool, tmp_path: Path) -> None:
    from peft.utils import hotswap

    x = torch.randn(3, 16)
    lora(peft, lora_alpha=32, init_lora_weights=False).save_pretrained(tmp_path / "other")

    def difference(library: ModuleType) -> float:
        functions: Any = hotswap if library is peft else peftc
        model = lora(library, init_lora_weights=False)
        if padded:
            functions.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        else:
            functions.hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
        model.save_pretrained(str(tmp_path / "again"))
        loaded = library.PeftModel.from_pretrained(Small(), str(tmp_path / "again"))
        return (model(x) - loaded(x)).abs().max().item()

    theirs, ours = both_ways(difference)
    assert theirs > 0.01
    assert ours == pytest.approx(0, abs=1e-6)


# adaption prompts -----------------------------------------------------------------------------------------------------


def tiny_llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **options)).eval()


def adaption(library: ModuleType, layers: int = 2, base: Any = None) -> Any:
    config = library.AdaptionPromptConfig(adapter_len=3, adapter_layers=layers)
    return library.get_peft_model(tiny_llama() if base is None else base, config)


def test_a_closed_gate_beside_biases_changes_nothing() -> None:
    def difference(library: ModuleType) -> float:
        base, ids = tiny_llama(attention_bias=True), torch.arange(6)[None]
        for name, p in base.named_parameters():
            if name.endswith("bias"):
                p.data.fill_(0.3)
        before = base(ids).logits
        return (adaption(library, base=base)(ids).logits - before).abs().max().item()

    assert difference(peft) > 0.001
    assert difference(peftc) == 0


def test_adaption_prompts_in_heads_of_their_own_width() -> None:
    ids = torch.arange(6)[None]
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        adaption(peft, base=tiny_llama(head_dim=12))(ids)
    assert adaption(peftc, base=tiny_llama(head_dim=12))(ids).logits.shape == (1, 6, 20)


@pytest.mark.parametrize(("layers", "adapted"), [(0, 3), (-1, 2)])
def test_numbers_of_layers_that_mean_nothing_are_refused(layers: int, adapted: int) -> None:
    assert sum("adaption_gate" in name for name, _ in adaption(peft, layers).named_parameters()) == adapted
    with pytest.raises(PeftcError, match="PC102"):
        adaption(peftc, layers)


def test_an_adaption_prompt_aside_follows_the_model() -> None:
    def devices(library: ModuleType) -> set[str]:
        model = adaption(library)
        model.add_adapter("other", library.AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
        model.to("meta")
        model.set_adapter("other")
        return {p.device.type for p in model.parameters()}

    assert devices(peft) == {"cpu", "meta"}
    assert devices(peftc) == {"meta"}


def test_an_adaption_prompt_loaded_for_inference_is_frozen(tmp_path: Path) -> None:
    adaption(peft).save_pretrained(tmp_path)
    theirs, ours = (library.PeftModel.from_pretrained(tiny_llama(), tmp_path) for library in (peft, peftc))
    assert any(p.requires_grad for p in theirs.parameters())
    assert not any(p.requires_grad for p in ours.parameters())


def two_rows(library: ModuleType, train: bool = False) -> Tensor:
    model = lora(library, modules_to_save=["head"], init_lora_weights=False)
    model.add_adapter("other", library.LoraConfig(r=4, target_modules=["b"]))
    with torch.no_grad():
        return model.train(train)(torch.ones(2, 16), adapter_names=["default", "other"])


def test_a_row_whose_adapter_does_not_train_the_module_whole() -> None:
    with pytest.raises(KeyError):
        two_rows(peft)
    torch.testing.assert_close(two_rows(peftc)[1], Small()(torch.ones(16)))


def test_rows_in_training_and_of_other_methods() -> None:
    with pytest.raises(ValueError, match="training mode"):
        two_rows(peft, train=True)
    assert two_rows(peftc, train=True).shape == (2, 4)

    def ignored(library: ModuleType) -> bool:
        config = library.HRAConfig(r=2, target_modules=["a"], init_weights=False)
        model, x = library.get_peft_model(Small(), config).eval(), torch.ones(1, 16)
        return torch.equal(model(x, adapter_names=["__base__"]), model(x))

    assert ignored(peft)
    assert not ignored(peftc)


def test_reflections_over_another_method_leave_it_acting() -> None:
    def effect(library: ModuleType) -> float:
        model, x = Small(), torch.ones(1, 16)
        library.inject_adapter_in_model(
            library.LoraConfig(r=4, target_modules=["a"], init_lora_weights=False), model, "a"
        )
        before = model(x)
        library.inject_adapter_in_model(
            library.HRAConfig(r=2, target_modules=["a"]), model, "b"
        )  # the identity at first
        return (model(x) - before).abs().max().item()

    assert quietly(lambda: effect(peft)) > 0.01
    assert effect(peftc) < 1e-5


def test_a_mixed_model_has_files_and_a_status(tmp_path: Path) -> None:
    def mixed(library: ModuleType) -> Any:
        return library.get_peft_model(Small(), library.LoraConfig(r=4, target_modules=["a"]), mixed=True)

    with pytest.raises(NotImplementedError):
        mixed(peft).save_pretrained(tmp_path)
    with pytest.raises(TypeError):
        mixed(peft).get_model_status()
    with pytest.raises(ValueError, match="not compatible"):
        mixed(peft).add_adapter("other", peft.IA3Config(target_modules=["a"], feedforward_modules=[]))
    model = mixed(peftc)
    model.add_adapter("other", peftc.IA3Config(target_modules=["a"], feedforward_modules=[]))
    model.save_pretrained(tmp_path)
    assert peft.PeftModel.from_pretrained(Small(), str(tmp_path / "other")).active_adapter == "default"
    assert model.get_model_status().num_adapter_layers == 2


# prompts --------------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def prompted(library: ModuleType, base: str, config: str, task: str | None = None, **options: Any) -> Any:
    """A golden base model with a prompt of three tokens."""
    task = task or {"bert_tok": "TOKEN_CLS", "bert_cls": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(base, "CAUSAL_LM")
    size = {} if "cpt_token_ids" in options else {"num_virtual_tokens": 3}
    made = getattr(library, config)(task_type=task, **size, **options)
    return library.get_peft_model(base_model(base), made).eval()


def test_a_prompt_for_another_task_can_be_disabled() -> None:
    def disabled(library: ModuleType) -> Tensor:
        model = prompted(library, "bert_cls", "PromptTuningConfig")
        with model.disable_adapter():
            return model(input_ids=IDS).logits

    with pytest.raises(UnboundLocalError):
        disabled(peft)
    assert torch.equal(disabled(peftc), base_model("bert_cls")(input_ids=IDS).logits)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_token_classification_with_labels(config: str) -> None:
    labels = torch.tensor([[0, 1, 2, -100], [2, 1, 0, 1]])
    if config == "PromptTuningConfig":
        with pytest.raises(ValueError, match="batch_size"):
            prompted(peft, "bert_tok", config)(input_ids=IDS, labels=labels)
    out = prompted(peftc, "bert_tok", config)(input_ids=IDS, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, -4:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected)


def test_a_prompt_that_is_loaded_can_be_trained_on(tmp_path: Path) -> None:
    prompted(peft, "llama", "PromptTuningConfig").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(base_model("llama"), str(tmp_path), is_trainable=True)
    ours = peftc.PeftModel.from_pretrained(base_model("llama"), str(tmp_path), is_trainable=True)
    assert ours.get_nb_trainable_parameters()[0] == 96


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("PromptTuningConfig", {"cache_implementation": "static"}),
        ("PrefixTuningConfig", {"cache_implementation": "static"}),
        ("PrefixTuningConfig", {"use_cache": False}),
    ],
)
def test_caches_that_the_reference_cannot_use(config: str, options: dict[str, Any]) -> None:
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "pad_token_id": 0}
    ours = prompted(peftc, "llama", config)
    expected = ours.generate(**call)
    assert torch.equal(ours.generate(**call, **options), expected)
    try:
        found = prompted(peft, "llama", config).generate(**call, **options)
    except (KeyError, RuntimeError):
        return
    assert not torch.equal(found, expected)  # since transformers 5.24 it leaves a prefix out


def test_checkpointing_that_is_switched_on_later() -> None:
    theirs = quietly(lambda: prompted(peft, "llama", "PrefixTuningConfig").train())
    with pytest.raises(RuntimeError, match="size of tensor"):
        quietly(
            lambda: (theirs.gradient_checkpointing_enable(), theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)))
        )
    ours = prompted(peftc, "llama", "PrefixTuningConfig").train()
    with pytest.raises(PeftcError, match="PC529"):
        ours.gradient_checkpointing_enable()


def test_a_decoder_generates_with_the_tokens_that_it_was_trained_with() -> None:
    """Step by step through `forward`, which both do alike."""

    def apart(library: ModuleType) -> bool:
        torch.manual_seed(1)
        model = prompted(library, "t5", "MultitaskPromptTuningConfig", num_tasks=2)
        with torch.no_grad():
            for p in model.prompt_encoder.parameters():
                p.normal_()
        tasks = {"task_ids": torch.tensor([0, 1])}
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **tasks, **options)
        seen = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(6):
            labels = torch.cat(
                [seen[:, 1:], torch.zeros(2, 1, dtype=torch.long)], dim=1
            )  # shifted right they are `seen`
            logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels, **tasks).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            seen = torch.cat([seen, logits.argmax(-1, keepdim=True)], dim=1)
        return not torch.equal(found, seen)

    assert apart(peft)
    assert not apart(peftc)


def test_a_prompt_that_started_from_another_loads_without_it(tmp_path: Path) -> None:
    prompted(peft, "t5", "MultitaskPromptTuningConfig").save_pretrained(str(tmp_path / "source"))
    file = tmp_path / "source" / "adapter_model.safetensors"
    start = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": str(file)}
    prompted(peft, "t5", "MultitaskPromptTuningConfig", **start).save_pretrained(str(tmp_path / "target"))
    file.unlink()
    with pytest.raises(FileNotFoundError):
        peft.PeftModel.from_pretrained(base_model("t5"), str(tmp_path / "target"))
    peftc.PeftModel.from_pretrained(base_model("t5"), str(tmp_path / "target"))


def test_labels_after_a_context_of_one_type() -> None:
    def loss(library: ModuleType) -> Tensor:
        return prompted(library, "llama", "CPTConfig", cpt_token_ids=[3, 4])(input_ids=IDS, labels=IDS).loss

    assert loss(peft).isnan()
    assert loss(peftc).isfinite()
