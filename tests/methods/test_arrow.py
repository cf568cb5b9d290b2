"""Arrow, beside the reference: what a router computes of the adapters on a layer, and that these stay as they are."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftc_plugins.lora import arrow
from safetensors.torch import load_file
from torch import Tensor, nn

import peftc
from peftc import ArrowConfig, LoraConfig, PeftcError, PeftModel, create_arrow_model, get_peft_model, rules
from peftc.runtime.slots import views
from peftc.testing.models import MODELS, seeded
from tests.defects import put_defect
from tests.e2e.test_interop import config_in

LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)
IDS = torch.tensor([[3, 7, 9, 4, 5, 6], [7, 2, 3, 7, 9, 6], [1, 2, 3, 4, 7, 9]])
ROUTER = "arrow_router"
X = torch.linspace(-1, 1, 24).reshape(4, 6)
TARGETS = ["q_proj", "v_proj"]
OPTIONS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 1},
    {"top_k": 3, "router_temperature": 0.3},
    {"top_k": 2, "use_gks": True},
]


def base() -> nn.Module:
    with seeded(0):
        return LANGUAGE_MODEL.build()


def trained(folder: Path, seed: int, **options: Any) -> str:
    """A saved adapter, of the reference."""
    own = {"r": 4, "lora_alpha": 3 + seed, "target_modules": TARGETS, "init_lora_weights": False, **options}
    with seeded(seed):
        peft.get_peft_model(base(), peft.LoraConfig(**own)).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [trained(tmp_path_factory.mktemp("task"), seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [trained(tmp_path_factory.mktemp("general"), seed) for seed in (4, 5)]


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """Draws that a test does not settle itself are the same in each run."""
    with seeded(9):
        yield


def made(library: Any, tasks: list[str], general: list[str] | None = None, **options: Any) -> Any:
    own = library.ArrowConfig(**{"top_k": 2, "rng_seed": 11, **options})
    return library.create_arrow_model(base(), tasks, own, general if own.use_gks else None).eval()


def said(model: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **call).logits
    return found


def of(model: nn.Module, *adapters: str) -> dict[str, Tensor]:
    """The tensors of these adapters."""
    return {n: p for n, p in model.named_parameters() if any(f".{name}." in n for name in adapters)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_call_is_the_references(tasks: list[str], general: list[str], options: dict[str, Any]) -> None:
    ours, theirs = (made(library, tasks, general, **options) for library in (peftc, peft))
    before = {name: p.clone() for name, p in ours.named_parameters()}
    assert before.keys() == dict(theirs.named_parameters()).keys()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for _ in range(2):
        torch.testing.assert_close(said(ours), said(theirs), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
    ours.set_adapter("task_0")
    alone = PeftModel.from_pretrained(base(), tasks[0]).eval()
    assert torch.equal(said(ours), said(alone))


def test_gradients_are_the_references(tasks: list[str]) -> None:
    """Of adapters that are active beside the router alone; none of its own."""
    found = []
    for library in (peftc, peft):
        model = made(library, tasks)
        model(IDS).logits.square().sum()
        assert not any(p.requires_grad for p in of(model, "task_0", "task_1", "task_2").values())
        model.base_model.set_adapter([ROUTER, "task_0"])
        model(input_ids=IDS).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == of(model, "task_0").keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-4)


def test_gradients_are_slopes_through_what_is_taken_off_too() -> None:
    model = mixture(("task_0", "task_1", "gks_0"), use_gks=True).double()
    model.base_model.set_adapter([ROUTER, "task_1", "gks_0"])
    layer = model.get_base_model()[0]
    names = ["lora_B.gks_0.weight", "lora_A.task_1.weight"]

    def called(x: Tensor, *tensors: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))
        return found

    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(called, (x, *(layer.get_parameter(name) for name in names)))


def small(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False, **options})


def router(**options: Any) -> LoraConfig:
    return small(arrow_config=ArrowConfig(**{"top_k": 1, "rng_seed": 0, **options}))


def mixture(names: tuple[str, ...] = ("task_0", "task_1"), **options: Any) -> PeftModel:
    """A layer with adapters of these names, and an active router over them."""
    with seeded(3):
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), small(), names[0])
        for name in names[1:]:
            model.add_adapter(name, small())
        model.add_adapter(ROUTER, router(**options))
        model.set_adapter(ROUTER)
    return model.eval()


def test_what_is_dropped_is_dropped_of_the_sum() -> None:
    found = []
    for library in (peftc, peft):
        own = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
        with seeded(3):
            model = library.get_peft_model(nn.Sequential(nn.Linear(6, 5)), library.LoraConfig(**own), "task_0")
            model.add_adapter("task_1", library.LoraConfig(**own))
            config = library.ArrowConfig(top_k=2, rng_seed=0)
            config.task_adapter_names, config.gks_adapter_names = ["task_0", "task_1"], []
            model.add_adapter(ROUTER, library.LoraConfig(**own, lora_dropout=0.5, arrow_config=config))
        model.set_adapter(ROUTER)
        model.train()
        with seeded(8):
            found.append(model(X))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0], model.eval()(X))


# adapters that come and go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_gks", [False, True])
@pytest.mark.parametrize("is_called", [False, True])
def test_an_adapter_that_comes_later_is_weighed(
    tasks: list[str], general: list[str], use_gks: bool, is_called: bool
) -> None:
    model = made(peftc, tasks[:2], general, use_gks=use_gks)
    fewer = said(model) if is_called else None
    model.load_adapter(tasks[2], "another")
    for library in (peftc, peft):
        torch.testing.assert_close(
            said(model), said(made(library, tasks, general, use_gks=use_gks)), rtol=1e-4, atol=1e-5
        )
    model.delete_adapter("another")
    assert fewer is None or torch.equal(said(model), fewer)


def test_where_the_reference_does_otherwise(tasks: list[str], general: list[str]) -> None:
    """It writes to the adapters that it weighs, and weighs those that are gone, and routers."""
    theirs = made(peft, tasks, general, use_gks=True)
    before = {name: p.clone() for name, p in of(theirs, "task_0").items()}
    said(theirs)
    assert not any(torch.equal(p, before[name]) for name, p in of(theirs, "task_0").items())
    theirs.delete_adapter("task_2")
    with pytest.raises(KeyError):
        said(theirs)
    theirs = made(peft, tasks)
    theirs.add_adapter(
        "second", peft.LoraConfig(r=4, target_modules=TARGETS, arrow_config=theirs.peft_config[ROUTER].arrow_config)
    )
    routers = theirs.get_base_model().model.layers[0].self_attn.q_proj.lora_arrow
    assert "second" in routers["second"].task_adapter_names


def written(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A["task_0"].weight.copy_(torch.randn(2, 6))


def swapped(layer: Any) -> None:
    layer.lora_B["task_1"].weight = nn.Parameter(torch.randn(5, 2))


def scaled(layer: Any) -> None:
    layer.set_scale("task_1", 0.1)


def general_written(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A["gks_0"].weight.copy_(torch.randn(2, 6))


@pytest.mark.parametrize("change", [written, swapped, scaled, general_written])
def test_directions_are_found_again_when_what_they_are_of_changes(change: Callable[[Any], None]) -> None:
    model = mixture(("task_0", "task_1", "gks_0"), use_gks=True, top_k=2)
    before, layer = model(X), model.get_base_model()[0]
    change(layer)
    after = model(X)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(model)(X))  # which keeps nothing


def test_directions_are_kept_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = mixture(), []
    direction = arrow._direction
    monkeypatch.setattr(arrow, "_direction", lambda *args: found.append(args) or direction(*args))
    for _ in range(3):
        model(X)
        model.train()(X)
        model.eval()
    assert len(found) == 2


def test_another_router_is_not_weighed() -> None:
    model = mixture()
    wanted = model(X)
    model.add_adapter("second", router(top_k=2))
    assert torch.equal(model(X), wanted)
    model.set_adapter("second")
    assert not torch.equal(model(X), wanted)


def test_states(tasks: list[str]) -> None:
    model = made(peftc, tasks)
    wanted, plain = said(model), base().eval()(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(said(model), plain)
    assert torch.equal(said(model), wanted)
    names = [ROUTER, "task_1", "__base__"]
    rows = said(model, adapter_names=names)
    torch.testing.assert_close(rows[0], wanted[0])
    torch.testing.assert_close(rows[2], plain[2])
    model.set_adapter("task_1")
    torch.testing.assert_close(rows[1], said(model)[1])
    model.set_adapter(ROUTER)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(said(again), wanted)
        with torch.no_grad():
            for tensor in of(again, "task_0", "task_1", "task_2").values():
                tensor.zero_()
        assert torch.equal(said(again), plain)
        assert torch.equal(said(model), wanted)


def test_half_precision(tasks: list[str]) -> None:
    found = []
    for library in (peftc, peft):
        own = library.ArrowConfig(top_k=2, rng_seed=11)
        found.append(library.create_arrow_model(base().bfloat16(), tasks, own, autocast_adapter_dtype=False).eval())
    assert said(found[0]).dtype == torch.bfloat16
    torch.testing.assert_close(said(found[0]), said(found[1]), rtol=0.05, atol=0.1)


def test_a_model_that_stores_its_weights_transposed(tmp_path: Path) -> None:
    tiny = next(model for model in MODELS if model.name == "gpt2")
    found = []
    for seed in (1, 2):
        config = peft.LoraConfig(r=4, fan_in_fan_out=True, init_lora_weights=False, target_modules=["c_attn"])
        with seeded(seed):
            peft.get_peft_model(tiny.build(), config).save_pretrained(str(tmp_path / str(seed)))
    for library in (peftc, peft):
        own = library.ArrowConfig(top_k=2, rng_seed=11)
        with seeded(0):
            model = library.create_arrow_model(tiny.build(), [str(tmp_path / "1"), str(tmp_path / "2")], own)
        found.append(said(model.eval()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


# files ----------------------------------------------------------------------------------------------------------------


def test_files_are_the_references(tasks: list[str], general: list[str], tmp_path: Path) -> None:
    """A router's factors do nothing, and files have them. The reference cannot load a router, not its own either."""
    ours, theirs = (made(library, tasks, general, use_gks=True) for library in (peftc, peft))
    wanted = said(ours)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(str(tmp_path / name), selected_adapters=[ROUTER])
    here, there = tmp_path / "ours" / ROUTER, tmp_path / "theirs" / ROUTER
    shapes = [
        {key: t.shape for key, t in load_file(folder / "adapter_model.safetensors").items()} for folder in (here, there)
    ]
    assert shapes[0] == shapes[1]
    assert config_in(here) == config_in(there)
    for folder in (here, there):
        model = PeftModel.from_pretrained(base(), folder, ROUTER)
        for number, path in enumerate(tasks):
            model.load_adapter(path, f"task_{number}")
        for number, path in enumerate(general):
            model.load_adapter(path, f"gks_{number}")
        torch.testing.assert_close(said(model.eval()), wanted)
        with pytest.raises(AttributeError, match="copy"):
            made(peft, tasks).load_adapter(str(folder), "again")


def test_where_last_names_mean_other_layers_too_a_routers_targets_are_paths(tmp_path: Path) -> None:
    paths = [trained(tmp_path / str(seed), seed, layers_to_transform=[1]) for seed in (1, 2)]
    model = made(peftc, paths)
    assert all("layers.1." in target for target in model.peft_config[ROUTER].target_modules)
    assert said(model).isfinite().all()


# what is refused ------------------------------------------------------------------------------------------------------


def test_a_router_is_not_merged(tasks: list[str]) -> None:
    model = made(peftc, tasks)
    wanted = said(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"(?s)PC508.*Cannot merge an active Arrow router adapter"):
            merge()
    assert torch.equal(said(model), wanted)


#: What is made, and what it is told; the text of the plugin that makes it so, and a defect under which nobody is told.
Made = Callable[[Path, list[str]], Any]
REFUSED: dict[str, tuple[Made, type[Exception], str, str, str]] = {
    "none": (lambda folder, tasks: made(peftc, []), ValueError, "PC102.*at least one", "if not tasks:", "if False:"),
    "top_k": (
        lambda folder, tasks: made(peftc, tasks, top_k=4),
        ValueError,
        "PC102.*`top_k` is 4, but there are 3",
        "elif own.top_k > experts:",
        "elif False:",
    ),
    "general": (
        lambda folder, tasks: made(peftc, tasks, [], use_gks=True),
        ValueError,
        "PC118.*`use_gks`",
        "if own.use_gks and not general:",
        "if False:",
    ),
    "ranks": (
        lambda folder, tasks: made(peftc, [*tasks, trained(folder, 7, r=8)]),
        ValueError,
        "PC522.*rank mismatch: 8 != 4",
        "if config.r != configs[first].r:",
        "if False:",
    ),
    "targets": (
        lambda folder, tasks: made(peftc, [*tasks, trained(folder, 7, target_modules=["q_proj"])]),
        ValueError,
        "PC522.*target_modules mismatch",
        "if own.keys() != first.keys():",
        "if False:",
    ),
    "variant": (
        lambda folder, tasks: made(peftc, [*tasks, trained(folder, 7, use_dora=True)]),
        ValueError,
        "PC522.*`task_3` cannot be weighed by a router: it has `use_dora`",
        "if option is not None:",
        "if False:",
    ),
    "kind": (
        lambda folder, tasks: made(peftc, [trained(folder, 7, target_modules=["embed_tokens"])], top_k=1),
        TypeError,
        "PC401.*LoRA adapters must only target Linear",
        "if site.layer.kind not in p.LINEAR_KINDS or site.parameter:",
        "if False:",
    ),
    "method": (
        lambda folder, tasks: made(peftc, [of_ia3(folder)], top_k=1),
        ValueError,
        "PC522.*`task_0` is of IA3",
        "if method != VARIANT.peft_type:",
        "if False:",
    ),
}


def of_ia3(folder: Path) -> str:
    get_peft_model(base(), peftc.IA3Config(target_modules=TARGETS, feedforward_modules=[])).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_weighed_is_refused(case: Any, tasks: list[str], tmp_path: Path) -> None:
    make, kind, text, _, _ = case
    with pytest.raises(PeftcError, match=f"(?s){text}") as caught:
        make(tmp_path, tasks)
    assert isinstance(caught.value, kind)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_refusal_can_fail(case: Any, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _, text, before, after = case
    put_defect(monkeypatch, arrow, before, after)
    told = ""
    try:
        make(tmp_path, tasks)
    except Exception as error:
        told = str(error)
    assert not re.search(f"(?s){text}", told)


def test_a_base_stays_as_it_was_when_a_model_is_refused(tasks: list[str], tmp_path: Path) -> None:
    own = base()
    modules, tensors = [*own.modules()], {name: p.clone() for name, p in own.named_parameters()}
    with pytest.raises(PeftcError):
        create_arrow_model(own, [*tasks, trained(tmp_path, 7, r=8)], ArrowConfig(top_k=1))
    with pytest.raises(PeftcError):
        create_arrow_model(own, [*tasks, str(tmp_path / "nowhere")], ArrowConfig(top_k=1))
    assert [*own.modules()] == modules
    assert {n: p.tolist() for n, p in own.named_parameters()} == {n: t.tolist() for n, t in tensors.items()}


#: The same of models that come to it later, at their next call.
LATER: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "none": (lambda: get_peft_model(nn.Sequential(nn.Linear(6, 5)), router(), ROUTER), "PC522.*no adapters to weigh"),
    "top_k": (lambda: without("task_1", top_k=2), "PC102.*`top_k` is 2, but there are 1"),
    "general": (lambda: without("gks_0", use_gks=True), "PC118.*`use_gks`"),
    "ranks": (lambda: beside(r=1), "PC522.*`late` has a rank mismatch: 1 != 2"),
    "variant": (lambda: beside(use_dora=True), "PC522.*`late` cannot be weighed.*`use_dora`"),
    "base": (lambda: beside(init_lora_weights="pissa"), "PC522.*`late` has a base weight of its own"),
}


def without(name: str, **options: Any) -> PeftModel:
    model = mixture(("task_0", "task_1", "gks_0"), **options)
    model(X)
    model.delete_adapter(name)
    return model


def beside(**options: Any) -> PeftModel:
    model = mixture()
    model(X)
    model.add_adapter("late", small(**options))
    return model


@pytest.mark.parametrize("case", LATER.values(), ids=LATER)
def test_what_cannot_be_weighed_any_more_is_told_by_the_next_call(case: Any) -> None:
    make, text = case
    model = make()
    with pytest.raises(PeftcError, match=f"(?s){text}"):
        model(X)
    with model.disable_adapter():
        model(X)


def test_that_of_base_weights_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, views, "if apart:", "if False:")
    assert beside(init_lora_weights="pissa")(X).isfinite().all()


def test_a_router_changes_no_base_weight() -> None:
    with pytest.raises(PeftcError, match=r"(?s)PC\d+.*pissa"):
        get_peft_model(nn.Sequential(nn.Linear(6, 5)), router().model_copy(update={"init_lora_weights": "pissa"}))


@pytest.mark.parametrize("options", [{"top_k": 0}, {"router_temperature": 0.0}, {"top_k": "many"}, {"k": 3}], ids=str)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(PeftcError):
        ArrowConfig(**options)


def test_a_router_on_other_layers_is_refused() -> None:
    with pytest.raises(PeftcError, match=f"(?s){rules.BAD_TARGET.code}"):
        get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), router())
    with pytest.raises(PeftcError, match=f"(?s){rules.CONTRADICTION.code}.*arrow_config"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), router().model_copy(update={"use_dora": True}))


def test_a_router_is_not_combined() -> None:
    model = mixture()
    with pytest.raises(PeftcError):
        model.add_weighted_adapter(["task_0", ROUTER], [1.0, 1.0], "both")
    assert list(model.peft_config) == ["task_0", "task_1", ROUTER]
