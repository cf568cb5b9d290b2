"""AdaLoRA against the reference, live: training with allocation, what is saved of it, and the options."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import peftc
from peftc import AdaLoraConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model
from peftc.config.sections import TrainSection
from peftc.integrations.transformers.steps import AdapterSteps
from peftc.integrations.transformers.training import fit
from peftc.runtime.session.steps import patch
from tests.golden.models import base_model

SCHEDULE = {"init_r": 6, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}


def options(**changes: Any) -> dict[str, Any]:
    targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_alpha": 16}
    return {**SCHEDULE, **targets, **changes}


def both(**changes: Any) -> tuple[Any, Any]:
    """The reference's model and ours, with the same tensors."""
    theirs = peft.get_peft_model(base_model("llama"), peft.AdaLoraConfig(**options(**changes)))
    ours = get_peft_model(base_model("llama"), AdaLoraConfig(**options(**changes)))
    peftc.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def ids(step: int = 0) -> Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(step))


def train(model: Any, last: int = 12, first: int = 1) -> list[Any]:
    """Losses, and which entries of E are zero, of every step."""
    seen: list[Any] = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(first, last + 1):
        loss = model(input_ids=ids(step), labels=ids(step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        zeros = [(p == 0).flatten().tolist() for name, p in model.named_parameters() if "lora_E" in name]
        seen.append((pytest.approx(loss.item(), abs=1e-5), zeros))
    return seen


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def file_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deltaT": 1, "orth_reg_weight": 0.0},
        {"tinit": 0, "tfinal": 0, "lora_alpha": 0},
        {"lora_dropout": 0.0, "target_r": 5},
    ],
    ids=["warm-up and end", "no term in the loss", "to the last step", "few go"],
)
def test_training_is_the_references_step_for_step(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = both(**changes)
    assert train(ours) == train(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    for library, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / library)
    saved, expected = file_of(tmp_path / "ours"), file_of(tmp_path / "theirs")
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, atol=1e-5, rtol=1e-4)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    assert configs[0].keys() == configs[1].keys()


@pytest.mark.parametrize("saver", [peft, peftc], ids=["reference", "peftc"])
def test_what_is_saved_loads_in_both(saver: ModuleType, tmp_path: Path) -> None:
    theirs, ours = both()
    model = theirs if saver is peft else ours
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for library in (peft, peftc):
        loaded = library.PeftModel.from_pretrained(base_model("llama"), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
        loaded.save_pretrained(tmp_path / "again")
        again, saved = file_of(tmp_path / "again"), file_of(tmp_path)
        assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
    merged = PeftModel.from_pretrained(base_model("llama"), tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


def test_layers_that_keep_nothing_are_saved_and_loaded(tmp_path: Path) -> None:
    _, ours = both(target_r=1)
    train(ours)
    config = ours.peft_config["default"]
    assert config.rank_pattern is not None
    path = "model.layers.0.self_attn.q_proj.lora_E"
    patch(ours.session, "default", {"rank_pattern": {**config.rank_pattern, path: [False] * 6}})
    with torch.no_grad():
        ours.get_base_model().model.layers[0].self_attn.q_proj.lora_E["default"].zero_()
    expected = logits(ours)
    ours.save_pretrained(tmp_path)
    assert file_of(tmp_path)[f"base_model.model.{path}"].shape == (0, 1)
    for library in (peft, peftc):
        loaded = library.PeftModel.from_pretrained(base_model("llama"), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
    loaded.add_adapter("other", AdaLoraConfig(**options()))
    loaded.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    loaded.set_adapter("sum")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_in_the_middle_holds_all_ranks(tmp_path: Path) -> None:
    """Between two allocations the optimiser writes into entries that were zeroed: they count."""
    _, ours = both(deltaT=4)
    train(ours, last=7)
    expected = logits(ours)
    ours.save_pretrained(tmp_path)
    for library in (peft, peftc):
        loaded = library.PeftModel.from_pretrained(base_model("llama"), tmp_path)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)


def test_ranks_that_were_allocated_stay_when_the_adapter_trains_on(tmp_path: Path) -> None:
    _, ours = both()
    train(ours)
    ours.save_pretrained(tmp_path)
    pattern = ours.peft_config["default"].rank_pattern
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path, is_trainable=True)
    train(again)
    assert again.peft_config["default"].rank_pattern == pattern
    again.save_pretrained(tmp_path / "again")
    assert {key: t.shape for key, t in file_of(tmp_path / "again").items()} == {
        key: t.shape for key, t in file_of(tmp_path).items()
    }


def test_layers_and_state_dicts_are_resized_by_a_pattern_as_in_the_reference() -> None:
    pattern = {
        f"model.layers.{n}.self_attn.{name}.lora_E": [True, False, n == 0, True, False, name == "q_proj"]
        for n in range(2)
        for name in ("q_proj", "v_proj")
    }
    found = []
    for model in both(init_lora_weights=False):
        state = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
        model.base_model.resize_state_dict_by_rank_pattern(pattern, state, "default")
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")
        live = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
        assert live.keys() == state.keys() and all(torch.equal(live[name], state[name]) for name in live)
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
        found.append((live, logits(model)))
    assert all(torch.equal(found[0][0][name], tensor) for name, tensor in found[1][0].items())
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


def test_two_adapters_are_allocated_each_by_itself() -> None:
    """The reference has one adapter that trains."""
    alone = both()[1]
    state = {key: tensor.clone() for key, tensor in peftc.get_peft_model_state_dict(alone).items()}
    expected = train(alone)
    model = get_peft_model(base_model("llama"), AdaLoraConfig(**options(total_step=40)), "other")
    model.add_adapter("default", AdaLoraConfig(**options()))
    peftc.set_peft_model_state_dict(model, state)
    train(model, last=2)
    model.set_adapter("default")
    found = train(model)
    layers = range(len(expected[0][1]))
    own = [name for name, _ in model.named_parameters() if "lora_E" in name]
    mine = [index for index, name in enumerate(own) if name.endswith(".default")]
    assert [[zeros[i] for i in mine] for _, zeros in found] == [[zeros[i] for i in layers] for _, zeros in expected]
    assert model.peft_config["other"].rank_pattern is None


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), torch.linspace(-1, 1, 200).view(2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3), torch.linspace(-1, 1, 64).view(2, 4, 8)),
        (nn.Embedding(9, 6), torch.arange(9)),
    ],
    ids=["conv2d", "conv1d", "embedding"],
)
def test_other_layers(layer: nn.Module, x: Tensor) -> None:
    model = get_peft_model(
        nn.Sequential(layer), AdaLoraConfig(**SCHEDULE, target_modules=["0"], init_lora_weights=False)
    )
    wrapper = model.get_base_model()[0]
    A, B, E = (getattr(wrapper, f"lora_{name}")["default"] for name in "ABE")
    delta = B @ (A * E) * 8 / (6 + 1e-5)
    torch.testing.assert_close(
        wrapper.get_delta_weight("default").detach(),
        (delta.t() if isinstance(layer, nn.Embedding) else delta.view(layer.weight.shape)).detach(),
    )
    y = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, atol=1e-5, rtol=1e-4)


def test_a_convolution_is_the_references() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    bases = [nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, stride=2)) for _ in range(2)]
    bases[1].load_state_dict(bases[0].state_dict())
    config = {**SCHEDULE, "target_modules": ["0"], "init_lora_weights": False}
    theirs = peft.get_peft_model(bases[0], peft.AdaLoraConfig(**config))
    ours = get_peft_model(bases[1], AdaLoraConfig(**config))
    peftc.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(step)[0], "labels": ids(step)[0]} for step in range(24)]


def trainer(model: Any, folder: Path, callbacks: list[Any]) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)


def test_transformers_trainer_with_the_callback(tmp_path: Path) -> None:
    _, ours = both()
    trainer(ours, tmp_path, [AdapterSteps()]).train()
    pattern = ours.peft_config["default"].rank_pattern
    assert pattern is not None and sum(sum(kept) for kept in pattern.values()) == 2 * len(pattern)


def test_transformers_trainer_without_it_is_warned_of(tmp_path: Path) -> None:
    _, ours = both()
    with pytest.warns(PeftcWarning, match="PC516"):
        trainer(ours, tmp_path, []).train()
    _, ours = both(total_step=100)
    with pytest.warns(PeftcWarning, match="PC519"):
        trainer(ours, tmp_path, [AdapterSteps()]).train()


def test_peftcs_own_training_allocates_and_resumes_to_the_same(tmp_path: Path) -> None:
    data = [SimpleNamespace(input_ids=ids(s)[0].tolist(), labels=ids(s)[0].tolist()) for s in range(8)]
    how = TrainSection(data="-", steps=12, batch_size=2, learning_rate=1e-2, save_steps=4, device="cpu")

    def started() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(base_model("llama"), AdaLoraConfig(**options()))

    def stop(step: Any) -> None:
        if step.number == 11:
            raise KeyboardInterrupt

    fit(started(), data, 0, how, tmp_path / "whole")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        fit(started(), data, 0, how, tmp_path / "halves", progress=stop)  # type: ignore[arg-type]
    fit(started(), data, 0, how, tmp_path / "halves", resume=True)  # type: ignore[arg-type]
    whole, halves = file_of(tmp_path / "whole"), file_of(tmp_path / "halves")
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["rank_pattern"] is not None


# options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"total_step": None}, "PC102", "`total_step` cannot be `None`"),
        ({"tinit": 9}, "PC118", "don't allow for a budgeting phase"),
        ({"target_r": 7}, "PC118", "Ranks cannot rise"),
        ({"r": 4}, "PC646", "`r` has no effect"),
        ({"use_rslora": True}, "PC646", "`use_rslora` has no effect"),
        ({"alpha_pattern": {"q_proj": 2}}, "PC646", "`alpha_pattern` has no effect"),
        ({"loftq_config": {"loftq_bits": 4}}, "PC103", "`loftq_config`"),
        ({"use_dora": True}, "PC103", "`use_dora`"),
    ],
)
def test_options_that_do_not_go(changes: dict[str, Any], code: str, says: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftcWarning)
        with pytest.raises((PeftcError, PeftcWarning), match=says) as caught:
            get_peft_model(base_model("llama"), AdaLoraConfig(**options(**changes)))
    assert code in str(caught.value)


def test_the_config_of_the_reference_is_its_own() -> None:
    ours, theirs = AdaLoraConfig(**options()), peft.AdaLoraConfig(**options())
    assert isinstance(ours, peftc.LoraConfig)
    assert {n: v for n, v in ours.to_dict().items() if n != "peft_version"} == {
        n: v for n, v in theirs.to_dict().items() if n not in ("peft_version", "runtime_config")
    }
