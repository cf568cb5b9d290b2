"""torch's own attention as a target, and layers whose parameters its kernels read without calling them: for every method."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, get_peft_model
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.graph.nodes import Kind
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import apply_plan
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.subjects import quiet, randomise
from tests.runtime.methods import narrow

pytestmark = pytest.mark.filterwarnings("ignore")

REGISTRY = default_registry()
METHODS = [name for name in REGISTRY.names if Kind.ATTENTION in REGISTRY.get(name).supports]
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "usual": {},
    "batch first": {"batch_first": True},
    "no biases": {"bias": False, "batch_first": True},
    "biases of keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other keys": {"kdim": 12, "vdim": 16},
}


class Net(nn.Module):
    """Attention between two linear layers, to itself where keys are as wide as queries."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None, **options: Any) -> Tensor:
        h = self.first(x)
        keys, values = (h if other is None else other for other in (keys, values))
        y, weights = self.attn(h, key=keys, value=values, **options)
        self.weights = None if weights is None else weights.detach()
        out: Tensor = self.last(y)
        return out


def inputs(shape: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def drawn(width: int) -> Tensor:
        return torch.randn(4, 5, width, generator=generator, dtype=torch.float64)

    return {"x": drawn(8), **({"keys": drawn(12), "values": drawn(16)} if "other" in shape else {})}


def options_of(method: str) -> Mapping[str, Any]:
    return next(iter(REGISTRY.get(method).examples), {})


def adapted(method: str, shape: str = "usual", targets: tuple[str, ...] = ("attn",), **options: Any) -> PeftModel:
    given = {**options_of(method), "target_modules": list(targets), **options}
    with quiet():
        model = get_peft_model(Net(**SHAPES[shape]).double(), REGISTRY.get(method).config(**given)).eval()
    randomise(model, "default")
    return model


def test_several_methods_have_it() -> None:
    assert len(METHODS) > 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_it_acts_merges_and_comes_out_again(method: str, shape: str) -> None:
    model, given = adapted(method, shape), inputs(shape)
    y = model(**given)
    with torch.no_grad():  # where a kernel of torch's reads the weights
        torch.testing.assert_close(model(**given), y)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            model(**given), Net(**SHAPES[shape]).double().eval()(**given), rtol=1e-12, atol=1e-12
        )
    own = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(**given), y)
    model.unmerge_adapter()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: key for name, (key, _) in own.items()}
    assert all(torch.equal(p, own[name][1]) for name, p in model.named_parameters())
    merged = model.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    assert type(merged.attn.out_proj) is type(Net().attn.out_proj)
    torch.testing.assert_close(merged(**given), y)


@pytest.mark.parametrize("method", METHODS)
def test_every_projection_is_adapted_and_trains(method: str) -> None:
    for shape in ("usual", "other keys"):
        model = adapted(method, shape)
        base = Net(**SHAPES[shape]).double().eval()
        plan = {p.name for p in model.session.plans["default"].parameters()}
        assert plan == {name for name, p in model.named_parameters() if p.requires_grad}
        model(**inputs(shape)).square().sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == plan
        merged = model.merge_and_unload()
        moved = {n for n, p in base.named_parameters() if not torch.equal(p, dict(merged.named_parameters())[n])}
        weights = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if "other" in shape else {"in_proj_weight"}
        assert {f"attn.{name}" for name in (*weights, "out_proj.weight")} <= moved


@pytest.mark.parametrize("shape", ["usual", "other keys"])
@pytest.mark.parametrize("method", METHODS)
def test_files_and_plans_hold_it(method: str, shape: str, tmp_path: Path) -> None:
    model, given = adapted(method, shape), inputs(shape)
    y = model(**given)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(**SHAPES[shape]).double(), tmp_path).eval()
    torch.testing.assert_close(loaded(**given), y, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(**given), y, rtol=0, atol=0)
    base = Net(**SHAPES[shape]).double()
    plan = compile_plan(snapshot(base), {"default": model.peft_config["default"]})
    again = plan_from_json(plan_to_json(plan))
    assert list(again.parameters()) == list(plan.parameters())
    apply_plan(base, again)
    root = "base_model.model."
    assert {p.name.removeprefix(root) for p in again.parameters()} <= dict(base.named_parameters()).keys()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_come_and_go(method: str) -> None:
    model, given = adapted(method), inputs("usual")
    y, base, modules = model(**given), model.get_base_model(), Net().double().eval()
    with quiet():
        model.add_adapter("other", model.peft_config["default"])
    randomise(model, "other")
    model.set_adapter("other")
    assert not torch.allclose(model(**given), y)
    model.set_adapter("default")
    torch.testing.assert_close(model(**given), y, rtol=0, atol=0)
    parts = [layer.part("default") for layer in model.session.wrappers()]
    if not any(part.tuner.clash(part.view.config, part.view.config) for part in parts):
        model.base_model.set_adapter(["default", "other"])
    both = model(**given)
    model.merge_adapter()
    torch.testing.assert_close(model(**given), both)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert "default" not in "".join(model.state_dict())
    model.unload()
    assert [name for name, _ in base.named_modules()] == [name for name, _ in modules.named_modules()]
    torch.testing.assert_close(base(**given), modules(**given), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call", [{"need_weights": False}, {"average_attn_weights": False}, {"mask": "keys"}, {"mask": "causal"}]
)
def test_calls_are_those_of_attention(call: dict[str, Any]) -> None:
    given = {**inputs("batch first"), **{name: value for name, value in call.items() if name != "mask"}}
    if call.get("mask") == "keys":
        given["key_padding_mask"] = torch.arange(5).expand(4, 5) > 3
    if call.get("mask") == "causal":
        given["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    model = adapted(METHODS[0], "batch first")
    y, weights = model(**given), model.get_base_model().weights
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**given), y)
    if weights is None:
        assert call == {"need_weights": False}
    else:
        torch.testing.assert_close(merged.weights, weights)


def test_what_attention_is_asked_for_is_answered() -> None:
    model, base = adapted(METHODS[0]).get_base_model(), Net().double()
    names = ("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "dropout", "batch_first", "head_dim")
    assert [getattr(model.attn, name) for name in names] == [getattr(base.attn, name) for name in names]
    assert repr(model.attn).startswith(f"{METHODS[0].lower()}.MultiheadAttention(")
    with pytest.raises(AttributeError):
        _ = model.attn._nothing


def test_a_method_that_cannot_adapt_its_weights_says_so() -> None:
    with pytest.raises(
        PeftcError, match=r"(?s)PC401.*`attn` is a MultiheadAttention.*Name the layers in it: `out_proj`"
    ):
        get_peft_model(Net(), narrow(target_modules=["attn"]))


def test_a_subclass_with_a_forward_of_its_own_is_none() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    facts = {node.path: node.facts for node in snapshot(nn.ModuleDict({"a": Own(8, 2), "b": Net().attn})).nodes}
    assert (facts["a"].kind, facts["b"].kind) == (Kind.OTHER, Kind.ATTENTION)
    assert "a forward of its own" in facts["a"].note


def test_biases_of_its_output_train_along() -> None:
    for method in METHODS:
        if "bias" not in REGISTRY.get(method).config.model_fields:
            continue
        model = adapted(method, bias=f"{method.lower()}_only")
        biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
        assert biases == {"base_model.model.attn.base_layer.out_proj.base_layer.bias"}
        assert biases <= {p.name for p in model.session.plans["default"].parameters()}
        model(**inputs("usual")).sum().backward()
        assert model.get_parameter(biases.pop()).grad is not None


def test_rows_are_refused_and_the_model_goes_on() -> None:
    model, given = adapted(METHODS[0]), inputs("usual")
    y = model(**given)
    with pytest.raises(PeftcError, match="PC511"):
        model(**given, adapter_names=["default"] * 4)
    torch.testing.assert_close(model(**given), y, rtol=0, atol=0)


# what kernels read ----------------------------------------------------------------------------------------------------


@contextmanager
def kernels(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


READERS = [
    (name, part)
    for name in REGISTRY.names
    for part, kind in (
        ("self_attn", Kind.ATTENTION),
        ("linear1", Kind.LINEAR),
        ("out_proj", Kind.LINEAR),
        ("norm1", Kind.NORM),
    )
    if REGISTRY.get(name).adapts_layers and kind in REGISTRY.get(name).supports
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("method", "part"), READERS)
def test_no_kernel_goes_round_an_adapter(method: str, part: str, padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    base = nn.TransformerEncoder(layer, 2).eval()
    record = REGISTRY.get(method)
    with quiet():
        model = get_peft_model(base, record.config(**{**options_of(method), "target_modules": [part]})).eval()
    randomise(model, "default")
    x, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    given = {"src_key_padding_mask": mask} if padded else {}
    reads_rows = {
        name: torch.tensor(value) for name, value in record.example_values(model.peft_config["default"], 2).items()
    }
    with kernels(False):
        try:
            wanted = model(x, **given, **reads_rows)
        except PeftcError as error:
            assert part == "out_proj", error
            assert "PC424" in str(error)
            return
    with kernels(True), torch.no_grad():
        try:
            found = model(x, **given, **reads_rows)
        except PeftcError as error:
            assert not any(t.is_mergeable for t in record.map_tuners)
            assert "set_fastpath_enabled(False)" in str(error)
            return
    keep = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(found[keep], wanted[keep], rtol=1e-4, atol=1e-5)
    with model.disable_adapter(), kernels(False):
        assert not torch.allclose(model(x, **given, **reads_rows)[keep], wanted[keep], atol=1e-4)
