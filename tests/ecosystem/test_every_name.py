"""Every name that a module of the reference says is public can be imported by the alias, or the reason why not is known.

What is to come is generated: names of methods, and of variants of one, that are not installed. The others that are lacking are
listed here, and the page for users has them.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from peftc.registry.manager import default_registry
from tests.ecosystem.test_drop_in import PAGE, ROOT, output

sys.path.insert(0, str(ROOT / "docs"))

import hf_compat  # the page's own code

#: names of the reference that nothing here stands for
LACKING: dict[str, set[str]] = {
    "peft.tuners": {"MixedModel"},
    "peft.tuners.adalora": {"RankAllocator"},
    "peft.tuners.mixed": {"COMPATIBLE_TUNER_TYPES", "MixedModel"},
    "peft.utils": {
        "_prepare_prompt_learning_config",
        "_set_adapter",
        "_set_trainable",
        "get_gptqmodel_quant_linear",
        "get_quantization_kwargs",
        "map_cache_to_layer_device_map",
        "quantization_extra_repr",
        "register_peft_method",
        "resolve_quantization_backend",
        "set_additional_trainable_modules",
        "TrainableTokensWrapper",
    },
    "peft.utils.other": {"starcoder_model_postprocess_past_key_value"},
}

LIST = """
import importlib, json, pkgutil
import peft
found = {}
for name in ["peft", *(m.name for m in pkgutil.walk_packages(peft.__path__, "peft."))]:
    try:
        module = importlib.import_module(name)
    except ImportError:
        continue
    if hasattr(module, "__all__"):
        found[name] = sorted(module.__all__)
print(json.dumps(found))
"""
ASK = """
import importlib, json, sys
import peftc.compat
peftc.compat.install()
lacking = {}
for module, names in json.loads(sys.argv[1]).items():
    try:
        found = importlib.import_module(module)
    except ImportError:
        lacking[module] = names
        continue
    lacking[module] = [name for name in names if getattr(found, name, None) is None]
print(json.dumps(lacking))
"""
TYPES = {name.lower(): name for name in hf_compat._api()["methods"]}


@pytest.fixture(scope="module")
def public() -> dict[str, list[str]]:
    """Module of the reference -> the names that it says are public."""
    found: dict[str, list[str]] = json.loads(output("-c", LIST)[-1])
    assert sum(map(len, found.values())) > 500
    return found


def is_to_come(module: str, name: str) -> bool:
    """Whether the name is of a method, or a variant of one, that is not installed."""
    here = default_registry().names
    owner = TYPES.get(module.removeprefix("peft.tuners.").partition(".")[0])
    table = re.match(r"TRANSFORMERS_MODELS_TO_([A-Z0-9]+)_", name)
    coming = {kind.replace("_", "") for kind in TYPES.values() if kind not in here}
    return (
        (owner is not None and owner not in here)
        or (table is not None and table[1] in coming)
        or name in hf_compat._waiting(default_registry())
    )


def test_every_public_name_is_there_or_to_come_or_listed(public: dict[str, list[str]]) -> None:
    lacking: dict[str, list[str]] = json.loads(output("-c", ASK, json.dumps(public))[-1])
    left = {module: {name for name in names if not is_to_come(module, name)} for module, names in lacking.items()}
    assert {module: names for module, names in left.items() if names} == LACKING


def test_the_page_lists_what_is_lacking() -> None:
    assert [name for names in LACKING.values() for name in names if f"`{name}`" not in PAGE] == []
