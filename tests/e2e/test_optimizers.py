"""The three optimisers for thin factors take the reference's steps, on its own models with equal weights."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
from peftc import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer, rules
from peftc.diagnostics import PeftcError, PeftcWarning
from peftc.model.functions import optimizers
from peftc.registry.manager import default_registry
from peftc.testing.subjects import subjects
from tests.defects import put_defect

THEIRS = importlib.import_module("peft.optimizers")


class Net(nn.Module):
    """An embedding, a norm, two linear layers, one with a bias, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.lin0, self.lin1, self.head = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin1(self.lin0(self.norm(self.embed(ids))))))


def made(library: ModuleType, **options: Any) -> Any:
    torch.manual_seed(0)
    config = library.LoraConfig(
        **{"target_modules": ["lin0", "lin1"], "r": 4, "modules_to_save": ["head"], "bias": "lora_only", **options}
    )
    model = library.get_peft_model(Net(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.arange(20)
    for _ in range(steps):
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({}, {}),
        ({"target_modules": ["embed", "lin0"]}, {"loraplus_lr_embedding": 1e-3}),
        ({"bias": "all"}, {"loraplus_weight_decay": 0.1}),
    ],
    ids=["plain", "embedding", "decay"],
)
def test_lora_plus_is_the_references(options: dict[str, Any], keywords: dict[str, Any]) -> None:
    states = []
    for library, create in ((peftc, create_loraplus_optimizer), (peft, THEIRS.create_loraplus_optimizer)):
        model = made(library, **options)
        optimizer = create(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, eps=1e-6, **keywords)
        groups = [
            (g["lr"], g["weight_decay"], sorted(tuple(p.shape) for p in g["params"])) for g in optimizer.param_groups
        ]
        states.append((groups, trained(model, optimizer)))
    assert states[0][0] == states[1][0]
    alike(states[0][1], states[1][1])


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({}, 0.0),
        ({"lora_alpha": 32, "use_rslora": True}, 0.1),
        ({"rank_pattern": {"lin1": 2}, "target_modules": ["embed", "lin1"]}, 0.0),
    ],
    ids=["plain", "scaled", "ranks"],
)
def test_lora_fa_is_the_references(options: dict[str, Any], decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = importlib.import_module("peft.optimizers.lorafa")
    monkeypatch.setattr(theirs, "is_bf16_available", lambda: False)  # it multiplies in bfloat16, also on a CPU
    states = []
    for library, create in ((peftc, create_lorafa_optimizer), (peft, theirs.create_lorafa_optimizer)):
        model = made(library, **options)
        optimizer = create(model, r=4, lora_alpha=options.get("lora_alpha", 8), lr=1e-2, weight_decay=decay)
        states.append(trained(model, optimizer))
    alike(*states)


def test_lora_fa_moves_nothing_but_what_trains_and_goes_on_after_a_restart() -> None:
    whole, first = made(peftc), made(peftc)
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    optimizer = create_lorafa_optimizer(whole, 4, 8, 1e-2)
    wanted = trained(whole, optimizer, steps=4)
    moved = {name for name, tensor in wanted.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in whole.named_parameters() if p.requires_grad}
    assert not any("lora_A" in name for name in moved)
    start = create_lorafa_optimizer(first, 4, 8, 1e-2)
    trained(first, start, steps=2)
    again = create_lorafa_optimizer(first, 4, 8, 1e-2)
    again.load_state_dict(start.state_dict())
    alike(trained(first, again, steps=2), wanted)


def test_lora_fa_tells_what_it_does_not_follow() -> None:
    with pytest.warns(PeftcWarning, match=r"PC646.*use_rslora"):
        create_lorafa_optimizer(made(peftc), 4, 8, 1e-2, use_rslora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_lorafa_optimizer(made(peftc), 4, 8, 1e-2, use_rslora=False)


def test_lora_fa_refuses_factors_of_experts() -> None:
    stacked = next(s for s in subjects(default_registry().get("LORA")) if s.parameters)
    with pytest.raises(PeftcError, match=r"PC401.*experts"):
        create_lorafa_optimizer(stacked.wrap(), 8, 8, 1e-2)


@pytest.mark.parametrize(
    ("options", "cls", "keywords"),
    [
        ({}, torch.optim.SGD, {"momentum": 0.5}),
        ({"use_dora": True}, torch.optim.AdamW, {"reg": 0.1, "weight_decay": 0.1}),
        ({"target_modules": ["embed", "lin1"], "bias": "all"}, torch.optim.AdamW, {}),
    ],
    ids=["plain", "magnitudes", "embedding"],
)
def test_preconditioned_is_the_references(
    options: dict[str, Any], cls: type[torch.optim.Optimizer], keywords: dict[str, Any]
) -> None:
    creates = (peftc, create_riemannian_optimizer), (peft, THEIRS.create_riemannian_optimizer)
    models = [(made(library, **options), create) for library, create in creates]
    alike(*(trained(model, create(model, cls, lr=1e-2, **keywords)) for model, create in models))


def test_a_preconditioned_step_with_a_closure_is_one_without() -> None:
    ids, models = torch.arange(20), [made(peftc), made(peftc)]
    for model, with_closure in zip(models, (True, False), strict=True):
        optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)

        def loss(model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            found: torch.Tensor = model(ids).square().sum()
            found.backward()
            return found

        wanted = loss().detach()
        given = optimizer.step(loss) if with_closure else optimizer.step()
        assert given is None or torch.equal(given, wanted)
    alike(*({name: p.detach() for name, p in model.named_parameters()} for model in models))


def test_what_cannot_be_preconditioned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        for cls in (torch.optim.LBFGS, nn.Linear):
            with pytest.raises(PeftcError, match=rules.OPTIMIZER_UNFIT.code):
                create_riemannian_optimizer(made(peftc), cls, lr=1e-2)

    refused()
    with pytest.raises(PeftcError, match=rules.NOT_ADAPTED.code):
        create_riemannian_optimizer(made(peftc, target_modules=["embed"]), torch.optim.SGD, lr=1e-2)
    inactive = made(peftc)
    inactive.set_requires_grad("default", False)
    with pytest.raises(PeftcError, match=rules.NOT_ADAPTED.code):
        create_riemannian_optimizer(inactive, torch.optim.SGD, lr=1e-2)
    stacked = next(s for s in subjects(default_registry().get("LORA")) if s.parameters)
    with pytest.raises(PeftcError, match=r"PC401.*experts"):
        create_riemannian_optimizer(stacked.wrap(), torch.optim.SGD, lr=1e-2)
    put_defect(monkeypatch, optimizers, "closure.default is inspect.Parameter.empty:", "False:")
    with pytest.raises(pytest.fail.Exception):
        refused()


def test_methods_optimisers_are_in_one_module() -> None:
    from peftc import optimizers as module

    assert module.create_riemannian_optimizer is create_riemannian_optimizer
    assert set(dir(module)) == set(dir(THEIRS)) & set(dir(module)) >= {"create_lorafa_optimizer"}
    for name in ("create_riemanian_optimizer", "convert_to_lora"):
        with pytest.raises(AttributeError, match=r"create_riemannian_optimizer|has no attribute `convert_to_lora`"):
            getattr(module, name)
