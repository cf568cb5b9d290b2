"""From an adapter folder alone to the adapted model: right class for each task, enlarged embeddings, and what is refused."""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import peftc
from peftc import PeftcError, PeftcWarning, TaskType, rules
from peftc.integrations.transformers import auto
from peftc.model import mapping
from peftc.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, task_model_class
from tests.defects import put_defect
from tests.integration.tiny import save_base, tokenizer

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = SMALL | {"intermediate_size": 24, "max_position_embeddings": 32}
BERT = transformers.BertConfig(**SIZES, num_labels=3)
LLAMA = transformers.LlamaConfig(**SIZES)
T5 = transformers.T5Config(
    vocab_size=40, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
)
BASES = {
    "CAUSAL_LM": (transformers.LlamaForCausalLM, LLAMA),
    "SEQ_2_SEQ_LM": (transformers.T5ForConditionalGeneration, T5),
    "SEQ_CLS": (transformers.BertForSequenceClassification, BERT),
    "TOKEN_CLS": (transformers.BertForTokenClassification, BERT),
    "QUESTION_ANS": (transformers.BertForQuestionAnswering, transformers.BertConfig(**SIZES, num_labels=2)),
    "FEATURE_EXTRACTION": (transformers.BertModel, BERT),
}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]])


def config(task: str | None, **options: Any) -> Any:
    return peftc.LoraConfig(task_type=task, target_modules=r".*\.(q_proj|query|q)", **options)


def saved(task: str | None, folder: Path, base_of: str | None = None) -> tuple[nn.Module, Path]:
    """A base and an adapter of it, both saved; the adapter is no identity."""
    cls, settings = BASES[base_of or task or "CAUSAL_LM"]
    torch.manual_seed(0)
    cls(settings).save_pretrained(folder / "base")
    model = peftc.get_peft_model(cls.from_pretrained(folder / "base"), config(task))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "adapter")
    return model.eval(), folder / "adapter"


def call(model: nn.Module, task: str) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :2]} if task == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, **more)[0]
    return out


@pytest.mark.parametrize("task", BASES)
def test_each_task_loads_with_its_class_and_computes_the_same(task: str, tmp_path: Path) -> None:
    model, folder = saved(task, tmp_path)
    name = type(model).__name__
    cls = getattr(peftc, "Auto" + name)
    loaded = cls.from_pretrained(folder)
    assert type(loaded) is type(model) is MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    torch.testing.assert_close(call(loaded, task), call(model, task), rtol=0, atol=0)
    assert type(peftc.AutoPeftModel.from_pretrained(folder)) is type(model)
    base = model.unload()
    assert type(peftc.PeftModel.from_pretrained(base, folder)) is type(model)
    theirs = getattr(peft, "Auto" + name).from_pretrained(folder).eval()
    torch.testing.assert_close(call(loaded, task), call(theirs, task), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", BASES)
def test_calls_have_the_arguments_of_the_reference(task: str) -> None:
    ours = task_model_class(config(task))
    theirs = getattr(peft, ours.__name__)
    mine, reference = (list(inspect.signature(cls.forward).parameters) for cls in (ours, theirs))
    assert mine == reference


def test_arguments_by_position_are_those_of_the_task(tmp_path: Path) -> None:
    model, _ = saved("CAUSAL_LM", tmp_path)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    named = model(input_ids=IDS, attention_mask=mask, labels=IDS)
    placed = model(IDS, mask, None, IDS)
    assert torch.equal(named.loss, placed.loss)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(IDS, input_ids=IDS)
    with pytest.raises(TypeError, match="takes 8 arguments by position, 9 given"):
        model(*[None] * 9)


def test_embeddings_grow_with_the_tokenizer(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    enlarged = tokenizer()
    enlarged.add_tokens(["<a>", "<b>"])
    base.resize_token_embeddings(len(enlarged))
    model = peftc.get_peft_model(base, config("CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    enlarged.save_pretrained(tmp_path / "adapter")
    loaded = peftc.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == len(enlarged)
    made = loaded.generate(input_ids=torch.tensor([[5, 6, len(enlarged) - 1]]), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 6)


def test_without_a_task_the_class_is_looked_up_not_imported(tmp_path: Path) -> None:
    model, folder = saved(None, tmp_path, base_of="SEQ_CLS")
    loaded = peftc.AutoPeftModel.from_pretrained(folder)
    assert type(loaded) is peftc.PeftModel
    assert type(loaded.get_base_model()) is transformers.BertForSequenceClassification
    torch.testing.assert_close(call(loaded.eval(), "SEQ_CLS"), call(model, "SEQ_CLS"), rtol=0, atol=0)


def edited(folder: Path, **values: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return folder


def test_a_module_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    _, folder = saved(None, tmp_path, base_of="SEQ_CLS")
    edited(folder, auto_mapping={"base_model_class": "Net", "parent_library": "planted"})
    with pytest.raises(PeftcError, match="import_allowlist=\\['planted'\\]"):
        peftc.AutoPeftModel.from_pretrained(folder)
    (tmp_path / "planted.py").write_text(
        "from transformers import BertForSequenceClassification as Net", encoding="utf-8"
    )
    loaded = peftc.AutoPeftModel.from_pretrained(folder, import_allowlist=["planted"])
    assert type(loaded.get_base_model()) is transformers.BertForSequenceClassification


REFUSED: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "another task": (
        "AutoPeftModelForSequenceClassification", {}, "Use `AutoPeftModelForCausalLM`.",
        "if cls.task is not None and config.task_type not in (None, cls.task):", "if False:",
    ),
    "no base": (
        "AutoPeftModelForCausalLM", {"base_model_name_or_path": None}, "does not name its base model",
        "    if not name:", "    if False:",
    ),
    "no task and no class": (
        "AutoPeftModel", {"task_type": None, "auto_mapping": None}, "does not name its base model's class",
        "if not mapping:", "if False:",
    ),
    "a class that is not there": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": {"base_model_class": "Nothing", "parent_library": "transformers.x"}},
        "has no model class `Nothing`", "if not (isinstance(found, type) and issubclass(found, nn.Module)):", "if False:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("defective", [False, True])
def test_what_cannot_be_chosen_is_refused(
    case: str, defective: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, values, says, before, after = REFUSED[case]
    _, folder = saved("CAUSAL_LM", tmp_path)
    edited(folder, **values)
    if defective:
        put_defect(monkeypatch, auto, before, after)
    found = False
    with contextlib.suppress(AttributeError, TypeError, ValueError, OSError):  # what a defect may lead to
        try:
            getattr(peftc, cls).from_pretrained(folder)
        except PeftcError as error:
            found = says in str(error) and rules.AUTO_CLASS.code in str(error)
    assert found is not defective


def test_an_auto_class_has_no_instances() -> None:
    with pytest.raises(PeftcError, match="from_pretrained"):
        peftc.AutoPeftModelForCausalLM()


def renamed_base(tmp_path: Path) -> list[str]:
    options = config(TaskType.CAUSAL_LM)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PeftcWarning)
        for name in ("first", "second"):
            base = transformers.LlamaForCausalLM(LLAMA)
            base.name_or_path = name
            peftc.get_peft_model(base, options)
    assert options.base_model_name_or_path == "second"
    return [str(w.message) for w in caught if "PC310" in str(w.message)]


def test_a_config_that_is_used_again_names_the_new_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = renamed_base(tmp_path)
    assert "renamed from 'first' to 'second'" in message
    put_defect(monkeypatch, mapping, "if old is not None:", "if False:")
    assert not renamed_base(tmp_path)  # rules.BASE_RENAMED


def test_what_a_model_says_of_itself_is_what_the_reference_says() -> None:
    for library in (peft, peftc):
        model = library.get_peft_model(transformers.LlamaForCausalLM(LLAMA), library.LoraConfig(task_type="CAUSAL_LM"))
        assert model.supports_lora_conversion()
        assert not model.get_input_embeddings()(IDS).requires_grad
        model.prepare_model_for_gradient_checkpointing(model.get_base_model())
        assert model.get_input_embeddings()(IDS).requires_grad
    prompt = peftc.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not peftc.get_peft_model(transformers.LlamaForCausalLM(LLAMA), prompt).supports_lora_conversion()


def test_a_base_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved("CAUSAL_LM", tmp_path)
    code = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(str(words)) or "n")
    with pytest.raises(PeftcError) as raised:
        peftc.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert raised.value.diagnostics[0].code == rules.BASE_UNREADABLE.code
    assert "trust_remote_code" in raised.value.diagnostics[0].what
    assert asked == []
