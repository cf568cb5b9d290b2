"""The program in the documentation does the same with the alias as with the real `peft`; the page names what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from peftc import compat
from peftc.compat import names
from tests.apart import Ran, run_apart

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "examples/drop_in/train.py"
PAGE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")


def output(*words: str) -> list[str]:
    """What a program prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_the_program_of_the_page_does_the_same_with_both(tmp_path: Path) -> None:
    real = output(PROGRAM, str(tmp_path / "real"))
    alias = output("-m", "peftc", "run", PROGRAM, str(tmp_path / "alias"))
    assert real[:-1] == alias[:-1]
    assert real[-1].replace("0.21.2", compat.VERSION) == alias[-1]
    assert all(line.replace(compat.VERSION, "") in PAGE for line in alias), "the page has the version of its own run"


def test_the_page_names_every_module() -> None:
    assert set(names.table()) <= set(re.findall(r"`(peft[\w.]*)`", PAGE))


#: what transformers, accelerate, diffusers, TRL and sentence-transformers import, by module
IMPORTED = {
    "peft": "__version__ PeftModel PeftMixedModel PeftConfig PeftType LoraConfig LoKrConfig PrefixTuningConfig "
    "PromptLearningConfig get_peft_model inject_adapter_in_model get_peft_model_state_dict set_peft_model_state_dict "
    "prepare_model_for_kbit_training TaskType PeftModelForCausalLM PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification LoraModel get_peft_config load_peft_weights "
    "AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM",
    "peft.config": "PeftConfigMixin",
    "peft.functional": "delete_adapter",
    "peft.helpers": "disable_input_dtype_casting",
    "peft.import_utils": "is_bnb_available is_bnb_4bit_available is_torchao_available",
    "peft.mapping": "get_peft_model",
    "peft.mapping_func": "get_peft_model",
    "peft.peft_model": "PeftModel get_peft_model_state_dict",
    "peft.tuners.tuners_utils": "BaseTunerLayer BaseTuner cast_adapter_dtype check_adapters_to_merge",
    "peft.tuners.lora": "LoraLayer LoraModel Linear Embedding Conv2d",
    "peft.tuners.lora.layer": "LoraLayer Linear",
    "peft.tuners.lora.model": "LoraModel",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer factorization",
    "peft.utils": "ModulesToSaveWrapper _get_submodules get_peft_model_state_dict WEIGHTS_NAME CONFIG_NAME "
    "SAFETENSORS_WEIGHTS_NAME load_peft_weights",
    "peft.utils.constants": "UPCAST_DTYPES DUMMY_TARGET_MODULES",
    "peft.utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap",
    "peft.utils.integrations": "dequantize_module_weight gather_params_ctx get_bnb_param_type init_empty_weights",
    "peft.utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy get_quantization_config transpose "
    "get_pattern_key",
    "peft.utils.save_and_load": "get_peft_model_state_dict",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping get_model_conversion_mapping",
}


LINES = [f"from {module} import {name}" for module, held in IMPORTED.items() for name in held.split()]
#: Programs that print what is lacking.
LACKING = {
    "imports of others": f"""
import peftc.compat
peftc.compat.install()
for line in {LINES!r}:
    try:
        exec(line)
    except ImportError as error:
        print(line, error)
""",
    "names of the table": """
from peftc.compat import names
for module, held in names.table().items():
    for name, home in held.items():
        if name not in dir(home.owner()) and getattr(home.owner(), home.name, None) is None:
            print(module, name, home)
""",
    # from the package and from each module of a method, and every name that `dir` lists can be read
    "imports by a star": """
import importlib
import peftc.compat
peftc.compat.install()
from peft import *
from peft.tuners import *
from peftc.compat import names
for module in ["peft", "peft.tuners", "peft.utils", *names.submodules("peft.tuners")]:
    exec(f"from {module} import *")
    found = importlib.import_module(module)
    for name in dir(found):
        getattr(found, name)
LoraConfig, PromptEmbedding, PrefixEncoder, PromptEncoder, CPTEmbedding, CartridgeEncoder, MultitaskPromptEmbedding
""",
}


@cache
def ran() -> dict[str, Ran]:
    """Each program by itself, in a process that has transformers."""
    return run_apart(LACKING, "transformers")


@pytest.mark.parametrize("program", LACKING)
def test_nothing_is_lacking(program: str) -> None:
    done = ran()[program]
    assert (done.code, done.out) == (0, ""), done.err
