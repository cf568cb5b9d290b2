"""Saving and loading through a live model: which tensors, under which names, from where; and what is refused or warned of.

Every rule here has a mutation, a small defect put into peftc, under which its case fails: so the case can fail.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftc import PeftcError, PeftcWarning, PeftModel, get_peft_model, rules
from peftc.checkpoint import card as checkpoint_card
from peftc.checkpoint import keys, report
from peftc.checkpoint import weights as weights_file
from peftc.config import hub
from peftc.diagnostics import Rule
from peftc.model.parts import card, embeddings, files, loading
from peftc.runtime.session import ties
from peftc.testing.models import seeded
from tests.defects import put_defect
from tests.runtime.methods import LANGUAGE_MODEL, Net, adapted, narrow, preface, prompted, stretch, x
from tests.runtime.test_rules import Image, told

FACTORS = ["q_proj", "v_proj"]
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
ROWS = 7


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here asks the hub; what it would ask is not in a cache."""

    def unreachable(*args: Any, **kwargs: Any) -> Path:
        raise PeftcError(rules.HUB_UNAVAILABLE("The hub is not asked in tests", fix=""))

    monkeypatch.setattr(embeddings, "fetch", unreachable)
    embeddings._from_hub.cache_clear()
    yield
    embeddings._from_hub.cache_clear()


@pytest.fixture
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp())
    yield place
    shutil.rmtree(place)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def moved(model: nn.Module) -> nn.Module:
    """Every trainable tensor moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))
    return model


def language_model(folder: Path | None = None, tied: bool = False, resized: bool = False) -> Any:
    """A small one; `folder` gets the original, whatever is done afterwards."""
    model: Any = LANGUAGE_MODEL.build()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    if folder is not None:
        model.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = str(folder)
    if resized:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            model.resize_token_embeddings(model.config.vocab_size + ROWS, mean_resizing=False)
    return model


def wrapped(base: nn.Module, targets: list[str] = FACTORS, **options: Any) -> Any:
    return moved(get_peft_model(base, narrow(target_modules=targets, task_type="CAUSAL_LM", **options)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**LANGUAGE_MODEL.arguments()).logits
    return out


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


# what is refused, or warned of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model in a folder, something asked of it, what is said, and the defect that keeps it from being said."""

    rule: Rule
    start: Callable[[Path], Any]
    act: Callable[[Any, Path], object]
    defect: tuple[ModuleType, str, str]
    says: str


def net(folder: Path) -> Any:
    moved(adapted()).save_pretrained(folder / "adapter")
    return adapted()


def named(name: str) -> Callable[[Path], Any]:
    def start(folder: Path) -> Any:
        model = language_model()
        model.name_or_path = model.config._name_or_path = name
        return wrapped(model)

    return start


def of_resized(folder: Path) -> Any:
    wrapped(language_model(folder / "base", resized=True)).save_pretrained(folder / "adapter")
    return wrapped(language_model())


def of_another_method(folder: Path) -> Any:
    get_peft_model(Net(), stretch()).save_pretrained(folder / "adapter")
    return adapted()


def same_net() -> Net:
    """The base of `adapted`."""
    with seeded(0):
        return Net()


def with_card(text: bytes) -> Callable[[Path], Any]:
    def start(folder: Path) -> Any:
        (folder / "README.md").write_bytes(text)
        return adapted()

    return start


def broken_config(folder: Path) -> Any:
    model = wrapped(language_model(folder / "base"))
    (folder / "base" / "config.json").write_text("{")
    return model


def tied(*targets: str, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: wrapped(language_model(tied=True), list(targets), **options)


def unreachable_hub(model: Any, folder: Path) -> object:
    class Api:
        def __init__(self, **options: Any) -> None: ...

        def create_repo(self, *args: Any, **options: Any) -> Any:
            raise OSError("no connection")

    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", Api)
        return model.push_to_hub("somebody/something")


PARTED = (ties, "if not parted:", "if True:")

CASES = {
    "two keys become one": Case(
        rules.KEYS_COLLIDE, net, lambda m, p: m.load_adapter(p / "adapter", "new", key_mapping={"first|second": "first"}),
        (keys, "if new in found:", "if False:"), "`key_mapping` makes `base_model.model.first.narrow_A.weight` of both",
    ),
    "a mapping that is no expression": Case(
        rules.BAD_PATTERN, net, lambda m, p: m.load_adapter(p / "adapter", "new", key_mapping={"(": ""}),
        (keys, "Pattern(text, deadline, \"key_mapping\")", "Pattern(text[:0], deadline, \"key_mapping\")"), "`(` is not a regular expression",
    ),
    "a replacement that is none": Case(
        rules.BAD_PATTERN, net, lambda m, p: m.load_adapter(p / "adapter", "new", key_mapping={"first": r"\7"}),
        (keys, "pattern.replaced(replacement, name)", "pattern.replaced(replacement[:0], name)"), "invalid group reference",
    ),
    "a device that is none": Case(
        rules.BAD_VALUE, net, lambda m, p: m.load_adapter(p / "adapter", "new", torch_device="gpu"),
        (weights_file, "except (RuntimeError, TypeError) as error:", "except ZeroDivisionError as error:"), "`gpu` is no device",
    ),
    "a config that is none": Case(
        rules.BAD_VALUE, net, lambda m, p: PeftModel.from_pretrained(Net(), p / "adapter", config={"r": 2}),
        (loading, "elif not isinstance(config, PeftConfig):", "elif False:"), "`config` is a dict",
    ),
    "an offload that is not done": Case(
        rules.WITHOUT_EFFECT, net, lambda m, p: PeftModel.from_pretrained(same_net(), p / "adapter", ephemeral_gpu_offload=True),
        (loading, "if options.ephemeral_gpu_offload:", "if False:"), "`ephemeral_gpu_offload` has no effect",
    ),
    "a choice that is none": Case(
        rules.BAD_VALUE, net, lambda m, p: m.save_pretrained(p / "new", save_embedding_layers="yes"),
        (embeddings, "if choice not in (True, False, AUTO):", "if False:"), "`save_embedding_layers` cannot be `yes`",
    ),
    "embeddings that are not known": Case(
        rules.EMBEDDINGS_UNKNOWN, net, lambda m, p: m.save_pretrained(p / "new", save_embedding_layers=True),
        (embeddings, "if not found and choice is True", "if False"), "They are not in the checkpoint",
    ),
    "a vocabulary that cannot be compared": Case(
        rules.VOCABULARY_UNKNOWN, named("somebody/something"), lambda m, p: m.save_pretrained(p / "new"),
        (embeddings, "warn([rules.VOCABULARY_UNKNOWN(what, fix=fix)])", "pass"), "The vocabulary is taken as unchanged",
    ),
    "a base whose config is cut short": Case(
        rules.VOCABULARY_UNKNOWN, broken_config, lambda m, p: m.save_pretrained(p / "new"),
        (embeddings, "except PeftcError as error:\n        what", "except ZeroDivisionError as error:\n        what"), "The config is not JSON",
    ),
    "a conversion that is not there": Case(
        rules.OPTION_NOT_AVAILABLE, net, lambda m, p: m.save_pretrained(p / "new", path_initial_model_for_weight_conversion="x"),
        (files, "if path_of_start is not None:", "if False:"), "is not available",
    ),
    "a state dict of something else": Case(
        rules.SAVE_INCOMPLETE, net, lambda m, p: m.save_pretrained(p / "new", state_dict={"a": torch.ones(1)}),
        (files, "    if lacking:", "    if False:"), "`state_dict` has nothing for `base_model.model.first.narrow_A.weight`",
    ),
    "a base that was not resized": Case(
        rules.SHAPES_DIFFER, of_resized, lambda m, p: m.load_adapter(p / "adapter", "default"),
        (report, "elif len(rows) == 1:", "elif False:"), "call `model.resize_token_embeddings(",
    ),
    "an adapter of another method": Case(
        rules.MIXED_TYPES, of_another_method, lambda m, p: m.load_adapter(p / "adapter", "default", is_trainable=True),
        (files, "    model._refuse_type(config)\n", "\n"), "`STRETCH` cannot join",
    ),
    "a card that cannot be understood": Case(
        rules.CARD_UNREADABLE, with_card(b"---\ntags: [a\n---\nMine."), lambda m, p: m.save_pretrained(p),
        (hub, "except (ValueError, TypeError, YAMLError) as error:", "except ZeroDivisionError as error:"), "The front matter of the model card is not valid",
    ),
    "a card that is not text": Case(
        rules.CARD_UNREADABLE, with_card(b"\xff\xfe"), lambda m, p: m.create_or_update_model_card(p),
        (checkpoint_card, "except UnicodeDecodeError as error:", "except ZeroDivisionError as error:"), "cannot be read",
    ),
    "a folder that is a file": Case(
        rules.SAVE_FAILED, with_card(b"Mine."), lambda m, p: m.create_or_update_model_card(p / "README.md" / "below"),
        (card, "except OSError as error:", "except ZeroDivisionError as error:"), "could not be",
    ),
    "a hub that does not answer": Case(
        rules.PUSH_FAILED, net, unreachable_hub,
        (hub, "return rules.PUSH_FAILED(", "return rules.HUB_UNAVAILABLE("), "no connection",
    ),
    "merging a tied head": Case(
        rules.TIE_BROKEN, tied(*FACTORS, "lm_head"), lambda m, p: m.merge_and_unload(), PARTED,
        "set `model.config.tie_word_embeddings = False` before merging",
    ),
}  # fmt: skip


def failure(case: Case, folder: Path) -> str:
    """Why the case fails; empty if it holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.start(folder)
    before, mine = Image(model), _texts(folder)
    try:
        found = told(lambda: case.act(model, folder))
    except Exception as error:  # whatever a defect lets through
        return f"{type(error).__name__}: {error}"
    if {diagnostic.code for diagnostic in found} != {case.rule.code}:
        return f"not {case.rule.code}: {[str(diagnostic) for diagnostic in found]}"
    if case.says not in "\n".join(map(str, found)):
        return f"not in so many words: {found[0]}"
    if not Image(model).is_of(before):
        return "the model is another"
    after = _texts(folder)
    return "" if all(after.get(file) == content for file, content in mine.items()) else "a file is another"


def _texts(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_told_and_nothing_changes(case: Case, folder: Path) -> None:
    assert failure(case, folder) == ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_case_fails_under_a_defect(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, *case.defect)
    assert failure(case, folder) != ""


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
