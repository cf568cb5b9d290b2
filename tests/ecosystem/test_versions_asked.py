"""The version that the alias says: every library here takes it, and every place where one looks at it is written down."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from peftc import compat, rules
from peftc.compat import pins
from tests.apart import Ran, run_apart
from tests.defects import put_defect
from tests.ecosystem.pins import askers, in_code, in_metadata
from tests.environments.made_up import python, release

#: transformers' metadata do not name `peft`; its code does
LIBRARIES = sorted({*askers(), "transformers"})
SAID = compat.VERSION


def asked(library: str) -> set[str]:
    """What a library asks for by a lower bound in its code."""
    found = (re.fullmatch(r"MIN_PEFT_VERSION = '([\d.]+)'", text) for text in in_code(library))
    return {f">={match[1]}" for match in found if match}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_takes_the_version_that_is_said(library: str) -> None:
    for wanted in in_metadata(library) | asked(library):
        assert SpecifierSet(wanted).contains(SAID, prereleases=True), f"{library} asks for peft{wanted}, not {SAID}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_asks_is_written_down(library: str) -> None:
    release_here = version(library)
    listed = pins.pins_of(library, release_here)
    assert listed, f"`asked` in peftc/compat/pins.json does not know {library} {release_here}"
    wanted = {str(one) for text in in_metadata(library) | asked(library) for one in SpecifierSet(text)}
    held = {str(one) for pin in listed for one in pin.peft}
    assert wanted == held, f"{library} {release_here} asks for {wanted}; pins.json says {held}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_place_where_a_library_looks_at_the_version_is_judged(library: str) -> None:
    listed = {entry["text"] for entry in pins.data()["compared"] if entry["by"] == library}
    new = {text: sorted(where) for text, where in in_code(library).items() if text not in listed}
    assert not new, f"what does peftc do there? Write it into `compared` of peftc/compat/pins.json: {new}"


def environment(monkeypatch: pytest.MonkeyPatch, **releases: str) -> None:
    there = {name.replace("_", "-"): found for name, found in releases.items()}
    pins.pins_here.cache_clear()
    monkeypatch.setattr(pins, "installed_version", there.get)


@pytest.fixture
def _forget() -> Any:
    yield
    pins.pins_here.cache_clear()


@pytest.mark.usefixtures("_forget")
def test_the_lowest_version_that_suits_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_said() -> None:
        for releases, said, refused in (
            ({"transformers": "5.23.0", "trl": "1.16.0", "axolotl": "0.19.0", "ms_swift": "4.6.0"}, "0.20.0", []),
            ({"transformers": "5.24.0", "trl": "1.16.0", "diffusers": "0.42.1"}, "0.22.0", []),
            ({"transformers": "5.24.0", "axolotl": "0.19.0"}, "0.22.0", ["axolotl"]),
            ({}, "0.20.0", []),
        ):
            environment(monkeypatch, **releases)
            assert pins.version_said() == said
            found = pins.unmet()
            assert [d.code for d in found] == [rules.ALIAS_OUTDATED.code] * len(refused)
            assert all(f"`{name}`" in d.what for name, d in zip(refused, found, strict=True))

    is_said()
    put_defect(monkeypatch, pins, "all(pin.admits", "any(pin.admits")
    with pytest.raises(AssertionError):
        is_said()


def test_a_library_that_asks_for_another_version_is_named_when_the_alias_is_put_in_place(tmp_path: Path) -> None:
    front = release(release(tmp_path, "transformers", "5.24.0"), "axolotl", "0.19.0")
    done = python("-c", "import peftc.compat as c; c.install(); import peft; print(peft.__version__)", front=front)
    assert done.stdout.startswith("0.22.0+peftc."), done.stderr
    assert rules.ALIAS_OUTDATED.code in done.stderr and "`axolotl` 0.19.0 asks for `peft==0.20.0`" in done.stderr


# what follows from the version -----------------------------------------------------------------------------------------

LOADS = """
import json, sys
import peftc.compat
peftc.compat.install()
import torch
from peft import LoraConfig, get_peft_model
from peftc.diagnostics import PeftcError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder, case = sys.argv[1:]
def base():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)

get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
model = base()
if case == "magnitudes":
    config = json.load(open(f"{folder}/adapter_config.json"))
    json.dump({**config, "use_dora": True}, open(f"{folder}/adapter_config.json", "w"))
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    name = next(iter(tensors)).partition(".lora_")[0] + ".lora_magnitude_vector"
    save_file({**tensors, name: torch.full((8,), 3.0)}, f"{folder}/adapter_model.safetensors")
else:
    model._tp_size = 2
try:
    report = model.load_adapter(folder)
    print("loaded", json.dumps([sorted(report.missing_keys), sorted(report.unexpected_keys)]))
    print([p.double().sum().item() for n, p in model.named_parameters() if "magnitude" in n])
except PeftcError as error:
    print(error.diagnostics[0].code, [n for n, _ in model.named_parameters() if "lora" in n])
"""


def test_a_model_that_is_split_says_so_where_it_is_looked_for() -> None:
    """Fails where a release notes the number of parts elsewhere: then `peftc/host/parallel.py` has to know."""
    import inspect

    from transformers.integrations import peft as integration

    assert "_tp_size" in inspect.getsource(integration.PeftAdapterMixin.load_adapter)


LOSES = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def base():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config)

def magnitudes(model):
    return [p for n, p in model.named_parameters() if "magnitude" in n]

model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
magnitudes(model)[0].data.fill_(3.0)
model.save_pretrained(sys.argv[1])
again = base()
again.load_adapter(sys.argv[1])
print(len(magnitudes(again)), magnitudes(again)[0].eq(3.0).any().item())
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Each program by itself, in a process that has transformers."""
    programs = {"split": LOADS, "magnitudes": LOADS, "lost": LOSES}
    place = tmp_path_factory.mktemp("adapters")
    given = {case: f"import sys\nsys.argv[1:] = {[str(place / case), case]!r}\n" for case in programs}
    return run_apart({case: given[case] + program for case, program in programs.items()}, "transformers")


def test_an_adapter_is_not_loaded_whole_into_a_base_that_is_split(ran: dict[str, Ran]) -> None:
    """From 0.21 on, transformers takes it that `peft` splits the adapter too."""
    assert ran["split"].out == f"{rules.SPLIT_BASE.code} []\n", ran["split"]


def test_no_magnitude_is_lost_when_transformers_loads_an_adapter(ran: dict[str, Ran]) -> None:
    """Either all tensors of the file have come into the model, or it is refused and the model is as it was."""
    said = ran["magnitudes"].out
    assert said == f"loaded {json.dumps([[], []])}\n[24.0]\n", ran["magnitudes"]


def test_the_reference_loses_magnitudes_when_transformers_loads_an_adapter(ran: dict[str, Ran]) -> None:
    """A row of docs/reference-bugs.md."""
    assert ran["lost"].out == "1 False\n", ran["lost"]
