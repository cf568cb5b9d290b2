"""Saving and loading through a live model: which tensors, under which names, from where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftc import PeftcWarning, PeftModel, get_peft_model
from tests.runtime.methods import Net, adapted, narrow, preface, prompted, x
from tests.runtime.saving import EMBED, FACTORS, HEAD, language_model, logits, moved, tied, weights, wrapped

pytestmark = pytest.mark.usefixtures("without_hub")


@pytest.mark.parametrize("tied", [False, True], ids=["two", "tied"])
def test_saved_as_torch_saves_and_read_as_data(tied: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the safetensors of an earlier save, which readers would prefer; nothing is unpickled."""
    model = wrapped(language_model(tied=tied))
    model.save_pretrained(folder)
    moved(model)
    model.save_pretrained(folder, safe_serialization=False)
    assert not (folder / "adapter_model.safetensors").exists()
    assert torch.load(folder / "adapter_model.bin").keys() == model.adapter_tensors("default").keys()
    monkeypatch.setattr("torch.load", None)
    again = PeftModel.from_pretrained(language_model(tied=tied), folder)
    assert torch.equal(logits(again), logits(model.eval()))


# which tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["two", "tied"])
@pytest.mark.parametrize("resized", [False, True], ids=["as it was", "resized"])
@pytest.mark.parametrize("choice", ["auto", True, False])
def test_embeddings_are_saved_if_they_were_resized_or_are_asked_for(
    choice: str | bool, resized: bool, tied: bool, folder: Path
) -> None:
    model = wrapped(language_model(folder / "base", tied, resized))
    model.save_pretrained(folder / "adapter", save_embedding_layers=choice)
    whole = {key for key in weights(folder / "adapter") if "narrow_" not in key}
    expected = choice is True or (choice == "auto" and resized)
    assert whole == ({f"{EMBED}.weight", f"{HEAD}.weight"} if expected else set())


def test_adapted_embeddings_are_saved_unless_single_rows_are_trained(folder: Path) -> None:
    model = wrapped(language_model(), ["lm_head"])
    assert set(model.adapter_tensors("default")) > {f"{HEAD}.base_layer.weight"}
    assert f"{EMBED}.weight" not in model.adapter_tensors("default", True)
    assert f"{HEAD}.base_layer.weight" not in model.adapter_tensors("default", False)


def test_a_copy_that_is_trained_is_saved_once(folder: Path) -> None:
    model = wrapped(language_model(folder / "base", resized=True), modules_to_save=["lm_head"])
    model.save_pretrained(folder / "adapter")
    found = weights(folder / "adapter")
    assert {key for key in found if "narrow_" not in key} == {f"{EMBED}.weight", f"{HEAD}.weight"}
    assert torch.equal(found[f"{HEAD}.weight"], model.base_model.model.lm_head.modules_to_save["default"].weight)


@pytest.mark.parametrize("tied", [False, True], ids=["two", "tied"])
def test_resized_embeddings_come_back_and_go_again(tied: bool, folder: Path) -> None:
    model = wrapped(language_model(folder / "base", tied, resized=True))
    model.save_pretrained(folder / "adapter")
    base = language_model(tied=tied, resized=True)
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1)
    before, own = logits(base), base.model.embed_tokens.weight
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_base_model().model.embed_tokens.weight is own
    assert base.lm_head.weight is own or not tied
    loaded.load_adapter(folder / "adapter", "default")
    loaded.load_adapter(folder / "adapter", "again")
    assert torch.equal(logits(loaded.unload()), before)


def test_loading_again_puts_embeddings_back_that_were_changed_since(folder: Path) -> None:
    model = wrapped(language_model(folder / "base", resized=True))
    model.save_pretrained(folder / "adapter")
    expected = logits(model)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight.mul_(2)
    assert not torch.equal(logits(model), expected)
    model.load_adapter(folder / "adapter", "default", is_trainable=True)
    assert torch.equal(logits(model), expected)


def test_a_prompt_with_a_resized_vocabulary(folder: Path) -> None:
    model = get_peft_model(language_model(folder / "base", resized=True), preface())
    model.save_pretrained(folder / "adapter")
    root = "base_model."
    assert set(weights(folder / "adapter")) == {
        "prompt_embeddings", f"{root}model.embed_tokens.weight", f"{root}lm_head.weight",
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(language_model(resized=True), folder / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_tensors_are_taken_from_a_gathered_state_dict(folder: Path) -> None:
    model = adapted(narrow(modules_to_save=["head"]), other=narrow())
    gathered = {f"module._orig_mod.{key}": tensor + 1 for key, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=gathered)
    for place, name in ((folder, "default"), (folder / "other", "other")):
        plain = model.adapter_tensors(name)
        assert weights(place).keys() == plain.keys()
        assert all(torch.equal(tensor, plain[key] + 1) for key, tensor in weights(place).items())


def test_a_prompt_is_computed_from_a_gathered_state_dict() -> None:
    model = prompted()
    gathered = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    (plain,), (given,) = (model.adapter_tensors("default", state_dict=s).values() for s in (None, gathered))
    assert torch.equal(given, plain + 1)


def test_frozen_tensors_may_be_left_out_of_a_gathered_state_dict(folder: Path) -> None:
    model = wrapped(language_model(folder / "base", resized=True))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = model.adapter_tensors("default", state_dict=trained)
    assert found.keys() == model.adapter_tensors("default").keys()


def test_only_the_main_process_writes_and_further_keywords_are_accepted(folder: Path) -> None:
    model = adapted(other=narrow())
    model.save_pretrained(folder / "a", is_main_process=False)
    assert not (folder / "a").exists()
    model.save_pretrained(folder / "a", max_shard_size="5GB", variant=None, selected_adapters=["other"])
    assert sorted(p.name for p in (folder / "a").iterdir()) == ["README.md", "other"]
    model.save_pretrained(folder / "b")
    assert sorted(p.name for p in (folder / "b").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "other", "peftc_base.json", "peftc_plan.json",
    ]  # fmt: skip
    assert not (folder / "b" / "other" / "README.md").exists()


# loading --------------------------------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """The net inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_keys_are_renamed_by_expressions(folder: Path) -> None:
    model = moved(adapted())
    model.save_pretrained(folder)
    mapping = {r"^(first|second)\.": r"inner.\1.", r"first": "never"}
    loaded = PeftModel.from_pretrained(Renamed(), folder, key_mapping=mapping)
    assert torch.equal(*(m.adapter_tensors("default")[key] for m, key in zip(
        (loaded, model), ("base_model.model.inner.first.narrow_A.weight", "base_model.model.first.narrow_A.weight")
    , strict=True)))  # fmt: skip
    loaded.load_adapter(folder, "more", key_mapping=mapping, torch_device="cpu")
    assert loaded.adapter_tensors("more").keys() == loaded.adapter_tensors("default").keys()


def test_what_the_models_class_says_of_former_names_counts(folder: Path) -> None:
    class Told(Renamed):
        _checkpoint_conversion_mapping = {r"^(first|second)\.": r"inner.\1."}

    moved(adapted()).save_pretrained(folder)
    loaded = PeftModel.from_pretrained(Told(), folder)
    assert torch.equal(
        loaded.adapter_tensors("default")["base_model.model.inner.first.narrow_A.weight"],
        weights(folder)["base_model.model.first.narrow_A.weight"],
    )


def test_what_is_loaded_for_inference_is_in_evaluation_mode(folder: Path) -> None:
    moved(adapted()).save_pretrained(folder)
    model = PeftModel.from_pretrained(Net().train(), folder)
    assert not any(module.training for module in model.modules())
    model = PeftModel.from_pretrained(Net().train(), folder, is_trainable=True)
    assert model.training and model.get_base_model().training
    model.load_adapter(folder, "more", is_trainable=True)
    assert model.training
    model.load_adapter(folder, "third")
    assert not any(module.training for module in model.modules())


def test_a_config_that_is_given_is_used_itself(folder: Path) -> None:
    moved(adapted()).save_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    config = narrow()
    model = PeftModel.from_pretrained(Net(), folder, config=config)
    assert model.peft_config["default"].inference_mode
    assert torch.equal(
        model.adapter_tensors("default")["base_model.model.first.narrow_A.weight"],
        weights(folder)["base_model.model.first.narrow_A.weight"],
    )


def test_an_adapter_in_a_subfolder(folder: Path) -> None:
    adapted(other=narrow(r=3)).save_pretrained(folder)
    assert PeftModel.from_pretrained(Net(), folder, subfolder="other").peft_config["default"].r == 3


def test_tensors_of_another_shape_are_left_out_on_demand(folder: Path) -> None:
    moved(adapted()).save_pretrained(folder)
    stored = weights(folder)
    key = "base_model.model.second.narrow_B.weight"
    save_file({**stored, key: torch.ones(3, 2)}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.warns(PeftcWarning, match="PC606"):
        model = PeftModel.from_pretrained(Net(), folder, ignore_mismatched_sizes=True)
    found = model.adapter_tensors("default")
    assert all(torch.equal(found[name], stored[name]) for name in stored if name != key)


# the model card -------------------------------------------------------------------------------------------------------


def test_the_card_is_at_the_root_and_keeps_what_a_person_wrote(folder: Path) -> None:
    model = adapted(other=narrow())
    model.save_pretrained(folder)
    card = folder / "README.md"
    text = card.read_text()
    model.save_pretrained(folder)
    assert card.read_text() == text
    assert "local" not in text and str(folder) not in text and "`other` (NARROW)" in text
    card.write_text(text.replace("Not described yet.", "Trained on poems.").replace("---\n", "---\nlicense: mit\n", 1))
    model.save_pretrained(folder)
    assert "Trained on poems." in card.read_text() and "license: mit" in card.read_text()
    model.create_or_update_model_card(folder / "new" / "place")
    assert "PEFT 0.21.2 (peftc" in (folder / "new" / "place" / "README.md").read_text()


def test_a_path_of_this_machine_is_not_in_the_card(folder: Path) -> None:
    wrapped(language_model(folder / "base")).save_pretrained(folder / "adapter")
    text = (folder / "adapter" / "README.md").read_text()
    assert str(folder) not in text and "base_model:" not in text and "pipeline_tag: text-generation" in text


# tied weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::peftc.PeftcWarning")
@pytest.mark.parametrize(
    "start", [tied(*FACTORS, modules_to_save=["lm_head"]), tied("lm_head")], ids=["copy", "adapted"]
)
def test_a_tied_head_is_merged_and_kept_if_the_config_lets_it_differ(
    start: Callable[[Path], Any], folder: Path
) -> None:
    model = start(folder)
    expected = logits(model)
    model.config.tie_word_embeddings = False
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(folder / "merged")
    again = type(merged).from_pretrained(folder / "merged").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_tied_weights_that_the_adapter_leaves_alone_are_no_obstacle() -> None:
    model = tied(*FACTORS)(Path())
    expected = logits(model)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_the_plan_beside_the_weights_names_what_they_are(folder: Path) -> None:
    adapted().save_pretrained(folder)
    assert json.loads((folder / "peftc_plan.json").read_text())["adapters"][0]["name"] == "default"
    assert x().shape == (5, 8)
