"""Saving and loading through a live model: what is refused or warned of leaves model and files as they were.

Every rule here has a mutation, a small defect put into peftc, under which its case fails: so the case can fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from peftc import PeftModel, get_peft_model, rules
from peftc.checkpoint import card as checkpoint_card
from peftc.checkpoint import keys, report
from peftc.checkpoint import weights as weights_file
from peftc.config import hub
from peftc.diagnostics import Rule
from peftc.model.parts import card, embeddings, files, loading, starts
from peftc.runtime.session import ties
from peftc.testing.models import seeded
from tests.defects import put_defect
from tests.runtime.methods import Net, adapted, stretch
from tests.runtime.refused import Image, found_wrong, told
from tests.runtime.saving import FACTORS, language_model, moved, tied, wrapped

pytestmark = pytest.mark.usefixtures("without_hub")


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
    "a beginning that cannot be put beside": Case(
        rules.OTHER_WEIGHTS, lambda folder: adapted(stretch()), lambda m, p: m.save_pretrained(p / "new", path_initial_model_for_weight_conversion=True),
        (starts, "if wide is None or own is None:", "if False:"), "is no product of two factors",
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
    if wrong := found_wrong(case.rule, case.says, found):
        return wrong
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
