"""Poly by its papers and beside the reference: routing in training and after, what calls must give, and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftc import PeftcError, PeftModel, PolyConfig, get_peft_model

OPTIONS: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 4, "n_splits": 2, "target_modules": ["q_proj", "v_proj"]}
TASKS = torch.tensor([2, 0, 1])


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


def ids() -> Tensor:
    return torch.arange(15).view(3, 5) % 40


def move(model: nn.Module) -> None:
    """The same values in both libraries: names are the same."""
    for seed, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "poly_" in n)):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)


def both(**changes: Any) -> tuple[PeftModel, peft.PeftModel]:
    options = {**OPTIONS, "task_type": "CAUSAL_LM", **changes}
    models = get_peft_model(base(), PolyConfig(**options)), peft.get_peft_model(base(), peft.PolyConfig(**options))
    for model in models:
        move(model.eval())
    return models


def test_the_formula() -> None:
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), PolyConfig(**{**OPTIONS, "target_modules": ["0"]})).eval()
    move(model)
    layer, x = model.get_base_model()[0], torch.randn(3, 8)
    for row, task in enumerate(TASKS.tolist()):
        on = layer.poly_router["default"].module_logits[task].view(2, 4).sigmoid()
        shares = on / on.sum(-1, keepdim=True)
        a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
        A = torch.cat([sum(shares[q, s] * a[q, s] for s in range(4)) for q in range(2)])
        B = torch.cat([sum(shares[q, s] * b[q, s] for s in range(4)) for q in range(2)], dim=1)
        wanted = layer.base_layer(x[row]) + x[row] @ A @ B / 3
        torch.testing.assert_close(model(x, task_ids=TASKS)[row], wanted)


@pytest.mark.parametrize("training", [False, True])
def test_output_and_gradients_are_the_references_from_one_seed(training: bool) -> None:
    mine, theirs = both()
    found = []
    for model in (mine, theirs):
        model.train(training)
        torch.manual_seed(3)
        out = model(input_ids=ids(), labels=ids(), task_ids=TASKS)
        out.loss.backward()
        found.append((out.loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (wanted, expected) = found
    torch.testing.assert_close(loss, wanted)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_skills_are_drawn_in_training_only() -> None:
    model, _ = both()
    assert torch.equal(model(input_ids=ids(), task_ids=TASKS).logits, model(input_ids=ids(), task_ids=TASKS).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids(), task_ids=TASKS).logits, model(input_ids=ids(), task_ids=TASKS).logits)


def test_skills_start_as_in_the_reference() -> None:
    found = []
    for library in (peft, None):
        config = (library.PolyConfig if library else PolyConfig)(**OPTIONS, init_weights=False)
        torch.manual_seed(5)
        model = (library.get_peft_model if library else get_peft_model)(base(), config)
        found.append({n: p.detach() for n, p in model.named_parameters() if "poly_" in n})
    assert found[0].keys() == found[1].keys()
    for name, p in found[0].items():
        assert float(p.abs().max()) == pytest.approx(float(found[1][name].abs().max()), rel=0.2), name


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_the_references(beams: int) -> None:
    mine, theirs = both()
    options = {"task_ids": TASKS, "max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = mine.generate(input_ids=ids(), **options)
    if beams == 1:
        assert torch.equal(found, theirs.generate(input_ids=ids(), **options))
    for row in range(3):  # the reference does not repeat the tasks for beams
        alone = mine.generate(input_ids=ids()[row : row + 1], **{**options, "task_ids": TASKS[row : row + 1]})
        assert found[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_folders_load_both_ways(tmp_path: Path) -> None:
    mine, theirs = both()
    wanted = mine(input_ids=ids(), task_ids=TASKS).logits
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(base(), str(tmp_path / "mine")).eval()
    here = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    for model in (there, here):
        torch.testing.assert_close(model(input_ids=ids(), task_ids=TASKS).logits, wanted)


def test_one_task_needs_no_ids() -> None:
    model = get_peft_model(base(), PolyConfig(target_modules=["q_proj"])).eval()
    move(model)
    zeros = torch.zeros(3, dtype=torch.long)
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids(), task_ids=zeros).logits)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "The call has no `task_ids`"),
        ({"task_ids": [0, 1]}, "`task_ids` has 2 values, but the batch has 3 rows"),
        ({"task_ids": [0, 3, 1]}, "`task_ids` names task 3, but there are 3"),
        ({"task_ids": [0, -1, 1]}, "`task_ids` names task -1, but there are 3"),
        ({"task_ids": "012"}, "`task_ids` is not a list of whole numbers"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(given: dict[str, Any], says: str) -> None:
    model, _ = both()
    with pytest.raises(PeftcError, match=says):
        model(input_ids=ids(), **given)
    with pytest.raises(PeftcError, match=says):
        model.generate(input_ids=ids(), max_new_tokens=1, **given)


def test_features_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(PeftcError, match="cannot be divided into 3 equal parts") as caught:
        get_peft_model(base(), PolyConfig(n_splits=3, target_modules=["q_proj"]))
    assert len(caught.value.diagnostics) == 2  # inputs and outputs


def test_merging_is_refused() -> None:
    model, _ = both()
    with pytest.raises(PeftcError, match="PC508"):
        model.merge_and_unload()
