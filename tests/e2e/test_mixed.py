"""Adapters of several methods on one model, batches whose rows have different adapters, and their status: as the reference.

Where the reference does not mix two methods in a `PeftMixedModel` it still nests them when they are injected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
import peftc.runtime.layer.wrapper
from peftc import PeftMixedModel
from peftc.testing.models import MODELS, TinyModel, seeded
from tests.e2e.pairs import shaken

pytestmark = pytest.mark.filterwarnings("ignore")  # the reference warns of what is done on purpose here


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)).eval()


T5 = TinyModel("t5", t5, lambda: {"input_ids": torch.randint(2, 50, (3, 6))})


def tiny(name: str) -> TinyModel:
    return next(model for model in (*MODELS, T5) if model.name == name)


def output(model: nn.Module, arguments: Mapping[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        out = model(**arguments, **options)
    return out if isinstance(out, Tensor) else out.logits


def shifted(model: nn.Module) -> nn.Module:
    """All tensors of adapters with the same random values in both libraries."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if any(part in name for part in ("lora_", "ia3_", "hra_", "modules_to_save")):
                with seeded(seed):
                    parameter.copy_(0.3 + 0.3 * torch.randn(parameter.shape))
    return model.eval()


# nesting --------------------------------------------------------------------------------------------------------------

FOUR: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "a": ("HRAConfig", {"r": 4, "target_modules": ["lin0"]}),
    "b": ("LoraConfig", {"r": 4, "target_modules": ["lin0", "lin1"]}),
    "c": ("IA3Config", {"target_modules": ["lin0", "lin2"], "feedforward_modules": ["lin2"]}),
    "d": ("LoraConfig", {"r": 2, "target_modules": ["lin0"]}),
}


def injected(library: ModuleType) -> nn.Module:
    """Four adapters of three methods, all of them active."""
    model = tiny("mlp").build().eval()
    for name, (config, options) in FOUR.items():
        library.inject_adapter_in_model(getattr(library, config)(**options), model, name)
    shifted(model)
    base = peft.tuners.tuners_utils.BaseTunerLayer if library is peft else peftc.runtime.layer.wrapper.TunerLayer
    for module in model.modules():
        if isinstance(module, base):
            module.set_adapter(list(FOUR))
    return model


def test_nested_wrappers_have_the_same_names_and_compute_the_same() -> None:

    theirs, ours = injected(peft), injected(peftc)
    names = [sorted((name, tuple(p.shape)) for name, p in model.named_parameters()) for model in (theirs, ours)]
    assert names[0] == names[1]
    arguments = tiny("mlp").arguments()
    torch.testing.assert_close(output(ours, arguments), output(theirs, arguments), rtol=1e-5, atol=1e-6)


def mixed(library: ModuleType, types: str = "bd") -> Any:
    first, *others = types
    configs = {name: getattr(library, config)(**options) for name, (config, options) in FOUR.items()}
    model = library.get_peft_model(tiny("mlp").build().eval(), configs[first], first, mixed=True)
    for name in others:
        model.add_adapter(name, configs[name])
    return shifted(model)


def test_a_mixed_model_looks_like_the_references() -> None:
    theirs, ours = mixed(peft), mixed(peftc)
    assert [type(m).__name__ for m in (ours, ours.base_model)] == [
        type(m).__name__ for m in (theirs, theirs.base_model)
    ]
    assert ours.active_adapters == theirs.active_adapters
    for model in (theirs, ours):
        model.set_adapter(["b", "d"])
    assert (ours.active_adapter, ours.active_adapters) == (theirs.active_adapter, theirs.active_adapters)
    shapes = [sorted((n, tuple(p.shape), p.requires_grad) for n, p in m.named_parameters()) for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    arguments = tiny("mlp").arguments()
    acting = output(theirs, arguments)
    torch.testing.assert_close(output(ours, arguments), acting, rtol=1e-5, atol=1e-6)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(output(ours, arguments), output(theirs, arguments), rtol=0.0, atol=0.0)
    torch.testing.assert_close(
        output(ours.merge_and_unload(), arguments), output(theirs.merge_and_unload(), arguments), rtol=1e-5, atol=1e-6
    )


def test_each_adapter_of_a_mixed_model_is_read_by_the_reference(tmp_path: Path) -> None:
    model = mixed(peftc, "abcd")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == list("abcd")
    arguments = tiny("mlp").arguments()
    for name in "abcd":
        model.set_adapter(name)
        alone = peft.PeftModel.from_pretrained(tiny("mlp").build().eval(), str(tmp_path / name))
        torch.testing.assert_close(output(model, arguments), output(alone, arguments), rtol=1e-5, atol=1e-6)


def test_a_mixed_model_from_files_of_the_reference(tmp_path: Path) -> None:
    arguments, alone = tiny("mlp").arguments(), {}
    for name, (config, options) in FOUR.items():
        made = shifted(peft.get_peft_model(tiny("mlp").build(), getattr(peft, config)(**options)))
        made.save_pretrained(str(tmp_path / name))
        alone[name] = output(made, arguments)
    model = PeftMixedModel.from_pretrained(tiny("mlp").build(), tmp_path / "a", "a")
    assert type(model) is PeftMixedModel
    for name in "bcd":
        model.load_adapter(tmp_path / name, name)
    assert model.active_adapters == ["a"]
    for name, wanted in alone.items():
        model.set_adapter(name)
        torch.testing.assert_close(output(model, arguments), wanted, rtol=1e-5, atol=1e-6)


# rows -----------------------------------------------------------------------------------------------------------------

ROWS = [
    ("mlp", {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin1"]}),
    (
        "mlp",
        {"target_modules": ["lin0"], "modules_to_save": ["lin2"]},
        {"target_modules": ["lin1"], "modules_to_save": ["lin2"]},
    ),
    ("mlp", {"target_modules": ["lin0"], "use_rslora": True}, {"target_modules": ["lin1"]}),
    ("embedding", {"target_modules": ["emb", "lin0"]}, {"target_modules": ["emb"]}),
    ("conv2d", {"target_modules": ["conv1", "head"]}, {"target_modules": ["conv1"]}),
    ("gpt2", {"target_modules": ["c_attn"]}, {"target_modules": ["c_fc"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}),
]


def two(library: ModuleType, model: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Any:
    """Two low-rank adapters, of ranks 4 and 2."""
    base = tiny(model).build().eval()
    adapted = library.get_peft_model(base, library.LoraConfig(**{"r": 4, **first}), "one")
    adapted.add_adapter("two", library.LoraConfig(**{"r": 2, **second}))
    return shifted(adapted)


def repeated(arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first row of each argument, slightly changed from row to row."""
    return {
        name: torch.stack([v[i % len(v)] for i in range(rows)]) if isinstance(v, Tensor) else v
        for name, v in arguments.items()
    }


@pytest.mark.parametrize(("model", "first", "second"), ROWS, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(ROWS)])
@pytest.mark.parametrize(
    "names", [["one", "two", "__base__", "one"], ["two", "two", "one", "one"]], ids=["all", "even"]
)
def test_each_row_has_its_adapter(model: str, first: Any, second: Any, names: list[str]) -> None:
    theirs, ours = two(peft, model, first, second), two(peftc, model, first, second)
    arguments = repeated(tiny(model).arguments(), len(names))
    found = output(ours, arguments, adapter_names=names)
    torch.testing.assert_close(found, output(theirs, arguments, adapter_names=names), rtol=1e-4, atol=5e-5)
    assert not torch.allclose(found, output(ours, arguments), atol=1e-3)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_generation_with_an_adapter_for_each_row(model: str, search: Mapping[str, Any]) -> None:
    targets = {"target_modules": ["q_proj", "v_proj"] if model == "llama" else ["q", "wi"]}
    theirs, ours = two(peft, model, targets, targets), two(peftc, model, targets, targets)
    prompt = repeated({"input_ids": tiny(model).arguments()["input_ids"]}, 3)
    options = {"max_new_tokens": 5, "do_sample": False, "adapter_names": ["two", "__base__", "one"], **search}
    found, wanted = (lib.generate(**prompt, **options) for lib in (ours, theirs))
    assert torch.equal(found, wanted)


# status ---------------------------------------------------------------------------------------------------------------


def plain(model: Any) -> None:
    """As it was made."""


def second_active(model: Any) -> None:
    model.set_adapter("two")


def both_merged(model: Any) -> None:
    model.base_model.set_adapter(["one", "two"])
    model.merge_adapter()


def one_layer_merged(model: Any) -> None:
    model.base_model.model.lin0.merge()


def one_layer_disabled(model: Any) -> None:
    model.base_model.model.lin0.enable_adapters(False)
    model.set_requires_grad("one")


def one_layer_active(model: Any) -> None:
    model.base_model.model.lin1.set_adapter("two")
    model.base_model.model.lin0.set_adapter("one")


def one_tensor_frozen(model: Any) -> None:
    model.base_model.model.lin0.lora_A["one"].weight.requires_grad_(False)


def gradients_of_both(model: Any) -> None:
    model.set_requires_grad(["one", "two"])


def moved_away(model: Any) -> None:
    model.base_model.model.lin1.to("meta")


STATES = [
    plain,
    second_active,
    both_merged,
    one_layer_merged,
    one_layer_disabled,
    one_layer_active,
    one_tensor_frozen,
    gradients_of_both,
    moved_away,
]


def with_status(library: ModuleType, change: Callable[[Any], None]) -> Any:
    both = {"r": 2, "target_modules": ["lin0", "lin1"]}
    model = library.get_peft_model(tiny("mlp").build(), library.LoraConfig(**both), "one")
    model.add_adapter("two", library.LoraConfig(**both))
    change(model)
    return model


@pytest.mark.parametrize("change", STATES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "base"])
def test_status_is_the_same_field_by_field(change: Callable[[Any], None], wrapped: bool) -> None:
    theirs, ours = with_status(peft, change), with_status(peftc, change)
    if not wrapped:
        theirs, ours = theirs.get_base_model(), ours.get_base_model()
    found, wanted = (
        [dataclasses.asdict(layer) for layer in library.get_layer_status(model)]
        for library, model in ((peftc, ours), (peft, theirs))
    )
    assert found == wanted
    assert dataclasses.asdict(peftc.get_model_status(ours)) == dataclasses.asdict(peft.get_model_status(theirs))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"r": 2, "target_modules": ["lin0"], "modules_to_save": ["lin2"]}),
        ("HRAConfig", {"r": 2, "target_modules": ["lin0", "lin1"]}),
    ],
)
def test_status_of_other_wrappers(config: str, options: Mapping[str, Any]) -> None:
    theirs, ours = (
        library.get_peft_model(tiny("mlp").build(), getattr(library, config)(**options)) for library in (peft, peftc)
    )
    found, wanted = ([dataclasses.asdict(layer) for layer in m.get_layer_status()] for m in (ours, theirs))
    if config == "HRAConfig":  # called `hra.HRALinear` there, `hra.Linear` by our one rule
        assert [layer.pop("module_type") for layer in (*found, *wanted)]
    assert found == wanted
    assert dataclasses.asdict(ours.get_model_status()) == dataclasses.asdict(theirs.get_model_status())
    assert ours.modules_to_save == theirs.modules_to_save
    assert ours.has_active_enabled_adapter == theirs.has_active_enabled_adapter


def test_status_of_a_mixed_model() -> None:
    """The reference refuses it; its layers have one all the same."""
    status = mixed(peftc, "abcd").get_model_status()
    assert status.adapter_model_type == "MixedModel"
    assert status.peft_types == {"a": "HRA", "b": "LORA", "c": "IA3", "d": "LORA"}
    assert status.num_adapter_layers == 6
    assert status.active_adapters == ["a"]


# the level below, and layers ------------------------------------------------------------------------------------------

LEVELS = [
    ("LoraModel", "LoraConfig", {"r": 2, "target_modules": ["lin0", "lin1"], "lora_alpha": 3}),
    ("IA3Model", "IA3Config", {"target_modules": ["lin0"], "feedforward_modules": []}),
    ("HRAModel", "HRAConfig", {"r": 2, "target_modules": ["lin0"]}),
]


@pytest.mark.parametrize(("name", "config", "options"), LEVELS, ids=[level[0] for level in LEVELS])
def test_the_level_below_is_usable_alone(name: str, config: str, options: Mapping[str, Any]) -> None:
    theirs, ours = (
        getattr(library, name)(tiny("mlp").build(), getattr(library, config)(**options), "first")
        for library in (peft, peftc)
    )
    for attribute in ("prefix", "targeted_module_names", "active_adapter", "active_adapters", "uses_shared_state"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.tuner_layer_cls.__name__ == theirs.tuner_layer_cls.__name__
    table = getattr(type(theirs), "target_module_mapping", None)  # one of them has none there
    assert table is None or {k: set(v) for k, v in ours.target_module_mapping.items()} == {
        k: set(v) for k, v in table.items()
    }
    assert ours.supports_lora_conversion() == theirs.supports_lora_conversion()
    assert list(ours.state_dict()) == list(theirs.state_dict()) or set(ours.state_dict()) == set(theirs.state_dict())
    assert list(ours.peft_config) == list(theirs.peft_config)
    arguments = tiny("mlp").arguments()
    bare = output(tiny("mlp").build(), arguments)
    shaken(ours)
    acting = output(ours, arguments)
    assert not torch.allclose(acting, bare)
    ours.disable_adapter_layers()
    assert torch.equal(output(ours, arguments), bare)
    ours.enable_adapter_layers()
    ours.merge_adapter()
    torch.testing.assert_close(output(ours, arguments), acting, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    assert torch.equal(output(ours, arguments), acting)
    ours.peft_config["second"] = getattr(peftc, config)(**options)
    ours.inject_adapter(ours.model, "second")
    ours.set_adapter("second")
    assert ours.active_adapters == ["second"]
    ours.set_requires_grad("first")
    assert {p.requires_grad for n, p in ours.named_parameters() if ".first" in n} == {True}
    ours.delete_adapter("second")
    assert list(ours.peft_config) == ["first"]
    ours.set_adapter("first")
    torch.testing.assert_close(output(ours.merge_and_unload(), arguments), acting, rtol=1e-4, atol=1e-5)


def test_layers_show_options_by_adapter() -> None:
    def layers(library: ModuleType) -> list[nn.Module]:
        options = {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 3}, "lora_alpha": 5}
        model = library.get_peft_model(tiny("mlp").build(), library.LoraConfig(r=2, lora_dropout=0.5, **options))
        model.add_adapter("more", library.LoraConfig(r=4, use_rslora=True, target_modules=["lin0"]))
        return [model.base_model.model.lin0.train(), model.base_model.model.lin1.train()]

    for theirs, ours in zip(layers(peft), layers(peftc), strict=True):
        for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias"):
            assert dict(getattr(ours, name)) == dict(getattr(theirs, name)), name
        assert set(ours.other_param_names) == set(theirs.other_param_names)
        assert set(ours.adapter_layer_names) == set(theirs.adapter_layer_names)
        for name in ours.adapter_layer_names:
            assert list(getattr(ours, name)) == list(getattr(theirs, name)), name
        assert list(ours.lora_dropout) == list(theirs.lora_dropout)
        dropped = ours.lora_dropout["default"](torch.ones(1000))
        assert {0.0, 2.0} == set(dropped.tolist())
    assert torch.equal(layers(peftc)[0].lora_dropout["more"](torch.ones(3)), torch.ones(3))


def test_layers_of_reflections_show_options_by_adapter() -> None:
    for library in (peft, peftc):
        model = library.get_peft_model(tiny("mlp").build(), library.HRAConfig(r=4, target_modules=["lin0"]))
        layer = model.base_model.model.lin0
        assert (dict(layer.hra_r), dict(layer.hra_apply_GS)) == ({"default": 4}, {"default": False})
