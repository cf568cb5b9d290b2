"""What is trained on some architectures of every kind, compared with the reference: the same, or a reason that holds.

`python -m benchmarks sweep` does it for all and writes `docs/sweep.md`.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.sweep.compare import Relation, Sweep, sweep
from benchmarks.sweep.models import model_types
from benchmarks.sweep.page import lines_of
from benchmarks.sweep.reasons import REASONS, Reason, reasons_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweep.md"
#: Type of model -> what it is there for. Every kind of difference occurs in one of them.
SAMPLE = {
    "llama": "in the tables",
    "olmo2": "a decoder that no table knows",
    "whisper": "an encoder and a decoder, of sound",
    "vit": "vision",
    "llava": "a tower beside a language model",
    "mixtral": "routed experts",
    "deepseek_v3": "shared experts, and dense layers before",
    "deepseek_v4": "layers with a forward of their own",
    "glm4v_moe": "experts beside a tower with convolutions",
    "qwen3_omni_moe_thinker": "experts beside towers with layers of the same names",
    "mamba": "no attention",
    "moss_transcribe_diarize_audio": "layers at the root",
    "granite_speech5_ctc": "no input embeddings",
    "lw_detr": "a layer without outputs",
}
KNOWN = [kind for kind in SAMPLE if kind in model_types()]


@pytest.fixture(scope="module")
def found() -> Sweep:
    return sweep(KNOWN)


def test_what_is_trained_is_the_same_or_differs_for_a_reason_that_holds(found: Sweep) -> None:
    assert found.built == set(KNOWN) - set(found.failed)
    assert [(one.difference.model_type, one.difference.label) for one in found.unexplained] == []
    same = {one.difference.model_type for one in found.compared if one.relation is Relation.SAME}
    assert same >= {"llama", "whisper", "vit", "llava"}


@pytest.mark.skipif(len(KNOWN) < len(SAMPLE), reason="this release of transformers lacks a type of the sample")
def test_every_reason_still_occurs(found: Sweep) -> None:
    occurring = {reason.title for one in found.compared for reason in one.reasons}
    assert occurring == {reason.title for reason in REASONS}


def listed(text: str) -> set[tuple[str, str]]:
    """Labels with types of the sample, in lines of the page."""
    lines = re.findall(r"^- (.+?) \(\d+\): (.*)$", text, re.MULTILINE)
    return {(label, kind) for label, types in lines for kind in re.findall(r"`(\S+)`", types) if kind in SAMPLE}


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.title)
def test_the_page_lists_these_differences(found: Sweep, reason: Reason) -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers\n{importlib.metadata.version('transformers')}." not in text:
        pytest.skip("the page is about another release of transformers")
    section = text.split(f"\n### {reason.title}\n")[1].split("\n#")[0]
    assert listed(section) == listed("\n".join(lines_of(found.compared, reason)))


def test_a_module_without_a_reason_leaves_a_difference_unexplained(found: Sweep) -> None:
    """A layer that only the reference adapts is no part of any reason but those about routed experts."""
    one = next(one for one in found.compared if one.relation is Relation.SAME and one.difference.model_type == "llama")
    trained = dict(one.difference.ours["trained"])
    trained.pop(next(name for name in trained if ".v_proj." in name or ".q_proj." in name))
    assert reasons_of(replace(one.difference, ours={**one.difference.ours, "trained": trained})) == ()
    assert reasons_of(replace(one.difference, theirs={"refused": "ValueError: something else"})) == ()


def test_an_unknown_type_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["sweep", "lama"])
    assert raised.value.code == 2
    assert "lama" in capsys.readouterr().err
