"""The commands that run a model, one after the other as a user would, on a tiny base; and the demo, which can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback

from peftc import rules
from peftc.cli import demo
from peftc.cli.main import main
from peftc.registry.manager import default_registry
from peftc.tuner.method import TunerMethod
from tests.integration import tiny
from tests.unit.chosen import plain_method

#: all that need no other adapters
METHODS = [m for m in map(default_registry().get, default_registry().names) if not m.example_adapters]
PLAIN = plain_method()
QUESTIONS = [{"question": f"What is {n}+1?", "answer": f"It is {n + 1}.", "expect": [str(n + 1)]} for n in range(6)]


def text_of(values: dict[str, Any]) -> str:
    """A spec as JSON, which YAML contains."""
    return json.dumps(values, indent=1)


def spec_values(method: TunerMethod, base: str) -> dict[str, Any]:
    options = {"peft_type": method.peft_type, **(method.examples or ({},))[0], "task_type": "CAUSAL_LM"}
    train = {
        "data": "data.jsonl",
        "eval_data": "data.jsonl",
        "steps": 3,
        "batch_size": 2,
        "device": "cpu",
        "save_steps": 1,
        "learning_rate": 1e-2,
    }
    return {"version": 1, "base": {"path": base}, "adapters": {"default": options}, "train": train, "output": "out"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data, and a spec for each method."""
    place = tmp_path_factory.mktemp("jobs")
    tiny.save_base(place / "base")
    tiny.model().save_pretrained(place / "silent")
    tiny.write_lines(place / "data.jsonl", QUESTIONS)
    return place


def write_spec(folder: Path, method: TunerMethod = PLAIN, **changes: Any) -> Path:
    values = spec_values(method, "base")
    values["train"] |= changes
    file = folder / f"{method.peft_type.lower()}.yaml"
    file.write_text(text_of(values), encoding="utf-8")
    return file


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.peft_type.lower())
def test_train_generate_inspect_merge(
    method: TunerMethod, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, adapter, merged = write_spec(folder, method), tmp_path / "adapter", tmp_path / "merged"

    code, out, err = run(capsys, "train", spec, "--output", adapter, "--json", "--quiet")
    assert code == 0 and "error" not in err
    trained = json.loads(out)
    assert trained["steps"] == 3 and trained["output"] == str(adapter)
    assert trained["held_out_loss_after"] != trained["held_out_loss_before"]

    code, out, err = run(capsys, "inspect", adapter, "--json")
    found = json.loads(out)
    assert (code, err, found["ok"]) == (0, "", True)
    assert found["config"]["peft_type"] == method.peft_type
    assert found["weights"]["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size == trained["bytes"]

    code, out, _ = run(capsys, "generate", "--adapter", adapter, "Why?", "--max-tokens", 5, "--json", "--device", "cpu")
    assert code == 0
    assert [item["prompt"] for item in json.loads(out)] == ["Why?"]

    code, out, err = run(capsys, "merge", "--adapter", adapter, "--out", merged, "--json")
    if not method.adapts_layers or not any(tuner.is_mergeable for tuner in method.map_tuners):
        assert code == 1 and rules.CANNOT_MERGE.code in out
        assert not merged.exists()
        return
    assert code == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    _assert_same_outputs(plain, folder / "base", adapter)
    assert (merged / "tokenizer.json").is_file()


@pytest.mark.parametrize("as_json", [False, True])
def test_convert_says_the_error_of_each_layer(
    as_json: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rankable = next(m for m in METHODS if m.is_rankable and m.config.pattern_options)  # layers get ranks of their own
    adapter, out = tmp_path / "adapter", tmp_path / "converted"
    run(capsys, "train", write_spec(folder, rankable), "-o", adapter, "-q")
    words = ["convert", "--adapter", adapter, "--to", rankable.peft_type.lower(), "--rank", 0.9, "-o", out]
    code, told, err = run(capsys, *words, *["--json"] * as_json, "-q")
    assert code == 0 and f"[{rules.CONVERSION_LOSES.code}]" in err
    if as_json:
        found = json.loads(told)
        assert 0 < found["error"] < 0.4
        assert all(layer["rank"] >= 1 and layer["error"] < 0.4 for layer in found["layers"].values())
    else:
        assert "relative error" in told and "RANK" in told
    code, told, _ = run(capsys, "inspect", out, "--json")
    assert (code, json.loads(told)["config"]["peft_type"]) == (0, rankable.peft_type)


def _assert_same_outputs(merged: Any, base: Path, adapter: Path) -> None:
    from peftc.model.peft_model import PeftModel

    adapted = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = torch.arange(2, 40).reshape(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), adapted.disable_adapter():
        assert not torch.equal(merged(ids).logits, adapted(ids).logits)


def test_the_text_output_is_complete_and_plain(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "train", write_spec(folder), "--output", tmp_path / "a")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["Loss", "Held", "Saved"]
    assert "\x1b" not in out + err
    assert [line.split()[0] for line in err.splitlines() if line.startswith(("Base", "Adapter", "Data"))] == [
        "Base",
        "Adapter",
        "Data",
    ]
    code, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert code == 0
    assert "Health    every value is finite" in out


def test_train_says_what_the_command_line_changes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(folder)
    losses = []
    for seed in (1, 1, 2):
        code, out, _ = run(
            capsys, "train", spec, "-o", tmp_path / "a", "--seed", seed, "--max-steps", 2, "--json", "-q"
        )
        assert code == 0
        result = json.loads(out)
        assert result["steps"] == 2
        losses.append(result["last_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_an_interrupt_says_how_to_go_on_and_resume_does(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out_folder = write_spec(folder), tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(TrainerCallback, "on_step_begin", _interrupt_third)
        code, _, err = run(capsys, "train", spec, "--output", out_folder)
    assert code == 130
    assert "--resume" in err and "checkpoint-2" in err
    code, out, _ = run(capsys, "train", spec, "--output", out_folder)
    assert code == 1, "a fresh start would throw the checkpoint away"
    code, out, _ = run(capsys, "train", spec, "--output", out_folder, "--resume", "--json")
    assert (code, json.loads(out)["first_step"]) == (0, 3)


def _interrupt_third(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
    if state.global_step == 2:
        raise KeyboardInterrupt


def test_generate_answers_each_prompt_of_a_file_and_base_alone_differs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n", encoding="utf-8")
    words = ("generate", "--base", folder / "base", "--max-tokens", 4, "--device", "cpu")
    code, out, _ = run(capsys, *words, "--prompts", tmp_path / "p.txt")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(">")] == ["> One?", "> Two?"]
    code, out, _ = run(capsys, *words, "--prompts", folder / "data.jsonl", "--json")
    assert [item["prompt"] for item in json.loads(out)] == [q["question"] for q in QUESTIONS]
    sampled = [run(capsys, *words, "A?", "--temperature", 5, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_batches_do_not_change_greedy_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "generate",
        "--base",
        folder / "base",
        "--prompts",
        folder / "data.jsonl",
        "--max-tokens",
        6,
        "--device",
        "cpu",
    )
    one, many = (run(capsys, *words, "--batch-size", size, "--json")[1] for size in (1, 4))
    assert json.loads(one) == json.loads(many)


def _as_classifier(values: dict[str, Any]) -> None:
    values["base"]["task_type"] = values["adapters"]["default"]["task_type"] = "SEQ_CLS"


def without(*keys: str) -> Any:
    def change(values: dict[str, Any]) -> None:
        for key in keys:
            del values[key]

    return change


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (without("train"), [], rules.NOTHING_TO_TRAIN),
        (without("output"), [], rules.NOTHING_TO_TRAIN),
        (lambda v: v["train"].update(data="gone.jsonl"), [], rules.DATA_UNREADABLE),
        (lambda v: v.update(base={"path": "gone"}), [], rules.BASE_MISSING),
        (_as_classifier, [], rules.NOT_A_LANGUAGE_MODEL),
        (lambda v: v.update(base={"path": "silent"}), [], rules.NO_TOKENIZER),
        (lambda v: v.update(checks={"expect_modules": 9999}), [], rules.CHECK_FAILED),
        (lambda v: None, ["--device", "cud"], rules.BAD_VALUE),
        (lambda v: None, ["--device", "cuda:99"], rules.DEVICE_MISSING),
        (lambda v: None, ["--max-steps", "0"], rules.BAD_VALUE),
        (lambda v: None, ["--seed", "-1"], rules.BAD_VALUE),
        (lambda v: None, ["--resume"], rules.CANNOT_RESUME),
    ],
    ids=lambda value: value.code if isinstance(value, rules.Rule) else None,
)
def test_what_cannot_be_trained_ends_in_a_diagnostic(
    change: Any, words: list[str], code: rules.Rule, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = spec_values(METHODS[0], "base") | {"output": "never"}
    change(values)
    file = folder / "bad.yaml"
    file.write_text(text_of(values), encoding="utf-8")
    status, out, err = run(capsys, "train", file, *words, "--quiet")
    assert (status, out) == (1, "")
    assert f"[{code.code}]" in err
    assert not (folder / "never").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["generate"], rules.NO_PROMPT),
        (["generate", "Hi"], rules.BASE_MISSING),
        (["generate", "Hi", "--adapter", "gone"], rules.UNREADABLE),
        (["generate", "--prompts", "gone.txt"], rules.DATA_UNREADABLE),
        (["inspect", "gone"], rules.UNREADABLE),
        (["merge", "--adapter", "gone", "--out", "."], rules.FOLDER_TAKEN),
    ],
)
def test_what_is_not_there_ends_in_a_diagnostic(
    words: list[str],
    code: rules.Rule,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "")
    assert f"[{code.code}]" in err


def test_inspect_shows_what_is_left_of_a_damaged_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", write_spec(folder), "-o", tmp_path / "a", "-q")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    code, out, err = run(capsys, "inspect", tmp_path / "a")
    assert code == 1
    assert out.startswith("Adapter") and f"[{rules.CHECKPOINT_DAMAGED.code}]" in err


# The demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quickstart with the tiny base."""
    place = tmp_path / "examples" / "quickstart"
    place.mkdir(parents=True)
    values = spec_values(PLAIN, str(folder / "base"))
    values["train"] |= {"eval_data": "questions.jsonl"}
    (place / "adapter.yaml").write_text(text_of(values), encoding="utf-8")
    tiny.write_lines(place / "data.jsonl", QUESTIONS)
    tiny.write_lines(place / "questions.jsonl", [{**q, "question": f"Tell me: {q['question']}"} for q in QUESTIONS])
    monkeypatch.setattr(demo, "files", lambda name: place.parent)
    return place


def test_the_demo_fails_when_too_few_answers_are_right(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "demo", "--output", tmp_path / "demo")
    assert code == 1
    assert f"[{rules.DEMO_FAILED.code}]: Not so: 0 of 6 answers are right" in err
    assert "FAIL" in out and "outputs are exactly equal" in out and "logits differ by" in out


def test_the_demo_succeeds_and_can_be_repeated(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "NEEDED", 0)
    for _ in range(2):
        code, out, _ = run(capsys, "demo", "--output", tmp_path / "demo", "--json")
        assert code == 0
        assert [check["held"] for check in json.loads(out)["checks"]] == [True] * 6


def test_the_demo_notices_a_question_that_is_in_the_data(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "NEEDED", 0)
    tiny.write_lines(examples / "questions.jsonl", QUESTIONS)
    code, _, err = run(capsys, "demo", "--output", tmp_path / "demo", "--quiet")
    assert code == 1
    assert "Not so: none of the 6 questions is in the training data" in err


def test_a_question_is_right_if_all_that_is_expected_occurs() -> None:
    question = demo.Question("?", ("Entry point", "plugin"))
    assert question.is_right("Every PLUGIN has an entry POINT.")
    assert not question.is_right("Every plugin has an entry.")


def test_no_held_out_question_is_in_the_data(root: Path) -> None:
    place = root / "examples" / "quickstart"
    data = [json.loads(line) for line in (place / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = demo.read_questions(place / "questions.jsonl")
    assert len(questions) >= 16
    asked = {row["question"].casefold().strip(" ?") for row in data}
    assert not [q.text for q in questions if q.text.casefold().strip(" ?") in asked]
    answers = {
        json.loads(line)["answer"] for line in (place / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    }
    assert answers == {row["answer"] for row in data}
