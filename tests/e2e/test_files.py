"""What lies in a folder after `save_pretrained`, beside the reference: files, keys, tensors, config, and the card's front matter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import peftc
from peftc.model.parts import embeddings

LIBRARIES: dict[str, Any] = {"peft": peft, "peftc": peftc}
IDS = torch.arange(4, 20)[None]
VOCABULARY = 40
pytestmark = [pytest.mark.filterwarnings("ignore")]

#: What only our folders have.
OURS = ("peftc_base.json", "peftc_plan.json")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither library asks the hub about base models."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    embeddings._from_hub.cache_clear()
    yield
    embeddings._from_hub.cache_clear()


def llama(name: str = "", *, tied: bool = False, rows: int = VOCABULARY, cls: Any = LlamaForCausalLM) -> Any:
    """A seeded model that says it is called `name`; `rows` beyond the vocabulary are added after it was made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = cls(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, pad_token_id=0, **sizes)).eval()
        if rows != VOCABULARY:
            model.resize_token_embeddings(rows, mean_resizing=False)
    model.name_or_path = model.config._name_or_path = name
    return model


def base_folder(place: Path, tied: bool = False) -> str:
    """A base model on the disk, as large as it was before anything was resized."""
    llama(tied=tied).save_pretrained(place / "base")
    return str(place / "base")


def adapted(library: str, base: Any, method: str = "LoraConfig", **options: Any) -> Any:
    lib = LIBRARIES[library]
    model = lib.get_peft_model(base, getattr(lib, method)(**{"task_type": "CAUSAL_LM", **options})).eval()
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)):
            parameter.copy_(torch.linspace(-0.1, 0.1 + index / 100, parameter.numel()).view(parameter.shape))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def front(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = ModelCard.load(folder / "README.md").data.to_dict()
    return data


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "no task": ("LoraConfig", {"task_type": None}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("LoraConfig", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("LoraConfig", {"target_modules": "(.*embed_tokens|lm_head|.*q_proj)"}),
    "copy": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "ia3": ("IA3Config", {}),
    "hra": ("HRAConfig", {"target_modules": ["q_proj"], "r": 2}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
}


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 7], ids=["as it was", "resized"])
@pytest.mark.parametrize("choice", ["auto", True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_files_with_the_same_tensors(
    case: tuple[str, dict[str, Any]], choice: str | bool, rows: int, tmp_path: Path
) -> None:
    base = base_folder(tmp_path)
    found = {}
    for library in LIBRARIES:
        adapted(library, llama(base, rows=rows), case[0], **case[1]).save_pretrained(
            str(tmp_path / library), save_embedding_layers=choice
        )
        found[library] = load_file(tmp_path / library / "adapter_model.safetensors")
    assert tree(tmp_path / "peftc") == {*tree(tmp_path / "peft"), *OURS}
    assert found["peftc"].keys() == found["peft"].keys()
    assert all(torch.equal(tensor, found["peft"][key]) for key, tensor in found["peftc"].items())


@pytest.mark.parametrize("tied", [False, True], ids=["two", "tied"])
@pytest.mark.parametrize(("writer", "reader"), [("peft", "peftc"), ("peftc", "peft"), ("peftc", "peftc")])
def test_resized_embeddings_go_from_one_to_the_other(writer: str, reader: str, tied: bool, tmp_path: Path) -> None:
    base = base_folder(tmp_path, tied)
    made = adapted(writer, llama(base, tied=tied, rows=VOCABULARY + 7))
    with torch.no_grad():
        made.get_base_model().model.embed_tokens.weight[-7:] += 1  # as if they were trained
    made.save_pretrained(str(tmp_path / "adapter"))
    fresh = llama(base, tied=tied, rows=VOCABULARY + 7)
    loaded = LIBRARIES[reader].PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(made), rtol=1e-4, atol=1e-5)
    if reader == "peftc":
        with pytest.raises(peftc.PeftcError, match=rf"resize_token_embeddings\({VOCABULARY + 7}\)"):
            peftc.PeftModel.from_pretrained(llama(base, tied=tied), str(tmp_path / "adapter"))


# the card -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cards_front_matter_is_the_references(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    for library in LIBRARIES:
        base = llama("somebody/base")
        base.add_model_tags(["poems"])
        adapted(library, base, case[0], **case[1]).save_pretrained(str(tmp_path / library))
    assert front(tmp_path / "peftc") == front(tmp_path / "peft")


def test_the_cards_front_matter_for_another_task(tmp_path: Path) -> None:
    for library in LIBRARIES:
        model = adapted(library, llama("somebody/base", cls=LlamaForSequenceClassification), task_type="SEQ_CLS")
        model.create_or_update_model_card(str(tmp_path))
        if library == "peft":
            theirs = front(tmp_path)
            (tmp_path / "README.md").unlink()
    assert front(tmp_path) == theirs and "pipeline_tag" not in theirs


def test_the_references_card_is_updated_without_what_leaked(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    adapted("peft", llama(base)).save_pretrained(str(tmp_path / "adapter"))
    assert base in (tmp_path / "adapter" / "README.md").read_text()
    adapted("peftc", llama(base)).save_pretrained(str(tmp_path / "adapter"))
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert base not in text and text.count("- PEFT ") == 1
    assert front(tmp_path / "adapter") == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "transformers"],
    }  # fmt: skip


# how others call it ---------------------------------------------------------------------------------------------------


def test_a_gathered_state_dict_gives_the_same_file(tmp_path: Path) -> None:
    for library in LIBRARIES:
        model = adapted(library, llama(), modules_to_save=["lm_head"])
        gathered = {key: tensor + 1 for key, tensor in model.state_dict().items()}
        model.save_pretrained(str(tmp_path / library), state_dict=gathered, max_shard_size="5GB")
    mine, theirs = (load_file(tmp_path / library / "adapter_model.safetensors") for library in ("peftc", "peft"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("mapping", [{r"^model\.layers": "model.blocks"}, {"q_proj": "query", "model": "never"}])
def test_keys_are_mapped_as_the_reference_does(mapping: dict[str, str], tmp_path: Path) -> None:
    from peft.utils import load_peft_weights

    from peftc.checkpoint import open_adapter

    adapted("peft", llama()).save_pretrained(str(tmp_path))
    theirs = load_peft_weights(str(tmp_path), device="cpu", key_mapping=mapping)
    mine = dict(open_adapter(tmp_path).mapped(mapping).items())
    assert mine.keys() == theirs.keys() != load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("keywords", [{}, {"low_cpu_mem_usage": True}, {"torch_device": "cpu"}], ids=str)
def test_loading_leaves_the_same_modes_and_gradients(
    keywords: dict[str, Any], is_trainable: bool, tmp_path: Path
) -> None:
    adapted("peft", llama()).save_pretrained(str(tmp_path))
    states = []
    for lib in LIBRARIES.values():
        model = lib.PeftModel.from_pretrained(llama().train(), str(tmp_path), is_trainable=is_trainable, **keywords)
        model.load_adapter(str(tmp_path), "more", is_trainable=is_trainable, **keywords)
        first = (type(model).__name__, model.training, model.get_base_model().training, model.active_adapters)
        trains = {name: p.requires_grad for name, p in model.named_parameters()}
        states.append((first, trains, model.peft_config["more"].inference_mode))
    assert states[1] == states[0]


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_loading_over_an_adapter_leaves_it_as_trainable_as_it_was(method: str, tmp_path: Path) -> None:
    """A trainer loads its best checkpoint so, and may train on."""
    states = []
    adapted("peft", llama(), method).save_pretrained(str(tmp_path))
    for library in LIBRARIES:
        model = adapted(library, llama(), method).train()
        before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.load_adapter(str(tmp_path), "default")
        after = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert before and all(after[name] is parameter for name, parameter in before.items())
        states.append((set(after), model.training, model.peft_config["default"].inference_mode))
    assert states[1] == states[0]


def test_saving_again_drops_a_persons_tags_in_the_reference_and_not_here(tmp_path: Path) -> None:
    tags = {}
    for library in LIBRARIES:
        model = adapted(library, llama())
        model.save_pretrained(str(tmp_path / library))
        card = ModelCard.load(tmp_path / library / "README.md")
        card.data.tags = ["poems"]
        card.save(tmp_path / library / "README.md")
        model.save_pretrained(str(tmp_path / library))
        tags[library] = front(tmp_path / library)["tags"]
    assert "poems" in tags["peftc"] and "poems" not in tags["peft"]


def test_merging_a_tied_head_changes_the_embeddings_too_in_the_reference() -> None:
    outputs = {}
    for library in LIBRARIES:
        model = adapted(library, llama(tied=True), target_modules=["lm_head"])
        before = logits(model)
        if library == "peftc":
            with pytest.raises(peftc.PeftcError, match="PC650"):
                model.merge_and_unload()
            assert torch.equal(logits(model), before)
            model.config.tie_word_embeddings = False
        outputs[library] = (logits(model.merge_and_unload()) - before).abs().max()
    assert outputs["peftc"] < 1e-5 < 1e-2 < outputs["peft"]


def test_pushing_loses_the_card_in_the_reference_and_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    cards = {}
    for library in LIBRARIES:
        model = adapted(library, llama("somebody/base"))
        model.add_adapter("second", LIBRARIES[library].LoraConfig(task_type="CAUSAL_LM"))
        cards[library] = _pushed(model, tmp_path / library, monkeypatch)
    assert tree(tmp_path / "peftc") == {*tree(tmp_path / "peft"), *OURS, *(f"second/{name}" for name in OURS)}
    assert cards["peft"]["library_name"] == "transformers"
    assert cards["peftc"] == {
        "base_model": "somebody/base", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:somebody/base", "lora", "transformers"],
    }  # fmt: skip


def _pushed(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The front matter that reaches the hub, whose client is replaced by one that copies files."""
    import shutil
    from types import SimpleNamespace

    import transformers.utils.hub as theirs
    from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError

    answer: Any = SimpleNamespace(headers={}, status_code=404, request=None)

    class Api:
        def __init__(self, **options: Any) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, *, operations: Any, **options: Any) -> None:
            for operation in operations:
                target = folder / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, target)

        def upload_folder(self, *, folder_path: str, **options: Any) -> None:
            shutil.copytree(folder_path, folder)

        def hf_hub_download(self, *args: Any, **options: Any) -> None:
            raise RemoteEntryNotFoundError("none", response=answer)

    def nothing_there(*args: Any, **options: Any) -> None:
        raise EntryNotFoundError("none")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(theirs, "hf_api", Api, raising=False)
    monkeypatch.setattr(theirs.ModelCard, "load", nothing_there)
    model.push_to_hub("somebody/thing")
    monkeypatch.undo()
    return front(folder)


# configs --------------------------------------------------------------------------------------------------------------


def test_a_config_saved_by_itself_is_the_references(tmp_path: Path) -> None:
    for library, lib in LIBRARIES.items():
        lib.LoraConfig(target_modules=["b", "a"]).save_pretrained(
            str(tmp_path / library), auto_mapping_dict={"base_model_class": "A"}
        )
    mine, theirs = (json.loads((tmp_path / lib / "adapter_config.json").read_text()) for lib in ("peftc", "peft"))
    assert mine.pop("peft_version").startswith(theirs.pop("peft_version"))
    assert {**mine, "target_modules": sorted(mine["target_modules"])} == {
        **theirs, "target_modules": sorted(theirs["target_modules"]),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = peft.PeftConfig.from_pretrained(str(tmp_path / "peftc"))
    assert read.peft_type == peftc.PeftType.LORA == peft.PeftType.LORA
