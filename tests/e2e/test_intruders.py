"""`reduce_intruder_dimension`: what the reference gives where that works, and what the paper says everywhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as their_reduction
from torch import Tensor, nn

import peftc
from peftc import PeftcError, reduce_intruder_dimension, reduce_intruders
from peftc.plugin import LINEAR_KINDS
from peftc.registry.manager import default_registry
from peftc.runtime.applying import intruders
from peftc.testing.models import seeded
from peftc.testing.subjects import Subject, quiet
from peftc.tuner.maps import MapTuner
from tests.defects import put_defect
from tests.e2e.former import BY_NAME, logits
from tests.e2e.pairs import TINY, Pair, described, pair
from tests.runtime.examples import examples, rows
from tests.runtime.saving import moved as moved_model

NEW = "intruder_reduced"
MLP = {"target_modules": ["lin0", "lin1"]}
#: layers of every kind: a tiny model, options, and whether the reference can do them
KINDS: Mapping[str, tuple[str, Mapping[str, Any], bool]] = {
    "linear": ("mlp", MLP, True),
    "linear of a language model": ("llama", {"target_modules": ["q_proj", "down_proj"]}, True),
    "convolution": ("conv2d", {"target_modules": ["conv1", "conv0", "head"]}, False),
    "embedding": ("embedding", {"target_modules": ["emb", "lin0"]}, False),
    "stored transposed": ("gpt2", {"fan_in_fan_out": True}, False),
}

pytestmark = pytest.mark.filterwarnings("ignore")


def strong(kind: str = "linear", **options: Any) -> Pair:
    """An adapter that is large beside its base: it brings intruders."""
    model, own, _ = KINDS[kind]
    with seeded(0):
        return pair(model, "LoraConfig", **{"r": 3, "lora_alpha": 24, **own, **options})


def matrices(layer: Any, adapter: str) -> list[tuple[Tensor, Tensor]]:
    """A layer's weight and an adapter's change of it, as matrices `(out, in)`, of each expert."""
    part = layer.part(adapter)
    with torch.no_grad():
        A, B, scale = part.lowering("thin")(part.view.fixed(training=False))
    weight = layer.pristine()[layer.parameter or "weight"].double()
    A, B = A.double(), float(scale) * B.double()
    if layer.site(adapter).layer.experts:
        return list(zip(weight, B @ A, strict=True))
    return [(weight.flatten(1), B.flatten(1) @ A.flatten(1))]


def logical(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The same of a layer that is one."""
    (found,) = matrices(layer, adapter)
    return found


def expected(layer: Any, adapter: str, rank: int, top_k: int, epsilon: float, scale: float) -> tuple[Tensor, int]:
    """What the paper makes of a layer's change."""
    return expected_of(*logical(layer, adapter), rank, top_k, epsilon, scale)


def expected_of(W: Tensor, given: Tensor, rank: int, top_k: int, epsilon: float, scale: float) -> tuple[Tensor, int]:
    """The same of matrices, in float64 and vector by vector."""
    change = given
    before = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + change, full_matrices=False)
    found = [i for i in range(min(top_k, len(S))) if max(abs(float(U[:, i] @ u)) for u in before.T) < epsilon]
    for i in found:
        change = change + (scale - 1) * S[i] * torch.outer(U[:, i], Vh[i])
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ Vh[:rank] if found else given), len(found)


def layers_of(model: Any, adapter: str) -> dict[str, Any]:
    return {layer.site(adapter).path: layer for layer in model.base_model.session.layers_of(adapter)}


# beside the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"lin1": 2}, "lora_alpha": 9}], ids=str)
@pytest.mark.parametrize("top_k", [1, 4, 100])
@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0, 1.5])
def test_linear_layers_are_as_in_the_reference(options: dict[str, Any], top_k: int, scale: float) -> None:
    both = strong(**options)
    told: tuple[list[str], list[str]] = ([], [])
    for model, reduce, sink in zip(
        (both.theirs, both.ours), (their_reduction, reduce_intruder_dimension), told, strict=True
    ):
        reduce(model, top_k=top_k, mitigation_lambda=scale, logging_sink=sink.append)
    assert told[0] == told[1] and (options or any("Intruders: " in line for line in told[1]))
    theirs = dict(both.theirs.named_modules())
    for path, layer in layers_of(both.ours, NEW).items():
        for name in ("default", NEW):
            wanted = theirs[f"base_model.model.{path}"].get_delta_weight(name)
            torch.testing.assert_close(layer.get_delta_weight(name), wanted, rtol=1e-3, atol=1e-4)
    assert both.ours.active_adapters == both.theirs.active_adapters == [NEW]
    assert described(both.ours) == described(both.theirs)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9, 1.0])
def test_the_threshold_and_the_models_of_transformers(epsilon: float, tmp_path: Path) -> None:
    both = strong("linear of a language model")
    for model, reduce in ((both.theirs, their_reduction), (both.ours, reduce_intruder_dimension)):
        reduce(model, "default", "less", 5, epsilon, 0.5, None)
    both.assert_same_updates("less")
    both.ours.save_pretrained(tmp_path, selected_adapters=["less"])
    loaded = peft.PeftModel.from_pretrained(both.tiny.build(), tmp_path / "less").eval()
    torch.testing.assert_close(both.output(loaded), both.output(both.ours), rtol=1e-4, atol=1e-5)


def test_it_prints_as_the_reference_does(capsys: pytest.CaptureFixture[str]) -> None:
    both = strong()
    their_reduction(both.theirs)
    first = capsys.readouterr().out
    reduce_intruder_dimension(both.ours)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("kind", [kind for kind, (*_, works) in KINDS.items() if not works])
def test_where_the_reference_fails_or_breaks_the_adapter(kind: str) -> None:
    both = strong(kind)

    def by_them() -> None:
        their_reduction(both.theirs, threshold_epsilon=0.9, logging_sink=None)
        both.output(both.theirs)

    with pytest.raises((RuntimeError, IndexError)):
        by_them()


# by definition -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.75])
@pytest.mark.parametrize("epsilon", [0.5, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, epsilon: float, scale: float) -> None:
    model = strong(kind).ours
    wanted = {
        path: expected(layer, "default", 3, 10, epsilon, scale) for path, layer in layers_of(model, "default").items()
    }
    found = reduce_intruders(model, new_name="less", threshold=epsilon, scale=scale)
    assert found == {path: count for path, (_, count) in wanted.items()}
    assert epsilon < 0.9 or any(found.values())
    for path, layer in layers_of(model, "less").items():
        torch.testing.assert_close(logical(layer, "less")[1], wanted[path][0], rtol=1e-3, atol=1e-4)
        if found[path]:
            (_, A), (_, B) = layer.parameters_of("less")
            torch.testing.assert_close(A.flatten(1).norm(dim=1), B.flatten(1).norm(dim=0))  # the scale is shared


class Attentive(nn.Module):
    """One attention whose projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found


def of_experts(**options: Any) -> Any:
    """A model with experts in two parameters, and a linear layer beside them."""
    config = peftc.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"], **options)
    return peftc.get_peft_model(copy.deepcopy(BY_NAME["Mixtral"].base), config)


def of_attention() -> Any:
    return peftc.get_peft_model(Attentive(), peftc.LoraConfig(r=2, lora_alpha=32, target_modules=["attention"]))


#: models with adapters of single parameters
PARAMETERS: Mapping[str, Callable[[], Any]] = {
    "experts": lambda: of_experts(target_parameters=["gate_up_proj", "down_proj"]),
    "experts of one kind": lambda: of_experts(target_parameters=["experts.down_proj"], rank_pattern={"down_proj": 3}),
    "attention": of_attention,
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_single_parameters_expert_by_expert(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = moved_model(PARAMETERS[kind]())
    before = [(layer, layer.site("default")) for layer in model.base_model.session.layers_of("default")]
    wanted: dict[str, list[tuple[Tensor, int]]] = {}
    for layer, site in before:
        place = f"{site.path}.{site.parameter}" if site.parameter else site.path
        wanted[place] = [expected_of(*pair, site.config.r, 10, 0.6, 0.25) for pair in matrices(layer, "default")]
    found = reduce_intruders(model, threshold=0.6, scale=0.25)
    assert found == {place: sum(count for _, count in each) for place, each in wanted.items()}
    assert any(count for place, count in found.items() if any(site.spot and site.spot in place for _, site in before))
    for layer, changes in zip(model.base_model.session.layers_of(NEW), wanted.values(), strict=True):
        for (_, change), (right, _) in zip(matrices(layer, NEW), changes, strict=True):
            torch.testing.assert_close(change, right, rtol=1e-3, atol=1e-4)
    if kind != "attention":
        y = logits(model)
        model.save_pretrained(tmp_path, selected_adapters=[NEW])
        loaded = peftc.PeftModel.from_pretrained(copy.deepcopy(BY_NAME["Mixtral"].base), tmp_path / NEW)
        torch.testing.assert_close(logits(loaded), y)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(BY_NAME["Mixtral"].base), tmp_path / NEW)  # type: ignore[arg-type]
        torch.testing.assert_close(logits(theirs), y, rtol=1e-4, atol=1e-5)
        with pytest.raises(AttributeError):
            their_reduction(theirs, logging_sink=None)


@pytest.mark.parametrize("subject", rows(examples(lambda subject: bool(subject.method.map_tuners))))
def test_every_method_that_adds_thin_products_and_no_other(subject: Subject) -> None:
    with quiet():
        model: Any = subject.trained()
        before, y = described(model), subject.output(model)
        sites = layers_of(model, "default") if hasattr(model.base_model, "session") else {}
        fit = [layer.part("default").tuner for layer in sites.values()]
        try:
            found = reduce_intruders(model, new_name="less", threshold=1.0, scale=0.5)
        except PeftcError as error:
            assert {d.code for d in error.diagnostics} <= {"PC543"}, error
            assert described(model) == before and torch.equal(subject.output(model), y)
            assert model.active_adapters == ["default"]
            return
        assert fit and all(isinstance(tuner, MapTuner) and tuner.is_rankable for tuner in fit)
        assert all(place.startswith(path) for place, path in zip(found, sites, strict=True))
        for (path, layer), count in zip(layers_of(model, "less").items(), found.values(), strict=True):
            part = sites[path].part("default")
            rank = part.lowering("thin")(part.view)[0].shape[1 if sites[path].site("default").layer.experts else 0]
            wanted = [expected_of(*pair, rank, 10, 1.0, 0.5) for pair in matrices(layer, "default")]
            if count == sum(each for _, each in wanted):  # cosines of 1, to rounding
                for (_, change), (right, _) in zip(matrices(layer, "less"), wanted, strict=True):
                    torch.testing.assert_close(change, right, rtol=1e-3, atol=1e-3)


def test_some_methods_can_be_reduced() -> None:
    able = [name for name in default_registry().names if default_registry().get(name).is_rankable]
    assert {"LORA", "ADALORA"} <= set(able) and LINEAR_KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_above_one_every_vector_is_an_intruder_even_of_a_fresh_adapter(kind: str) -> None:
    name, own, _ = KINDS[kind]
    tiny = TINY[name]
    task = {"task_type": "CAUSAL_LM"} if tiny.is_language_model else {}
    model = peftc.get_peft_model(tiny.build(), peftc.LoraConfig(r=3, **own, **task))
    found = reduce_intruders(model, top_k=4, threshold=999, scale=0.5)
    for path, layer in layers_of(model, NEW).items():
        assert found[path] == min(4, *logical(layer, NEW)[0].shape)
        torch.testing.assert_close(
            logical(layer, NEW)[1], expected(layer, "default", 3, 4, 999, 0.5)[0], rtol=1e-3, atol=1e-4
        )
        assert logical(layer, NEW)[1].abs().max() > 1e-3


# states ------------------------------------------------------------------------------------------------------------------


def add_active(both: Pair) -> None:
    both.add("second", "LoraConfig", 4, r=2, lora_alpha=12, **MLP)
    both.ours.base_model.set_adapter(["default", "second"])


def add_inactive(both: Pair) -> None:
    both.add("second", "LoraConfig", 4, r=2, lora_alpha=12, **MLP)
    both.ours.set_adapter("second")


#: what was done to a model before; none of it changes what becomes of an adapter
STATES: Mapping[str, Callable[[Pair], object]] = {
    "alone": lambda both: None,
    "beside an active one": add_active,
    "inactive": add_inactive,
    "disabled": lambda both: both.ours.base_model.disable_adapter_layers(),
    "merged and unmerged": lambda both: (both.ours.merge_adapter(), both.ours.unmerge_adapter()),
    "copied": lambda both: setattr(both, "ours", copy.deepcopy(both.ours)),
    "in training": lambda both: both.ours.train(),
    "frozen": lambda both: both.ours.set_requires_grad("default", False),
    "another deleted": lambda both: (add_active(both), both.ours.delete_adapter("second")),
}


@pytest.mark.parametrize("state", STATES)
def test_in_every_state(state: str) -> None:
    both, plain = strong(lora_dropout=0.5), strong(lora_dropout=0.5)
    reduce_intruders(plain.ours)
    STATES[state](both)
    model = both.ours
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if f".{NEW}" not in n}
    reduce_intruders(model)
    assert model.active_adapters == [NEW]
    for path, layer in layers_of(model, NEW).items():
        same = layers_of(plain.ours, NEW)[path]
        torch.testing.assert_close(layer.get_delta_weight(NEW), same.get_delta_weight(NEW))
        assert layer.disable_adapters is (state == "disabled")
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(f".{NEW}." in name for name in trained)
    assert model.peft_config[NEW] is not model.peft_config["default"]
    assert model.peft_config[NEW].to_dict() == model.peft_config["default"].to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [True, False], ids=["slots in float32", "slots cast"])
def test_number_formats(dtype: torch.dtype, cast: bool) -> None:
    base = strong().ours.unload().to(dtype)
    model = peftc.get_peft_model(base, peftc.LoraConfig(r=3, lora_alpha=24, **MLP), autocast_adapter_dtype=cast)
    moved_model(model)
    before = {n: p.dtype for n, p in model.named_parameters()}
    wanted = {path: expected(layer, "default", 3, 10, 0.9, 0.5) for path, layer in layers_of(model, "default").items()}
    found = reduce_intruders(model, threshold=0.9, scale=0.5)
    assert found == {path: count for path, (_, count) in wanted.items()} and any(found.values())
    exact = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float64 or cast else {"rtol": 0.1, "atol": 0.1}
    for path, layer in layers_of(model, NEW).items():
        torch.testing.assert_close(logical(layer, NEW)[1], wanted[path][0], **exact)
    after = {n: p.dtype for n, p in model.named_parameters()}
    assert all(after[name.replace(".default", f".{NEW}")] == kind for name, kind in before.items())


def test_a_scale_that_was_set_is_part_of_the_change() -> None:
    model = strong().ours
    for layer in layers_of(model, "default").values():
        layer.set_scale("default", 0.01)  # no intruders any more
    found = reduce_intruders(model)
    assert not any(found.values())
    for layer in layers_of(model, NEW).values():
        torch.testing.assert_close(layer.get_delta_weight(NEW), layer.get_delta_weight("default"))


def test_modules_trained_whole_come_along() -> None:
    both = strong(modules_to_save=["lin2"])
    with torch.no_grad():
        both.ours.base_model.model.lin2.modules_to_save["default"].weight.add_(1)
    reduce_intruders(both.ours, scale=1.0)
    copies = both.ours.base_model.model.lin2.modules_to_save
    assert (
        torch.equal(copies[NEW].weight, copies["default"].weight) and copies[NEW].weight is not copies["default"].weight
    )


def test_the_base_of_an_adapter_is_the_original_one() -> None:
    model = strong().ours
    plain = copy.deepcopy(model)
    model.add_adapter("start", peftc.LoraConfig(r=2, init_lora_weights="pissa", **MLP))
    model.set_adapter("start")
    reduce_intruders(model)
    reduce_intruders(plain)
    for path, layer in layers_of(model, NEW).items():
        torch.testing.assert_close(layer.get_delta_weight(NEW), layers_of(plain, NEW)[path].get_delta_weight(NEW))


def test_in_a_mixed_model(tmp_path: Path) -> None:
    tiny = strong().tiny
    model = peftc.get_peft_model(tiny.build(), peftc.LoraConfig(r=3, lora_alpha=24, **MLP), mixed=True)
    model.add_adapter("other", peftc.LoHaConfig(r=2, **MLP))
    moved_model(model)
    assert reduce_intruders(model, threshold=0.9).keys() == {"lin0", "lin1"}
    assert model.active_adapters == [NEW]
    with pytest.raises(PeftcError, match="PC543"):
        reduce_intruders(model, "other", "less")


# what cannot be ----------------------------------------------------------------------------------------------------------


def prompts() -> Any:
    return peftc.get_peft_model(
        pair("llama", "LoraConfig").tiny.build(), peftc.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )


def of(**options: Any) -> Callable[[], Any]:
    return lambda: strong(**options).ours


def merged() -> Any:
    model = strong().ours
    model.merge_adapter()
    return model


#: a model, what is asked of it, the rule, and what is told
REFUSED: Mapping[str, tuple[Callable[[], Any], Mapping[str, Any], str, str]] = {
    "no such adapter": (of(), {"old_adapter_name": "nobody"}, "PC502", "nobody"),
    "a name that is taken": (of(), {"new_adapter_name": "default"}, "PC", "already exists"),
    "a name that is none": (of(), {"new_adapter_name": "a.b"}, "PC510", "a.b"),
    "no vectors": (of(), {"top_k": 0}, "PC102", "`top_k` cannot be `0`"),
    "half a vector": (of(), {"top_k": 1.5}, "PC102", "`top_k` cannot be `1.5`"),
    "no cosine": (of(), {"threshold_epsilon": -0.5}, "PC102", "`threshold_epsilon` cannot be `-0.5`"),
    "not a number": (of(), {"threshold_epsilon": math.nan}, "PC102", "`threshold_epsilon` cannot be `nan`"),
    "less than nothing": (of(), {"mitigation_lambda": -0.1}, "PC102", "`mitigation_lambda` cannot be `-0.1`"),
    "merged": (merged, {}, "PC509", "is merged"),
    "norms": (of(use_dora=True), {}, "PC543", "is no product of thin factors"),
    "a bias of the update": (of(lora_bias=True), {}, "PC543", "is no product of thin factors"),
    "trained biases": (of(bias="all"), {}, "PC543", "trains tensors of the base model"),
    "rows": (
        lambda: strong("embedding", target_modules=["lin0"], trainable_token_indices={"emb": [1]}).ours,
        {},
        "PC543",
        "trains rows",
    ),
    "another base": (of(init_lora_weights="pissa"), {}, "PC543", "changed the base weights"),
    "prompts": (prompts, {}, "PC543", "does not change weights|no adapter on layers"),
    "no adapter": (lambda: strong().tiny.build(), {}, "PC543", "no adapter on layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_nothing_changed(case: str) -> None:
    make, words, code, says = REFUSED[case]
    model = make()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(PeftcError, match=f"(?s){code}.*({says})") as caught:
        reduce_intruder_dimension(model, logging_sink=None, **words)
    assert isinstance(caught.value, ValueError)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(id(after[name]) == own and torch.equal(after[name], value) for name, (own, value) in before.items())


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(PeftcError) as caught:
        reduce_intruder_dimension(strong().ours, "default", "default", -1, -2.0, -1.0)
    assert len(caught.value.diagnostics) == 4


def test_a_sink_that_fails_leaves_the_model_as_it_was() -> None:
    model = strong().ours
    before = described(model)

    def sink(text: str) -> None:
        if "Enabling" in text:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        reduce_intruder_dimension(model, logging_sink=sink)
    assert described(model) == before and NEW not in model.peft_config and model.active_adapters == ["default"]


# defects -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(how.scale - 1) * ", "how.scale * "),
        ("likeness < how.threshold", "likeness > how.threshold"),
        ("[:, : how.top_k]", ""),
        ("[:, found] * S[found]", "[:, found]"),
        ("second @ first, full", "0 * second @ first, full"),
        ("share[:, None], B / share", "share[:, None], B"),
        ("B = B / scaling", "pass"),
    ],
)
def test_defects_are_found(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, intruders, before, after)
    with pytest.raises(AssertionError):
        test_linear_layers_are_as_in_the_reference({}, 1, 0.25)


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        ("no vectors", "self.top_k < 1", "False"),
        ("no cosine", "not self.threshold >= 0", "False"),
        ("less than nothing", "self.scale >= 0)", "True)"),
        ("norms", "not tuner.is_rankable or not tuner.is_mergeable", "False"),
        ("another base", "if changes_base(session, plan.name)", "if False"),
        ("merged", "*beside_weights(session, plan), ", ""),
    ],
)
def test_rules_are_missed_if_they_are_left_out(
    case: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_defect(monkeypatch, intruders, before, after)
    with pytest.raises((AssertionError, KeyError, ValueError, NotImplementedError, pytest.fail.Exception)):
        test_what_cannot_be_is_refused_with_nothing_changed(case)


def test_a_layer_by_itself_is_no_module() -> None:
    with pytest.raises(PeftcError, match="PC543"):
        reduce_intruders(nn.Linear(2, 2))
