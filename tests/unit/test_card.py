"""The model card: front matter for the hub, an honest body, and a person's own words left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peftc.checkpoint.card import CardFacts, card_text, is_public, read_card

FACTS = CardFacts({None: "SOME"}, "somebody/base", ("some", "transformers"), "text-generation")


def front(text: str) -> dict[str, object]:
    data: dict[str, object] = ModelCard(text).data.to_dict()
    return data


def test_the_front_matter_of_a_new_card() -> None:
    assert front(card_text(FACTS)) == {
        "library_name": "peft",
        "base_model": "somebody/base",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:somebody/base", "some", "transformers"],
    }
    assert front(card_text(CardFacts({None: "SOME"}))) == {"library_name": "peft"}


def test_writing_again_changes_nothing() -> None:
    quantized = CardFacts({None: "SOME", "b": "SOME"}, "somebody/base", quantization={"bits": 4})
    for facts in (FACTS, quantized):
        text = card_text(facts)
        assert card_text(facts, text) == text


def test_what_a_person_wrote_stays() -> None:
    mine = "---\nlicense: mit\ntags: [poems]\npipeline_tag: fill-mask\n---\n\n# Mine\n\nTrained on poems.\n"
    text = card_text(FACTS, mine)
    data = front(text)
    assert (data["license"], data["pipeline_tag"]) == ("mit", "fill-mask")
    assert data["tags"] == ["base_model:adapter:somebody/base", "poems", "some", "transformers"]
    assert "# Mine\n\nTrained on poems.\n\n### Framework versions\n\n- PEFT 0.21.2 (peftc " in text
    assert "How to use" not in text


def test_a_card_without_front_matter_gets_one() -> None:
    text = card_text(FACTS, "Only words.\n")
    assert front(text)["library_name"] == "peft" and "Only words." in text


def test_the_version_is_one_line_below_its_heading() -> None:
    before = "---\n{}\n---\n# Mine\n\n### Framework versions\n\n- Torch 2.6\n- PEFT 0.11.0\n\n## After\n"
    text = card_text(FACTS, before.replace("{}", "license: mit"))
    assert text.count("- PEFT ") == 1 and "0.11.0" not in text
    assert text.index("- PEFT 0.21.2") < text.index("- Torch 2.6") < text.index("## After")


@pytest.mark.parametrize("heading", ["", "## Training procedure\n\nMuch.\n"])
def test_how_the_base_was_quantised_is_told_once(heading: str) -> None:
    facts = CardFacts({None: "SOME"}, quantization={"load_in_4bit": True, "bits": 4})
    text = card_text(facts, f"---\nlicense: mit\n---\n# Mine\n\n{heading}")
    assert text.count("## Training procedure") == text.count("- load_in_4bit: True\n- bits: 4\n") == 1
    assert card_text(facts, text) == text


@pytest.mark.parametrize("name", ["/home/me/base", "./base", "~/base", "C:\\base", "a/b/c"])
def test_a_path_is_never_written_and_is_removed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = CardFacts({None: "SOME"}, name)
    assert not is_public(name)
    assert name not in card_text(facts)
    leaked = f"---\nbase_model: {name}\ntags: ['base_model:adapter:{name}', 'poems']\n---\nText.\n"
    assert front(card_text(facts, leaked)) == {"library_name": "peft", "tags": ["poems"]}


def test_a_folder_here_is_no_repository_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_public("somebody/base") and front(card_text(FACTS))["base_model"] == "somebody/base"
    (tmp_path / "somebody" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "somebody/base" not in card_text(FACTS)


def test_adapters_in_subfolders_are_named() -> None:
    text = card_text(CardFacts({"one": "SOME", "two": "OTHER"}, "somebody/base"))
    assert "`one` (SOME), `two` (OTHER)" in text and 'subfolder="one"' in text
    assert "subfolder=" not in card_text(FACTS)


def test_no_card_and_no_folder(tmp_path: Path) -> None:
    assert read_card(tmp_path) is None and read_card(tmp_path / "nowhere") is None
