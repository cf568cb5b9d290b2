"""Whoever catches what the reference raises catches what is raised here: situation by situation, in both libraries.

Each situation is a small program that is given the library. What the reference raises there is one of Python's own
classes, or a subclass of one; the exception here is also of that class.
"""

from __future__ import annotations

import importlib
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftc
from peftc.diagnostics import PeftcError
from peftc.testing.models import MODELS

TINY = {model.name: model for model in MODELS}
Program = Callable[[Any, Path], Any]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def lora(lib: Any, **options: Any) -> Any:
    return lib.LoraConfig(**{"target_modules": ["0"], "r": 2, **options})


def model(lib: Any, **options: Any) -> Any:
    return lib.get_peft_model(mlp(), lora(lib, **options))


def merged(lib: Any) -> Any:
    made = model(lib)
    made.merge_adapter()
    return made


def two(lib: Any, **options: Any) -> Any:
    made = model(lib)
    made.add_adapter("other", lora(lib, **options))
    return made


def broken(lib: Any) -> Any:
    made = model(lib, init_lora_weights=False)
    with torch.no_grad():
        next(p for n, p in made.named_parameters() if "lora_B" in n).fill_(float("nan"))
    return made


def llama(lib: Any, config: str = "LoraConfig", **options: Any) -> Any:
    return lib.get_peft_model(TINY["llama"].build(), getattr(lib, config)(task_type="CAUSAL_LM", **options))


def saved(lib: Any, folder: Path, **options: Any) -> str:
    model(lib, **options).save_pretrained(folder / "saved")
    return str(folder / "saved")


def edited(lib: Any, folder: Path, **changes: Any) -> str:
    path = saved(lib, folder)
    file = Path(path, "adapter_config.json")
    data = {k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v is not ...}
    file.write_text(json.dumps(data))
    return path


def a_file(folder: Path) -> str:
    (folder / "file").write_text("")
    return str(folder / "file")


def without_weights(lib: Any, folder: Path) -> str:
    path = saved(lib, folder)
    Path(path, "adapter_model.safetensors").unlink()
    return path


def closed(folder: Path, text: str = "{") -> str:
    (folder / "adapter_config.json").write_text(text)
    return str(folder)


def row_names(lib: Any, names: Any, training: bool = False, rows: int = 2) -> Any:
    made = llama(lib, target_modules=["q_proj"]).train(training)
    return made(input_ids=torch.ones(rows, 3, dtype=torch.long), adapter_names=names)


PROGRAMS: dict[str, Program] = {
    # configs
    "an unknown option": lambda lib, _: lib.LoraConfig(rank=4),
    "an unknown task": lambda lib, _: lib.LoraConfig(task_type="NOTHING"),
    "an unknown type": lambda lib, _: lib.get_peft_config({"peft_type": "NOTHING"}),
    "no type": lambda lib, _: lib.get_peft_config({"r": 4}),
    "a pattern of layers alone": lambda lib, _: lib.LoraConfig(layers_pattern="layers"),
    "layers of a regular expression": lambda lib, _: lib.LoraConfig(layers_to_transform=[1], target_modules="a.*"),
    "a schedule that does not fit": lambda lib, _: lib.AdaLoraConfig(total_step=10, tinit=20, tfinal=20),
    "a schedule without steps": lambda lib, _: lib.AdaLoraConfig(),
    "feed-forward layers that are no targets": lambda lib, _: lib.IA3Config(
        target_modules=["k"], feedforward_modules=["v"]
    ),
    "block size and number of blocks": lambda lib, _: lib.OFTConfig(r=4, oft_block_size=4),
    "a text without a tokenizer": lambda lib, _: lib.PromptTuningConfig(
        num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="x"
    ),
    "config of a folder that is not there": lambda lib, path: lib.PeftConfig.from_pretrained(str(path / "nothing")),
    "config of an empty folder": lambda lib, path: lib.PeftConfig.from_pretrained(str(path)),
    "config file that is not there": lambda lib, path: lib.PeftConfig.from_json_file(str(path / "nothing.json")),
    "config file that is no JSON": lambda lib, path: lib.PeftConfig.from_pretrained(closed(path)),
    "config file of an unknown type": lambda lib, path: lib.PeftConfig.from_pretrained(
        edited(lib, path, peft_type="NOTHING")
    ),
    "config saved in place of a file": lambda lib, path: lora(lib).save_pretrained(a_file(path)),
    # models
    "no module matches": lambda lib, _: lib.get_peft_model(mlp(), lora(lib, target_modules=["none"])),
    "all modules are excluded": lambda lib, _: lib.get_peft_model(mlp(), lora(lib, exclude_modules=["0"])),
    "no targets are known": lambda lib, _: lib.get_peft_model(mlp(), lib.LoraConfig()),
    "a layer that cannot be adapted": lambda lib, _: lib.get_peft_model(mlp(), lora(lib, target_modules=["1"])),
    "the same of another method": lambda lib, _: lib.get_peft_model(mlp(), lib.VeraConfig(target_modules=["1"])),
    "the same of a third method": lambda lib, _: lib.get_peft_model(mlp(), lib.BOFTConfig(target_modules=["1"])),
    "groups that a method cannot do": lambda lib, _: lib.get_peft_model(
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), lib.HRAConfig(target_modules=["0"])
    ),
    "a container trained whole": lambda lib, _: lib.get_peft_model(
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.Linear(2, 2)])}),
        lib.LoraConfig(target_modules=["a"], modules_to_save=["b"]),
    ),
    "a config without a method": lambda lib, _: lib.get_peft_model(mlp(), lib.PeftConfig()),
    "a prompt injected": lambda lib, _: lib.inject_adapter_in_model(
        lib.PromptTuningConfig(num_virtual_tokens=2), mlp()
    ),
    "the same name again": lambda lib, _: model(lib).add_adapter("default", lora(lib)),
    "a name with a dot": lambda lib, _: lib.get_peft_model(mlp(), lora(lib), adapter_name="a.b"),
    "another type beside": lambda lib, _: model(lib).add_adapter(
        "b", lib.IA3Config(target_modules=["0"], feedforward_modules=[])
    ),
    "two with biases": lambda lib, _: (
        m := model(lib, bias="all"),
        m.add_adapter("b", lora(lib, bias="all")),
    ),
    "set what is not there": lambda lib, _: model(lib).set_adapter("none"),
    "delete what is not there": lambda lib, _: model(lib).delete_adapter("none"),
    "delete while merged": lambda lib, _: merged(lib).delete_adapter("default"),
    "merge NaN": lambda lib, _: broken(lib).merge_adapter(safe_merge=True),
    "merge and unload NaN": lambda lib, _: broken(lib).merge_and_unload(safe_merge=True),
    "state of what is not there": lambda lib, _: lib.get_peft_model_state_dict(model(lib), adapter_name="none"),
    "status of what is no model of ours": lambda lib, _: lib.get_layer_status(mlp()),
    "model status of what is no model of ours": lambda lib, _: lib.get_model_status(mlp()),
    "rows while training": lambda lib, _: row_names(lib, ["default", "default"], training=True),
    "rows of what is not there": lambda lib, _: row_names(lib, ["default", "none"]),
    "too few rows": lambda lib, _: row_names(lib, ["default"]),
    "combine what is not there": lambda lib, _: two(lib).add_weighted_adapter(["default", "none"], [1, 1], "c"),
    "combine other ranks linearly": lambda lib, _: two(lib, r=4).add_weighted_adapter(
        ["default", "other"], [1, 1], "c", combination_type="linear"
    ),
    "combine in an unknown way": lambda lib, _: two(lib).add_weighted_adapter(
        ["default", "other"], [1, 1], "c", combination_type="nothing"
    ),
    "a mixed model of a prompt": lambda lib, _: lib.PeftMixedModel(mlp(), lib.PromptTuningConfig(num_virtual_tokens=2)),
    "a mixed model set to what is not there": lambda lib, _: lib.get_peft_model(
        mlp(), lora(lib), mixed=True
    ).set_adapter(["none"]),
    "a mixed model's status": lambda lib, _: lib.get_peft_model(mlp(), lora(lib), mixed=True).get_layer_status(),
    "prefixes with checkpointing": lambda lib, _: _checkpointed(lib),
    # files
    "saved in place of a file": lambda lib, path: model(lib).save_pretrained(a_file(path)),
    "save what is not there": lambda lib, path: model(lib).save_pretrained(str(path), selected_adapters=["none"]),
    "loaded from nowhere": lambda lib, path: lib.PeftModel.from_pretrained(mlp(), str(path / "nothing")),
    "loaded without weights": lambda lib, path: lib.PeftModel.from_pretrained(mlp(), without_weights(lib, path)),
    "loaded with other shapes": lambda lib, path: lib.PeftModel.from_pretrained(mlp(), edited(lib, path, r=3)),
    "loaded beside, with other shapes": lambda lib, path: model(lib).load_adapter(edited(lib, path, r=3), "b"),
    "loaded with no config": lambda lib, path: lib.PeftModel.from_pretrained(mlp(), saved(lib, path), config=3),
    "weights of nowhere": lambda lib, path: lib.load_peft_weights(str(path / "nothing")),
    "a prompt loaded to train": lambda lib, path: _trainable_prompt(lib, path),
    "swapped in with other options": lambda lib, path: _hotswap(lib).hotswap_adapter(
        model(lib), saved(lib, path, use_rslora=True), "default"
    ),
    "swapped in while merged": lambda lib, path: _hotswap(lib).hotswap_adapter(
        merged(lib), saved(lib, path), "default"
    ),
    "swapped in with other modules": lambda lib, path: _hotswap(lib).hotswap_adapter(
        model(lib), saved(lib, path, target_modules=["0", "2"]), "default"
    ),
    "no adapter to prepare for swapping": lambda lib, _: _hotswap(lib).prepare_model_for_compiled_hotswap(mlp()),
    "base weights that do not fit": lambda lib, _: lib.set_base_model_state_dict(model(lib), {"x": torch.ones(1)}),
    "a scale that is no number": lambda lib, _: _rescaled(lib, "x"),
}


#: what the reference refuses and peftc does
WORKS = {"groups that a method cannot do", "rows while training", "a mixed model's status", "a prompt loaded to train"}


def _checkpointed(lib: Any) -> None:
    base = TINY["llama"].build()
    base.gradient_checkpointing_enable()
    lib.get_peft_model(base, lib.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _trainable_prompt(lib: Any, path: Path) -> Any:
    llama(lib, "PromptTuningConfig", num_virtual_tokens=2).save_pretrained(path / "prompt")
    return lib.PeftModel.from_pretrained(TINY["llama"].build(), str(path / "prompt"), is_trainable=True)


def _hotswap(lib: Any) -> Any:
    return peftc if lib is peftc else importlib.import_module("peft.utils.hotswap")


def _rescaled(lib: Any, by: Any) -> None:
    with importlib.import_module(f"{lib.__name__}.helpers").rescale_adapter_scale(model(lib), by):
        pass


def outcome(program: Program, lib: Any, folder: Path) -> BaseException | None:
    """What a program raises."""
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program(lib, folder)
        except Exception as error:
            return error
    return None


def _builtin(error: BaseException) -> type[BaseException]:
    """Python's own class that an exception is of."""
    return next(cls for cls in type(error).__mro__ if cls.__module__ == "builtins")


@pytest.mark.parametrize("situation", PROGRAMS)
def test_what_is_raised_there_is_caught_here(situation: str, tmp_path: Path) -> None:
    theirs, ours = (outcome(PROGRAMS[situation], lib, tmp_path / lib.__name__) for lib in (peft, peftc))
    if situation in WORKS:
        assert theirs is not None and ours is None
        return
    assert theirs is not None, "the reference raises nothing: the row says nothing"
    assert isinstance(ours, PeftcError), f"{ours!r} where the reference raises {theirs!r}"
    assert isinstance(ours, _builtin(theirs)), f"{type(ours).__mro__} where the reference raises {theirs!r}"
    again = pickle.loads(pickle.dumps(ours))
    assert (type(again), str(again), again.diagnostics) == (type(ours), str(ours), ours.diagnostics)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_warning_is_of_the_class_that_the_reference_warns_with(pattern: str, tmp_path: Path) -> None:
    """An adapter whose file says more than the model has: who filters the one filters the other."""
    path = edited(peftc, tmp_path, **{pattern: {"nowhere": 4}})
    for lib in (peft, peftc):
        with pytest.warns(RuntimeWarning, match="nowhere") as shown:
            lib.PeftModel.from_pretrained(mlp(), path)
        again = pickle.loads(pickle.dumps(shown[0].message))
        assert type(again) is type(shown[0].message) and str(again) == str(shown[0].message)


def test_several_problems_are_of_all_their_classes() -> None:
    with pytest.raises(PeftcError) as raised:
        peftc.get_peft_config({"peft_type": "LORA", "r": "x", "rank": 3})
    assert len(raised.value.diagnostics) == 2
    assert isinstance(raised.value, ValueError) and isinstance(raised.value, TypeError)
