"""`train.optimizer`: what each name does to a training, which options it has, and which adapters it is for."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import peftc
from peftc import plugin, rules
from peftc.cli.main import main
from peftc.compiler import of_spec
from peftc.config import optimizers as plain
from peftc.config import spec as documents
from peftc.config.sections import TrainSection
from peftc.diagnostics import PeftcError
from peftc.integrations.transformers import optimizing, training
from peftc.integrations.transformers.training import Step, fit
from peftc.registry import optimizers as registered
from peftc.registry.manager import default_registry
from peftc.registry.optimizers import PLAIN, chosen_optimizer, find_optimizer, optimizers
from tests.defects import put_defect
from tests.integration import tiny
from tests.integration.test_training import PAD, rows

#: name -> options, each other than those that are taken if they are left out
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.8, 0.99]},
    "adamw_torch": {"eps": 1e-4},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adafactor": {},
    "adagrad": {"lr_decay": 0.1},
    "rmsprop": {"momentum": 0.5, "centered": True},
    "adamw_8bit": {"betas": [0.8, 0.99]},
    "paged_adamw_8bit": {"eps": 1e-4},
    "paged_adamw_32bit": {"betas": [0.8, 0.99]},
    "lion_8bit": {"betas": [0.8, 0.9]},
    "paged_lion_8bit": {"betas": [0.8, 0.9]},
    "paged_lion_32bit": {"betas": [0.8, 0.9]},
    "loraplus": {"loraplus_lr_ratio": 4.0},
    "lorafa": {},
    "riemannian": {"reg": 0.5},
}


def given(record: Any, value: Any) -> Any:
    """What is skipped, with the reason, where the optimiser's package is not installed."""
    there = not record.package or find_spec(record.package) is not None
    return pytest.param(value, id=record.name, marks=pytest.mark.skipif(not there, reason=f"needs {record.package}"))


every_optimizer = pytest.mark.parametrize("name", [given(optimizers()[name], name) for name in OPTIONS])


def adapted(seed: int = 0, **options: Any) -> Any:
    base = tiny.model()
    transformers.set_seed(seed)
    config = peftc.LoraConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options})
    return peftc.get_peft_model(base, config)


def section(**changes: Any) -> TrainSection:
    values = {"data": "unused", "steps": 4, "batch_size": 4, "save_steps": 2, "learning_rate": 1e-2, "device": "cpu"}
    return TrainSection(**{**values, **changes})


def trained(how: TrainSection, folder: Path, seed: int = 0, **keywords: Any) -> dict[str, torch.Tensor]:
    fit(adapted(seed), rows(), PAD, how, folder, **keywords)
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_missing_package_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "find_spec", lambda name: None)
    (problem,) = registered.option_problems("paged_adamw_8bit", None)
    assert (problem.location, problem.diagnostic.code) == (("optimizer",), "PC305")
    assert "pip install bitsandbytes" in problem.diagnostic.fix
    assert not list(registered.option_problems("adamw", None))


def test_all_names_are_tried_here() -> None:
    assert set(OPTIONS) == set(optimizers())


@every_optimizer
def test_a_resumed_training_is_the_unbroken_one_to_the_bit(name: str, tmp_path: Path) -> None:
    how = section(optimizer=name, optimizer_options=OPTIONS[name], weight_decay=0.01)

    def stop(step: Step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    whole = trained(how, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(how, tmp_path / "halves", progress=stop)
    assert same(trained(how, tmp_path / "halves", seed=99, resume=True), whole)


@every_optimizer
def test_each_has_its_own_steps_and_its_options_change_them(name: str, tmp_path: Path) -> None:
    usual = trained(section(), tmp_path / "usual")
    named = trained(section(optimizer=name), tmp_path / "named")
    assert same(named, usual) is (name == "adamw")
    if OPTIONS[name]:
        told = trained(section(optimizer=name, optimizer_options=OPTIONS[name]), tmp_path / "told")
        assert not same(told, named)
    if name == "lorafa":
        at_first = {key: tensor.detach() for key, tensor in adapted().state_dict().items() if "lora_A" in key}
        kept = {key.replace(".weight", ".default.weight"): t for key, t in named.items() if "lora_A" in key}
        assert kept and all(torch.equal(tensor, at_first[key]) for key, tensor in kept.items())


def test_what_an_optimiser_freezes_trains_again_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trains() -> None:
        model = adapted()
        before = {name for name, p in model.named_parameters() if p.requires_grad}
        fit(model, rows(), PAD, section(optimizer="lorafa", save_steps=None), tmp_path / "out")
        assert {name for name, p in model.named_parameters() if p.requires_grad} == before

    trains()
    put_defect(monkeypatch, training, "            parameter.requires_grad_(True)", "            pass")
    with pytest.raises(AssertionError):
        trains()


def test_left_out_it_is_what_transformers_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trained(section(weight_decay=0.1), tmp_path / "ours")
    monkeypatch.setattr(training, "optimizing", lambda *given: {})
    assert same(trained(section(weight_decay=0.1), tmp_path / "theirs"), ours)


@pytest.mark.parametrize("record", [given(record, record) for record in PLAIN])
def test_plain_ones_are_transformers_of_that_name(record: Any, tmp_path: Path) -> None:
    """With the options that are taken if they are left out, but for what `Trainer` adds of Adam's."""
    for name in (record.name, *record.aliases):
        if name == "adamw":
            continue  # a name of our own
        arguments = transformers.TrainingArguments(str(tmp_path), optim=name, learning_rate=1e-2, use_cpu=True)
        cls, theirs = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
        made = optimizing.optimizing(chosen_optimizer(name, None), adapted(), section(optimizer=name))
        ours_cls, ours = made["optimizer_cls_and_kwargs"]
        assert ours_cls is cls and {key: ours[key] for key in theirs} == theirs


def test_the_weight_decay_and_the_rate_are_the_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loraplus", "lorafa", "riemannian"):
        how = section(optimizer=name, learning_rate=0.25, weight_decay=0.125)
        made = optimizing.optimizing(chosen_optimizer(name, None), adapted(), how)["optimizers"][0]
        groups = [group for group in made.param_groups if group["params"]]
        assert min(group["lr"] for group in groups) == 0.25
        assert {group["weight_decay"] for group in groups} == {0.125}


def test_a_training_is_not_resumed_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(step: Step) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    first = section(optimizer="sgd", optimizer_options={"momentum": 0.5})
    with pytest.raises(KeyboardInterrupt):
        trained(first, tmp_path / "out", progress=interrupt)

    def refused() -> None:
        others: list[tuple[dict[str, Any], str]] = [
            ({"optimizer": None, "optimizer_options": None}, '`train.optimizer` was "sgd" and is now "adamw"'),
            ({"optimizer_options": None}, "`train.optimizer_options`"),
        ]
        for changes, told in others:
            with pytest.raises(PeftcError) as caught:
                trained(first.model_copy(update=changes), tmp_path / "out", resume=True)
            assert told in str(caught.value)

    refused()
    spelt = first.model_copy(update={"optimizer": "SGD", "optimizer_options": {"momentum": 0.5, "nesterov": False}})
    with monkeypatch.context() as m:
        put_defect(
            m, training, "options |= chosen_optimizer(how.optimizer, how.optimizer_options).said", "options = {}"
        )
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            refused()
    trained(spelt, tmp_path / "out", resume=True)  # the same said otherwise is the same


# documents ------------------------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE = {**LLAMA, "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 100}
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def written(folder: Path, train: dict[str, Any], adapter: dict[str, Any] | None = None) -> Path:
    """A spec with one key of the sections on each line."""
    data = {
        "version": 1,
        "base": {"config": BASE, "task_type": "CAUSAL_LM"},
        "adapters": {"default": adapter or LORA},
        "train": {"data": "data.jsonl", **train},
    }
    file = folder / "spec.json"
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return file


def told(file: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """Code and path of each problem that `peftc validate` finds; each has a line, and the key of its path stands there."""
    assert main(["validate", str(file), "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)["files"][0]["diagnostics"]
    lines = file.read_text(encoding="utf-8").splitlines()
    for one in found:
        key = one["where"]["path"].rpartition(".")[2]
        assert "[" in key or f'"{key}"' in lines[one["where"]["line"] - 1]
    return [(one["code"], one["where"]["path"]) for one in found]


NAME, OWN = "$.train.optimizer", "$.train.optimizer_options"
#: what is wrong: the section, the adapter, what is told, and the defect under which it would not be
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]], tuple[ModuleType, str, str]]] = {
    "name": (
        {"optimizer": "lora_plus"},
        LORA,
        [(rules.OPTIMIZER_UNKNOWN.code, NAME)],
        (registered, "    if record is None:\n        known", "    if False:\n        known"),
    ),
    "option": (
        {"optimizer": "loraplus", "optimizer_options": {"loraplus_lr_rat1o": 4.0, "betas": [0.9, 2], "eps": "x"}},
        LORA,
        [
            (rules.UNKNOWN_KEY.code, f"{OWN}.loraplus_lr_rat1o"),
            (rules.BAD_VALUE.code, f"{OWN}.betas[1]"),
            (rules.BAD_VALUE.code, f"{OWN}.eps"),
        ],
        (registered, "for problem in problems_of(record.options, given):", "for problem in ():"),
    ),
    "section": (
        {"optimizer": "loraplus", "optimizer_options": {"lr": 1.0, "weight_decay": 1.0, "loraplus_weight_decay": 1.0}},
        LORA,
        [(rules.CONTRADICTION.code, f"{OWN}.{key}") for key in ("lr", "weight_decay", "loraplus_weight_decay")],
        (registered, "if key in given and key not in record.options.model_fields:", "if False:"),
    ),
    "nesterov": (
        {"optimizer": "sgd", "optimizer_options": {"nesterov": True}},
        LORA,
        [(rules.CONTRADICTION.code, f"{OWN}.nesterov")],
        (plain, "if self.nesterov and (", "if False and ("),
    ),
    "without factors": (
        {"optimizer": "loraplus"},
        {"peft_type": "IA3"},
        [(rules.OPTIMIZER_MISFIT.code, NAME)],
        (registered, "if not _may_fit(record, method, config):", "if False:"),
    ),
    "frozen factors": (
        {"optimizer": "riemannian"},
        {"peft_type": "VERA", "target_modules": ["q_proj"]},
        [(rules.OPTIMIZER_MISFIT.code, NAME)],
        (registered, "if record.fits(layer, slots):", "if True:"),
    ),
    "more than factors": (
        {"optimizer": "lorafa"},
        {**LORA, "use_dora": True},
        [(rules.OPTIMIZER_MISFIT.code, NAME)],
        (registered, "method.own_tuners if variant is None else variant.tuners", "method.own_tuners"),
    ),
    "a variant that is not there": (
        {"optimizer": "loraplus"},
        {**LORA, "variant": "nowhere"},
        [(rules.UNKNOWN_VARIANT.code, "$.adapters.default.variant")],
        (registered, "with suppress(PeftcError):  #", "with suppress(ZeroDivisionError):  #"),
    ),
    "no layers": (
        {"optimizer": "lorafa"},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
        [(rules.OPTIMIZER_MISFIT.code, NAME)],
        (documents, "for problem in fit_problems(record, acting, registry):", "for problem in ():"),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_wrong_is_told_with_its_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, adapter, wanted, defect = CASES[case]
    file = written(tmp_path, train, adapter)
    assert told(file, capsys) == wanted
    put_defect(monkeypatch, *defect)
    with pytest.raises((AssertionError, AttributeError, KeyError, TypeError)):
        assert told(file, capsys) == wanted


FACTORS = {"peft_type": "LORA", "r": 4}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("loraplus", {**FACTORS, "use_dora": True}),
        ("loraplus", {"peft_type": "ADALORA", "total_step": 10}),
        ("lorafa", {"peft_type": "HIRA"}),
        ("riemannian", {**FACTORS, "use_dora": True}),
        ("lorafa", {**FACTORS, "target_modules": ["embed_tokens"]}),
        ("SGD", {"peft_type": "IA3"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["peft_type"].lower(),
)
def test_it_serves_every_method_with_such_factors(
    name: str, adapter: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, {"optimizer": name}, adapter)
    assert told(file, capsys) == []
    assert main(["plan", str(file)]) == 0


@pytest.mark.parametrize(
    ("name", "adapter", "defect"),
    [
        ("lorafa", {**LORA, "init_lora_weights": "mica"}, "if not fitting and"),
        ("riemannian", {**FACTORS, "target_modules": ["embed_tokens"]}, "if not fitting and"),
        ("lorafa", {**FACTORS, "target_modules": [], "target_parameters": ["experts.down_proj"]}, "if stacked is not"),
    ],
    ids=["frozen", "embedding", "experts"],
)
def test_the_plan_tells_what_no_option_does(
    name: str,
    adapter: dict[str, Any],
    defect: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = written(tmp_path, {"optimizer": name}, adapter)
    if "target_parameters" in adapter:
        data = json.loads(file.read_text())
        data["base"]["config"] |= {"model_type": "mixtral", "num_local_experts": 4}
        file.write_text(json.dumps(data, indent=1))
    assert told(file, capsys) == []

    def refused() -> None:
        assert main(["plan", str(file), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)["diagnostics"]
        assert [(one["code"], one["where"]["path"]) for one in found] == [(rules.OPTIMIZER_MISFIT.code, NAME)]
        assert '"optimizer"' in file.read_text().splitlines()[found[0]["where"]["line"] - 1]

    refused()
    put_defect(monkeypatch, of_spec, defect, "if False and not")
    with pytest.raises(AssertionError):
        refused()


def test_a_model_in_python_is_held_to_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        with pytest.raises(PeftcError, match=rules.OPTIMIZER_MISFIT.code):
            model = adapted(use_dora=True)
            fit(model, rows(), PAD, section(optimizer="lorafa", save_steps=None), tmp_path / "out")

    refused()
    put_defect(monkeypatch, optimizing, "    if found:", "    if False:")
    with pytest.raises(pytest.fail.Exception):
        refused()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        (None, None, "gradients 8.2 kB, AdamW 16.4 kB"),
        ("sgd", None, "gradients 8.2 kB, SGD 0 B"),
        ("sgd", {"momentum": 0.5}, "gradients 8.2 kB, SGD 8.2 kB"),
        ("adafactor", None, "gradients 8.2 kB, Adafactor 2.2 kB"),
        ("adagrad", None, "gradients 8.2 kB, Adagrad 8.2 kB"),
        ("rmsprop", {"momentum": 0.5, "centered": True}, "gradients 8.2 kB, RMSprop 24.6 kB"),
        ("loraplus", None, "gradients 8.2 kB, LoRA+ 16.4 kB"),
        ("lorafa", None, "gradients 4.1 kB, LoRA-FA 8.2 kB"),
    ],
)
def test_the_plan_shows_what_it_keeps(
    name: str | None, options: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, {"optimizer": name, "optimizer_options": options})
    assert main(["plan", str(file)]) == 0
    assert told in " ".join(capsys.readouterr().out.split())


@every_optimizer
def test_what_it_keeps_is_as_large_as_the_plan_says(name: str) -> None:
    model = adapted()
    chosen = chosen_optimizer(name, OPTIONS[name])
    made = optimizing.optimizing(chosen, model, section(optimizer=name))
    if "optimizers" in made:
        own = made["optimizers"][0]
    else:
        cls, keywords = made["optimizer_cls_and_kwargs"]
        own = cls([p for p in model.parameters() if p.requires_grad], **keywords)
    ids = torch.tensor([rows()[0].input_ids])
    model(ids, labels=ids).loss.backward()
    own.step()
    held = sum(
        value.numel()
        for state in own.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert held == sum(chosen.record.keeps(chosen.options, p.shape) for p in trained)


def test_a_strangers_method_brings_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Options(plugin.ConfigModel):
        slowness: float = plugin.Field(default=1.0, gt=0)

    def make(model: Any, c: Any, lr: float, decay: float) -> Any:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr / c.slowness)

    class OwnConfig(peftc.HiraConfig):
        peft_type: plugin.PeftType | None = plugin.PeftType("OWN_METHOD")

    known = default_registry().get("HIRA")
    record = plugin.NamedOptimizer("slow", "Slow", Options, make=make, keeps=lambda c, shape: 0)
    own = replace(known, peft_type="OWN_METHOD", config=OwnConfig, exports={}, optimizers=(record,), model_class="OwnModel",
                  layer_class="OwnLayer")  # fmt: skip
    plugin.register_plugin(own)
    try:
        assert find_optimizer("slow") is record
        file = written(tmp_path, {"optimizer": "slow", "optimizer_options": {"slowness": 0}})
        assert told(file, capsys) == [(rules.BAD_VALUE.code, f"{OWN}.slowness")]
        file = written(tmp_path, {"optimizer": "slow", "optimizer_options": {"slowness": 2.0}})
        assert told(file, capsys) == []
        assert main(["plan", str(file)]) == 0 and "Slow 0 B" in " ".join(capsys.readouterr().out.split())
        trained(section(optimizer="slow", save_steps=None), tmp_path / "out")
    finally:
        plugin.unregister_plugin("OWN_METHOD")
    assert find_optimizer("slow") is None
