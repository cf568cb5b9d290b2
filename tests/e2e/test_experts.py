"""Fused experts: `target_parameters` adapts single parameters of a module, as the reference does, and says what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import peftc
from peftc import PeftcError, PeftcWarning
from peftc.compiler.plan.render import render_plan
from peftc.compiler.plan.serial import plan_from_text, plan_to_text
from peftc.plugin import EXPERT_KINDS, ExpertsMixin
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.models import seeded
from tests.e2e.pairs import moved

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Two weights for each expert, stored either way round."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 4, 6) if transposed else torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 6, 4) if transposed else torch.randn(3, 4, 6))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        return (weights.t()[..., None] * ((x @ up).relu() @ down)).sum(0) * self.scale


class Sparse(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).softmax(-1))


def sparse(transposed: bool = False) -> nn.Module:
    with seeded(0):
        return Sparse(transposed).eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=20,
    )  # fmt: skip
    with seeded(0):
        return transformers.MixtralForCausalLM(config).eval()


def call(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, (peft.PeftModel, peftc.PeftModel)) else model
    with torch.no_grad(), seeded(1):
        if isinstance(inner, Sparse):
            return model(torch.randn(5, 4))
        return model(input_ids=torch.arange(14).reshape(2, 7)).logits


def pair(make: Any, **options: Any) -> tuple[Any, Any]:
    """Both libraries' models with equal tensors."""
    theirs, ours = (lib.get_peft_model(make(), lib.LoraConfig(**options)).eval() for lib in (peft, peftc))
    moved(theirs, "default", 1)
    peftc.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "both": (mixtral, {"r": 2, "target_parameters": BOTH, "target_modules": ["q_proj"]}),
    "one": (mixtral, {"r": 2, "target_parameters": ["experts.down_proj"], "target_modules": []}),
    "pattern": (
        mixtral,
        {"r": 2, "target_parameters": BOTH, "target_modules": [], "rank_pattern": {r".*\.experts\.gate_up_proj": 3}},
    ),
    "plain": (sparse, {"r": 2, "target_parameters": ["experts.up", "experts.down"]}),
    "transposed": (lambda: sparse(True), {"r": 2, "target_parameters": ["experts.up", "experts.down"]}),
    "a matrix": (sparse, {"r": 2, "target_parameters": ["router.weight"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_reference_s(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    theirs, ours = pair(make, **options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    y, base = call(ours), call(make())
    torch.testing.assert_close(y, call(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, base, rtol=1e-3, atol=1e-3)
    with ours.disable_adapter():
        torch.testing.assert_close(call(ours), base, rtol=0, atol=0)
    for writer, reader in ((ours, peft), (theirs, peftc)):
        folder = tmp_path / reader.__name__
        writer.save_pretrained(folder)
        torch.testing.assert_close(
            call(reader.PeftModel.from_pretrained(make(), folder).eval()), y, rtol=1e-4, atol=1e-5
        )
    ours.merge_adapter()
    torch.testing.assert_close(call(ours), y, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(call(ours), y, rtol=0, atol=0)
    torch.testing.assert_close(call(ours.merge_and_unload()), y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_several_adapters_and_the_plan() -> None:
    theirs, ours = pair(mixtral, r=2, target_parameters=BOTH, target_modules=[])
    options = {"r": 3, "target_parameters": BOTH, "target_modules": []}
    theirs.add_adapter("second", peft.LoraConfig(**options))
    ours.add_adapter("second", peftc.LoraConfig(**options))
    moved(theirs, "second", 2)
    peftc.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs, adapter_name="second"), "second")
    for model in (theirs, ours):
        model.set_adapter("second")
    torch.testing.assert_close(call(ours), call(theirs), rtol=1e-4, atol=1e-5)
    both = call(ours)
    ours.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(call(ours), both)
    ours.set_adapter("default")
    ours.delete_adapter("second")
    assert not [name for name, _ in ours.named_parameters() if "second" in name]
    restored = ours.unload()
    torch.testing.assert_close(call(restored), call(mixtral()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_the_plan_equals_the_model_and_says_what_is_adapted() -> None:
    config = peftc.LoraConfig(r=2, target_parameters=BOTH, target_modules=["q_proj"])
    plan = peftc.compile_plan(snapshot(mixtral()), {"default": config})
    model = peftc.PeftModel.from_plan(mixtral(), plan)
    live = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.shape for p in plan.parameters()} == live
    assert model.get_nb_trainable_parameters() == plan.counts()
    assert list(plan_from_text(plan_to_text(plan)).parameters()) == list(plan.parameters())
    shown = render_plan(plan)
    assert "gate_up_proj 4×(16→16)" in shown and "down_proj 4×(8→16)" in shown


def test_experts_that_no_target_reaches_are_told_how_to_be_reached() -> None:
    with pytest.warns(PeftcWarning, match=r"(?s)PC415.*target_parameters.*experts.gate_up_proj"):
        peftc.get_peft_model(mixtral(), peftc.LoraConfig(target_modules="all-linear", exclude_modules=["experts"]))


def two(**options: Any) -> Any:
    model = peftc.get_peft_model(sparse(), peftc.LoraConfig(r=2, target_parameters=["experts.up"]))
    model.add_adapter("other", peftc.LoraConfig(**{"r": 2, "target_parameters": ["experts.up"], **options}))
    return model


REFUSED: dict[str, tuple[str, Any]] = {
    "no such parameter": ("PC408", lambda: peftc.get_peft_model(sparse(), peftc.LoraConfig(target_parameters=["experts.upp"]))),
    "a vector": ("PC401", lambda: peftc.get_peft_model(sparse(), peftc.LoraConfig(target_parameters=["experts.scale"]))),
    "dropout": ("PC401", lambda: peftc.get_peft_model(sparse(), peftc.LoraConfig(target_parameters=["experts.up"], lora_dropout=0.1))),
    "module and parameter": (
        "PC401",
        lambda: peftc.get_peft_model(sparse(), peftc.LoraConfig(target_parameters=["router.weight"], target_modules=["router"])),
    ),
    "other parameters": ("PC431", lambda: two(target_parameters=["experts.down"])),
    "rows": ("PC511", lambda: two()(torch.randn(2, 4), adapter_names=["default", "other"])),
    "weighted": ("PC550", lambda: two().add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")),
    "converted": ("PC543", lambda: peftc.convert_adapter(two(), "LORA", 2)),
    "swapped": (
        "PC551",
        lambda: peftc.hotswap_adapter_from_state_dict(
            two(r=3), two(r=3).adapter_tensors("other"), "default", peftc.LoraConfig(r=3, target_parameters=["experts.up"])
        ),
    ),
    "mixed": (
        "PC542",
        lambda: peftc.get_peft_model(sparse(), peftc.LoraConfig(target_parameters=["experts.up"]), mixed=True),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_experts_cannot_do_is_told(name: str) -> None:
    code, act = REFUSED[name]
    with pytest.raises(PeftcError) as found:
        act()
    assert code in {problem.code for problem in found.value.diagnostics}


# methods whose mathematics is that of linear layers --------------------------------------------------------------------

REGISTRY = default_registry()
LIFTED = [
    method.peft_type
    for method in map(REGISTRY.get, REGISTRY.names)
    if method.supports >= EXPERT_KINDS and issubclass(method.config, ExpertsMixin)
]


def test_several_methods_adapt_experts() -> None:
    assert {"LOHA", "LOKR", "HIRA", "OFT", "BOFT", "HRA", "IA3", "FOURIERFT"} <= set(LIFTED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIFTED)
def test_every_method_trains_saves_and_merges_both_weights_of_experts(name: str, tmp_path: Path) -> None:
    method = REGISTRY.get(name)
    config = method.config(**{**method.examples[0], "target_modules": [], "target_parameters": BOTH})
    with seeded(0):
        model = peftc.get_peft_model(mixtral(), config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable and {p.shape[0] for p in trainable} == {4}, "each of the four experts has its part"
    ids, losses = torch.arange(12).view(2, 6), []
    optimiser = torch.optim.Adam(trainable, lr=1e-3)
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    y = call(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(call(peftc.PeftModel.from_pretrained(mixtral(), tmp_path).eval()), y, rtol=0, atol=0)
    model.add_adapter("second", config.model_copy())
    torch.testing.assert_close(call(model), y, rtol=0, atol=0)
    torch.testing.assert_close(call(model.merge_and_unload()), y, rtol=1e-4, atol=1e-5)


def test_an_empty_choice_of_parameters_is_saved_as_it_is(tmp_path: Path) -> None:
    theirs, ours = pair(mixtral, r=2, target_parameters=[], target_modules=["q_proj"])
    saved = []
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
        saved.append(json.loads((tmp_path / name / "adapter_config.json").read_text())["target_parameters"])
    assert saved == [[], []]
