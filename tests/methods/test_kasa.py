"""KaSA beside the reference: outputs, the terms of the loss, gradients, merging, files both ways; and the base weights that its
adapters change, in every state and after every operation.

The reference takes the weakest components out for good, and has no adapter without beside one. Here the base is as it was
wherever no such adapter acts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peftc_plugins.lora import kasa
from torch import Tensor, nn

import peftc
from peftc import KasaConfig, LoraConfig, PeftcError, PeftModel, plugin, rules
from peftc.compiler.passes import starts as passes
from peftc.diagnostics import Rule
from peftc.registry import contract
from peftc.registry import starts as registry
from tests.defects import put_defect
from tests.methods import test_base_changes as changes
from tests.methods.test_base_changes import PATHS, Done, X, base, plain_again

KEPT = "peftc_start.safetensors"


def options(r: int = 3, **more: Any) -> LoraConfig:
    own = {"r": r, "target_modules": list(PATHS), "lora_alpha": 6, "kasa_config": {"beta": 0.1, "gamma": 0.2}}
    return LoraConfig(**{**own, **more})


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pair(**more: Any) -> tuple[Any, PeftModel]:
    """The adapter in both libraries from one seed, theirs first."""
    made = []
    for library in (peft, peftc):
        plain = base()
        torch.manual_seed(2)
        config = options(**more).to_dict()
        config = {name: config[name] for name in ("r", "target_modules", "lora_alpha", "lora_dropout", *more)}
        own = library.LoraConfig(**config, kasa_config=library.KasaConfig(beta=0.1, gamma=0.2))
        made.append(library.get_peft_model(plain, own))
    return made[0], made[1]


# beside the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}])
def test_it_begins_as_the_reference_does(more: dict[str, Any]) -> None:
    theirs, ours = pair(**more)
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[name], parameter)
    torch.testing.assert_close(ours(X), theirs(X))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_loss_and_gradients_are_the_references(dropout: float) -> None:
    found = []
    for model in pair(lora_dropout=dropout):
        moved(model).train()
        torch.manual_seed(7)
        term = model._get_kasa_loss()
        loss = model(X).square().sum() + term
        loss.backward()
        found.append((term, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (term, loss, gradients), (own_term, own_loss, own) = found
    torch.testing.assert_close(own_term, term)
    torch.testing.assert_close(own_loss, loss)
    assert own.keys() == gradients.keys() and any("lora_diag" in name for name in own)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5)


def test_merged_it_is_the_references() -> None:
    theirs, ours = (moved(model) for model in pair())
    y = theirs(X)
    torch.testing.assert_close(ours(X), y)
    layer = ours.get_base_model()[0]
    A, B, d = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.scaling["default"] * B @ torch.diag(d) @ A)
    torch.testing.assert_close(ours.merge_and_unload()(X), theirs.merge_and_unload()(X))


def test_in_half_precision() -> None:
    made = []
    for library in (peft, peftc):
        plain = base(torch.bfloat16)
        torch.manual_seed(2)
        config = library.LoraConfig(r=3, target_modules=list(PATHS), kasa_config=library.KasaConfig())
        made.append(moved(library.get_peft_model(plain, config)))
    theirs, ours = made
    torch.testing.assert_close(ours(X.bfloat16()), theirs(X.bfloat16()), rtol=2e-2, atol=2e-2)
    with plain_again(ours, base(torch.bfloat16)):
        pass


def test_two_at_once_drop_what_the_larger_does() -> None:
    """As in the reference, where the second finds a weight that lacks the components already."""
    made = []
    for library in (peft, peftc):
        plain = base()
        torch.manual_seed(2)
        config = {"target_modules": list(PATHS), "kasa_config": library.KasaConfig()}
        model = library.get_peft_model(plain, library.LoraConfig(r=2, **config), "a")
        model.add_adapter("b", library.LoraConfig(r=4, **config))
        moved(model).base_model.set_adapter(["a", "b"])
        made.append(model)
    theirs, ours = made
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)
    ours.merge_adapter()
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


class Losing(nn.Module):
    """A model that computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        from types import SimpleNamespace

        y = self.lin(x)
        return SimpleNamespace(logits=y, loss=None if labels is None else (y - labels).square().mean())


def test_the_terms_of_the_loss_are_added_once() -> None:
    """By the model's loss where it has one, and else for who asks, however often."""
    config = LoraConfig(r=2, target_modules=["lin"], kasa_config=KasaConfig(beta=0.5, gamma=0.5))
    model, x = peftc.get_peft_model(Losing(), config).train(), torch.randn(4, 8)
    model(x)
    term = model._get_kasa_loss()
    assert term > 0 and torch.equal(model._get_kasa_loss("default"), term)
    whole = model(x, labels=x)
    torch.testing.assert_close(whole.loss - (whole.logits - x).square().mean(), term)
    assert model._get_kasa_loss() == 0.0
    model(x)
    torch.testing.assert_close(model._get_kasa_loss(), term)
    whole = model.eval()(x, labels=x)
    torch.testing.assert_close(whole.loss, (whole.logits - x).square().mean())
    plain = peftc.get_peft_model(Losing(), LoraConfig(r=2, target_modules=["lin"]))
    assert plain._get_kasa_loss() == 0.0


# files ----------------------------------------------------------------------------------------------------------------


def test_files_go_both_ways(tmp_path: Path) -> None:
    theirs, ours = (moved(model).eval() for model in pair())
    for model, place in ((theirs, "theirs"), (ours, "ours")):
        model.save_pretrained(tmp_path / place)
    y = ours(X)
    for place in ("theirs", "ours"):
        for lean in (False, True):
            again = peft.PeftModel.from_pretrained(base(), tmp_path / place, low_cpu_mem_usage=lean).eval()
            torch.testing.assert_close(again(X), y)
            loaded = PeftModel.from_pretrained(base(), tmp_path / place, low_cpu_mem_usage=lean).eval()
            torch.testing.assert_close(loaded(X), y)
            with plain_again(loaded, base()):
                pass


def test_our_own_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = moved(peftc.get_peft_model(base(), options())).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / KEPT).is_file()
    y = model(X)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(X), y)
    (tmp_path / KEPT).unlink()
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(X), y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beginning", [True, "folder"])
def test_turned_to_the_original_base_it_is_a_plain_adapter(tmp_path: Path, beginning: bool | str) -> None:
    model = peftc.get_peft_model(base(), options()).eval()
    model.save_pretrained(tmp_path / "first")
    moved(model)
    place = tmp_path / "first" if beginning == "folder" else True
    model.save_pretrained(tmp_path / "turned", path_initial_model_for_weight_conversion=place)
    for library in (peftc, peft):
        again = library.PeftModel.from_pretrained(base(), tmp_path / "turned").eval()
        assert again.peft_config["default"].kasa_config is None
        torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_converted_it_does_the_same_beside_the_original_base() -> None:
    """The reference refuses."""
    model = moved(peftc.get_peft_model(base(), options())).eval()
    config, tensors = peftc.convert_to_lora(model, 6)
    again = peftc.get_peft_model(base(), config)
    peftc.set_peft_model_state_dict(again, tensors)
    torch.testing.assert_close(again.eval()(X), model(X), rtol=1e-4, atol=1e-4)


def test_combined_adapters_are_refused() -> None:
    model = peftc.get_peft_model(base(), options(), "a")
    model.add_adapter("b", options())
    with pytest.raises(PeftcError, match="path_initial_model_for_weight_conversion"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")


# the table ------------------------------------------------------------------------------------------------------------


def made() -> PeftModel:
    """Adapters `p` and `q` of KaSA, `n` without; all of them trained a little. `p` is active."""
    model = peftc.get_peft_model(base(), options(), "p")
    model.add_adapter("q", options(5))
    model.add_adapter("n", options(kasa_config=None))
    return moved(model)


def expected(model: PeftModel, acting: tuple[str, ...], original: nn.Sequential) -> Tensor:
    """The formula, in float64: the smallest components of the base, as many as the largest of the ranks, are missing."""
    y = X.double()
    for index, plain in enumerate(original):
        if isinstance(plain, nn.ReLU):
            y = y.relu()
            continue
        layer, weight = model.get_base_model()[index], plain.weight.detach().double()
        left, values, rows = torch.linalg.svd(weight, full_matrices=False)
        drops = max((layer.r[name] for name in acting if name in layer.lora_diag), default=0)
        values[len(values) - drops :] = 0
        weight = (left * values) @ rows
        for name in acting:
            A, B = (getattr(layer, slot)[name].weight.detach().double() for slot in ("lora_A", "lora_B"))
            inner = layer.lora_diag[name].detach().double() if name in layer.lora_diag else torch.ones(len(A)).double()
            weight = weight + layer.scaling[name] * (B * inner) @ A
        y = y @ weight.T + plain.bias.detach().double()
    return y


def same_as(model: PeftModel, acting: tuple[str, ...], original: nn.Sequential) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(X).double(), expected(model, acting, original), rtol=1e-4, atol=1e-4)


def added(model: PeftModel, acting: tuple[str, ...]) -> Done:
    """A further one decomposes the original weight, whatever is in place."""
    model.add_adapter("r", options())
    kept = [model.get_base_model()[0].rebased.held[name].kept for name in ("r", "p") if name in model.peft_config]
    for other in kept[1:]:
        torch.testing.assert_close(kept[0]["B"] @ kept[0]["A"], other["B"] @ other["A"])
    return model, acting


OPERATIONS = (*(operation for operation in changes.OPERATIONS if operation is not changes.added), added)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("state", changes.STATES, ids=lambda f: f.__name__)
def test_table(state: changes.State, operation: changes.Operation) -> None:
    changes.holds(made(), same_as, state, operation)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", changes.STATES, ids=lambda f: f.__name__)
def test_taken_off_everything_is_as_it_was(state: changes.State) -> None:
    changes.comes_off(made(), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", changes.STATES, ids=lambda f: f.__name__)
def test_merged_for_good(state: changes.State) -> None:
    changes.merges(made(), expected, state)


# what is refused ------------------------------------------------------------------------------------------------------


def on(build: Callable[[], nn.Module] = base, **more: Any) -> Callable[[], object]:
    return lambda: peftc.get_peft_model(build(), options(**more))


class Forgetful(plugin.Start):
    """Leaves the base as it is, so that no variant needs it."""

    name = "kasa-forgetful"

    def factors(self, s: plugin.StartView) -> plugin.Begun:
        raise NotImplementedError


REFUSED: dict[str, tuple[Rule, Callable[[], object], str, tuple[ModuleType, str, str]]] = {
    "another start": (
        rules.CONTRADICTION,
        on(init_lora_weights="pissa"),
        "`kasa_config` has a start of its own, and `init_lora_weights: pissa` names another",
        (registry, "        if other is not None and (", "        if False and ("),
    ),
    "another start, that leaves the base": (
        rules.CONTRADICTION,
        on(init_lora_weights="orthogonal", r=4),
        "`init_lora_weights: orthogonal` names another",
        (registry, "        if other is not None and (", "        if False and ("),
    ),
    "nothing is left": (
        rules.BAD_TARGET,
        on(r=12),
        "leaves nothing of the weight of `2`",
        (kasa, "if c.r == layer.rank:", "if False:"),
    ),
    "not a real weight": (
        rules.START_UNFIT,
        on(lambda: base().to(torch.complex64)),
        "Load the base model unquantised",
        (passes, "        yield from chosen.problems(config, layer, rank, path, option)", "        return"),
    ),
    "no scaling": (
        rules.START_UNFIT,
        on(lora_alpha=0),
        "divides by the scaling",
        (passes, "scaling <= 0:", "False:"),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, act, says, defect = REFUSED[name]
    with pytest.raises(PeftcError) as caught:
        act()
    assert any(told.code == rule.code and says in str(told) for told in caught.value.diagnostics), str(caught.value)
    put_defect(monkeypatch, *defect)
    try:
        act()
    except Exception as error:
        assert says not in str(error)


def test_what_factors_of_a_file_began_with_does_not_matter(tmp_path: Path) -> None:
    """The reference may have begun them otherwise, if that left the base as it is."""
    theirs, ours = (moved(model).eval() for model in pair())
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    text = file.read_text()
    file.write_text(text.replace('"init_lora_weights": true', '"init_lora_weights": "eva"'))
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(X), ours(X))
    file.write_text(text.replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(PeftcError, match="names another"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_the_record_of_a_variant_takes_starts_that_change_the_base() -> None:
    record = copy.copy(kasa.VARIANT)
    object.__setattr__(record, "chosen", None)
    assert contract.variant_problem("", record) == ""
    object.__setattr__(record, "start", Forgetful())
    assert "`start` is" in contract.variant_problem("", record)


def test_layers_of_other_kinds_are_refused() -> None:
    with pytest.raises(PeftcError, match="kasa_config"):
        peftc.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), LoraConfig(target_modules=["0"], kasa_config={}))
