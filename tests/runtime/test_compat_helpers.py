"""Small functions of the reference's internals, compared with the reference's own where it has them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import peftc
import peftc.compat.helpers as ours
from peftc import PeftcWarning, get_peft_model
from peftc.compat import merging, names, structure, values
from peftc.compat.kinds import class_of, names_in
from peftc.config.mixins import LayersMixin
from peftc.diagnostics import PeftcError
from peftc.integrations import fsdp, packages, placement, quantization
from peftc.integrations.transformers.weight_conversion import build_peft_weight_mapping
from peftc.registry.manager import default_registry
from peftc.runtime.slots.buffers import BufferDict
from peftc.testing.models import MODELS
from tests.runtime.methods import Net, adapted, narrow
from tests.unit.chosen import plain_method

other = pytest.importorskip("peft.utils.other")
constants = pytest.importorskip("peft.utils.constants")
import_utils = pytest.importorskip("peft.import_utils")
integrations = pytest.importorskip("peft.utils.integrations")
merge_utils = pytest.importorskip("peft.utils.merge_utils")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
peft = pytest.importorskip("peft")
TINY = next(model for model in MODELS if model.is_language_model)


def same(mine: Any, theirs: Any, *args: Any) -> None:
    one, two = mine(*args), theirs(*args)
    assert torch.equal(one, two) and type(one) is type(two) if isinstance(one, torch.Tensor) else one == two


def test_paths_and_patterns() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 3)))
    same(ours._get_submodules, other._get_submodules, net, "1.1")
    same(ours._get_submodules, other._get_submodules, net, "0")
    for key, target in (("a.b", "b"), ("ab", "b"), ("b", "b"), ("a.b.c", "b.c")):
        same(ours._is_valid_match, other._is_valid_match, key, target)
    for keys in (["q", "v.*"], ["layers.0.q", "q"], ["^a"], []):
        same(ours.get_pattern_key, other.get_pattern_key, keys, "layers.0.q")
    assert ours.match_target_against_key(r".*\.q", "a.q") and not ours.match_target_against_key("q", "a.q")
    with pytest.raises(PeftcError):
        ours.get_pattern_key(["("], "a")
    for word in ("Yes", "off", "1", "F"):
        same(ours.str_to_bool, other.str_to_bool, word)
    with pytest.raises(ValueError):
        ours.str_to_bool("maybe")


def test_tensors() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    for tensor in (weight, nn.Parameter(weight)):
        same(ours.transpose, other.transpose, tensor, True)
        same(ours.transpose, other.transpose, tensor, False)
    assert ours.id_tensor_storage(weight) == ours.id_tensor_storage(weight[1:]) == other.id_tensor_storage(weight)
    same(ours._get_batch_size, other._get_batch_size, torch.ones(3, 2), None)
    same(ours._get_batch_size, other._get_batch_size, None, torch.ones(4, 2, 5))
    with pytest.raises(ValueError):
        ours._get_batch_size(None, None)


def test_models() -> None:
    embedding = nn.Embedding(3, 2)
    model = nn.Sequential(embedding, nn.Linear(2, 2))
    assert ours._get_input_embeddings_name(model, "none") == "none"
    model.get_input_embeddings = lambda: embedding
    assert ours._get_input_embeddings_name(model) == "0"
    wrapped = adapted(other=narrow())
    ours._freeze_adapter(wrapped, "default")
    assert not [n for n, p in wrapped.named_parameters() if ".default." in n and p.requires_grad]


def test_which_adapters_are_to_be_merged() -> None:
    wrapped = adapted(other=narrow())
    layer = next(iter(wrapped.session.layers.values()))
    assert ours.check_adapters_to_merge(layer) == ["default"]
    layer.merge()
    with pytest.warns(PeftcWarning, match="Merged already"):
        assert ours.check_adapters_to_merge(layer, ["default", "other"]) == ["other"]
    with pytest.raises(TypeError):
        ours.check_adapters_to_merge(layer, "default")  # type: ignore[arg-type]


def test_classes_by_kind_are_for_isinstance() -> None:
    layer = next(iter(adapted().session.layers.values()))
    linear, embedding = (class_of(type(layer), "any", name) for name in ("Linear", "Embedding"))
    assert linear is class_of(type(layer), "any", "Linear") and linear.__name__ == "Linear"
    assert isinstance(layer, linear) and not isinstance(layer, embedding) and not isinstance(nn.Linear(1, 1), linear)
    assert issubclass(linear, linear) and not issubclass(embedding, linear)
    with pytest.raises(TypeError, match="isinstance"):
        linear(layer)


def test_classes_by_what_is_wrapped_ask_the_base_layer_and_its_weight() -> None:
    """As libraries for quantisation leave it: with a class of their own for the layer, or for its weight."""
    found = {(package, name) for package in default_registry().names for name in names_in(package.lower())}
    quantised = sorted((package.lower(), name) for package, name in found if "4bit" in name)
    assert quantised
    layer = next(iter(adapted().session.layers.values()))
    package, name = quantised[0]
    cls = class_of(type(layer), package, name)
    assert not isinstance(layer, cls)
    layer.base_layer.__class__ = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    assert isinstance(layer, cls)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]},
        {"target_modules": r".*layers\.\d+\.self_attn\.(k|v)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*layers\.1.*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    ],
    ids=str,
)
def test_which_modules_a_config_means(options: dict[str, Any]) -> None:
    method = next(m for m in map(default_registry().get, default_registry().names) if issubclass(m.config, LayersMixin))
    mine, its = method.least(**options), getattr(peft, method.config.__name__)(**method.needed(options), **options)
    paths = [path for path, _ in TINY.build().named_modules() if path]
    found = {path for path in paths if ours.check_target_module_exists(mine, path)}
    assert found == {path for path in paths if tuners_utils.check_target_module_exists(its, path)}


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_all_linear_layers_are_written_out(task: str | None) -> None:
    method = plain_method()
    made = []
    for library, fill in ((peftc, ours), (peft, tuners_utils)):
        config = getattr(library, method.config.__name__)(target_modules="all-linear", task_type=task)
        assert fill._maybe_include_all_linear_layers(config, TINY.build()) is config
        made.append(config.target_modules)
    assert made[0] == made[1]


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_task_tensors_are_combined_as_in_the_reference(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 5, generator=generator) for _ in range(3)]
    weights = torch.tensor([0.5, 1.0, -0.25])
    stacked = torch.stack(tensors)
    calls: dict[str, tuple[Any, ...]] = {
        "reshape_weight_task_tensors": (stacked, weights),
        "magnitude_based_pruning": (tensors[0], density),
        "random_pruning": (tensors[0], density, True),
        "prune": (tensors[0], density, "random"),
        "calculate_majority_sign_mask": (stacked, "frequency"),
        "disjoint_merge": (stacked, stacked > 0),
        "task_arithmetic": (tensors, weights),
        "magnitude_prune": (tensors, weights, density),
        "ties": (tensors, weights, density, "frequency"),
        "dare_linear": (tensors, weights, density),
        "dare_ties": (tensors, weights, density),
    }
    assert calls.keys() == names.table()["peft.utils.merge_utils"].keys()
    for name, given in calls.items():
        results = []
        for module in (merging, merge_utils):
            torch.manual_seed(3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(getattr(module, name)(*given))
        torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(ValueError, match="nothing"):
        merging.prune(tensors[0], 0.5, "nothing")


def test_constants_are_the_references() -> None:
    module = names.table()["peft.utils.constants"]
    checked = [name for name, home in module.items() if home.module == values.__name__]
    assert len(checked) > 8
    for name in checked:
        assert getattr(values, name) == getattr(constants, name), name


def test_packages() -> None:
    for name in names.table()["peft.import_utils"]:
        if name != "is_gptqmodel_available":  # the reference raises if it is not installed
            assert getattr(packages, name)() == getattr(import_utils, name)(), name
    assert packages.is_gptqmodel_available() is False


def test_a_package_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    with pytest.raises(ImportError, match=r"`torchao` 0\.1 is installed; 0\.16\.0 or newer"):
        packages.is_torchao_available()


class Params4bit(nn.Parameter):
    """Known by its name."""


def test_quantisation() -> None:
    linear = nn.Linear(2, 2)
    assert quantization.dequantize_module_weight(linear) is linear.weight
    assert quantization.get_bnb_param_type(linear.weight) is False
    assert quantization.get_bnb_param_type(Params4bit(torch.ones(1))) == "4bit"
    with pytest.raises(TypeError):
        quantization.dequantize_module_weight(SimpleNamespace(weight=3, _parameters={}))  # type: ignore[arg-type]
    model = SimpleNamespace(quantization_method="gptq", config=SimpleNamespace(quantization_config="how"))
    same(quantization.get_quantization_config, other.get_quantization_config, model, "gptq")
    same(quantization.get_quantization_config, other.get_quantization_config, model, "awq")
    same(quantization.get_quantization_config, other.get_quantization_config, nn.Linear(1, 1), "gptq")


def test_placement() -> None:
    with placement.init_empty_weights():
        assert nn.Linear(2, 2).weight.is_meta
    with placement.gather_params_ctx(nn.Parameter(torch.ones(1))):
        pass
    assert placement.infer_device() == other.infer_device()
    assert placement.check_deepspeed_zero3_enabled() is integrations.check_deepspeed_zero3_enabled() is False


def test_trainable_leaves_are_wrapped_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Net(), narrow())
    model.get_base_model()._no_split_modules = ["Net"]
    policy = fsdp.fsdp_auto_wrap_policy(model)
    chosen = {n for n, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}
    leaves = {n for n, m in model.named_modules() if n.endswith(".default") and m._parameters.get("weight") is not None}
    assert chosen == {"base_model.model", *leaves} and leaves
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Net,Missing")
    with pytest.raises(TypeError, match="Missing"):
        fsdp.fsdp_auto_wrap_policy(model)


def test_renamings_of_an_adapters_keys() -> None:
    def renamed(key: str, found: list[Any]) -> str:
        for step in found:
            key = step.rename_source_key(key)[0]
        return key

    key = "base_model.model.model.first.narrow_A.weight"
    for config in (narrow(), None):
        assert renamed(key, build_peft_weight_mapping([], "mine", config)) == "model.first.narrow_A.mine.weight"


def test_a_dictionary_of_buffers() -> None:
    of_reference = pytest.importorskip("peft.tuners._buffer_dict").BufferDict
    for cls in (BufferDict, of_reference):
        made = cls({"a": torch.ones(2)}, persistent=True)
        made.update(cls({"b": torch.zeros(1)}))
        made.update({"c": torch.zeros(3)}.items())
        assert (list(made), len(made), "b" in made, list(made.state_dict())) == (["a", "b", "c"], 3, True, [*"abc"])
        assert torch.equal(made.pop("a"), torch.ones(2)) and "a" not in made and "c" in repr(made)
        del made["b"]
        assert [*made.keys()] == [key for key, _ in made.items()] == ["c"] and len(made.values()) == 1
        made.clear()
        assert not len(made) and not cls({"a": torch.ones(2)}).state_dict()
        with pytest.raises(RuntimeError):
            made(1)


@pytest.mark.parametrize(
    ("targets", "others"),
    [
        (["a"], []),
        (["1.a", "2.a"], ["3.a"]),
        (["b.c"], ["a.b"]),
        (["a.b.c", "d.e.f", "g.h.i"], ["a.b.x", "d.x.f", "x.h.i"]),
        (["b", "a.b", "a.c"], ["a"]),
        (["b"], ["a.b"]),
    ],
)
def test_the_shortest_endings_that_mean_targets_alone(targets: list[str], others: list[str]) -> None:
    same(structure._find_minimal_target_modules, tuners_utils._find_minimal_target_modules, targets, others)


def test_names_that_are_no_targets_are_refused() -> None:
    for find in (structure._find_minimal_target_modules, tuners_utils._find_minimal_target_modules):
        for targets in ("a", [], ["", "a"], ["b"]):
            with pytest.raises(ValueError, match="target_modules"):
                find(targets, ["b"])


def test_where_adapters_are_in_a_model() -> None:
    model = adapted(narrow(modules_to_save=["head"]))
    model.add_adapter("other", narrow())
    model.set_adapter("default")
    found = structure._get_tuner_state_dict_key_prefixes(model)
    own = structure._filter_state_dict_by_key_prefixes(model.state_dict(), found)
    assert own and not any("base_layer" in name or "head" in name for name in own)
    assert all(f".{name}." in f".{key}." for key in own for name in ("default",) if ".other" not in key)
    of_one = structure._get_tuner_state_dict_key_prefixes(model, "other")
    assert {key for key in own if ".other" in key} == set(
        structure._filter_state_dict_by_key_prefixes(model.state_dict(), of_one)
    )
    for key, prefixes in (("a.b.c", {"a.b"}), ("a.bc", {"a.b"}), ("a", {"a"}), ("a", set())):
        same(structure._is_key_under_prefixes, tuners_utils._is_key_under_prefixes, key, prefixes)


def test_what_is_tied_to_the_embeddings() -> None:
    model: Any = TINY.build()
    for tie in (True, False):
        model.config.tie_word_embeddings = tie
        model.tie_weights()
        same(structure._get_module_names_tied_with_embedding, other._get_module_names_tied_with_embedding, model)
        model._tied_weights_keys = ["lm_head.weight"]
        same(structure._get_module_names_tied_with_embedding, other._get_module_names_tied_with_embedding, model)
        del model._tied_weights_keys
    assert structure._get_module_names_tied_with_embedding(nn.Linear(2, 2)) == []
    assert structure._get_no_split_modules(model) == set(other._get_no_split_modules(model))
    assert structure._get_no_split_modules(nn.Linear(2, 2)) == set()
