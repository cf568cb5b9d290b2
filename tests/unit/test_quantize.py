"""How a spec says that its base is to be quantised: what transformers is told, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftc.config import quantize
from peftc.config.quantize import BITSANDBYTES, LIBRARIES, QuantizeSection, missing_of
from peftc.config.spec import load_spec, read_spec
from peftc.config.yaml_text import parse_yaml
from peftc.diagnostics import ConfigError, Diagnostic, PeftcError
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import key_of
from peftc.graph.locate import LocatedBase
from peftc.graph.quantised import quantization_of
from tests.unit.fakes import registry

REST = "adapters: {default: {peft_type: FAKE}}\n"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here, all is."""
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)


def problems(base: str) -> dict[str, Diagnostic]:
    """Diagnostics of a spec by their places."""
    reading = read_spec(parse_yaml(f"version: 1\nbase:\n  path: m\n{base}{REST}", "spec.yaml"), registry())
    assert all(told.where.line is not None and told.where.column is not None for told in reading.diagnostics)
    return {str(told.where.path): told for told in reading.diagnostics}


def located(own: Any = None, asked: Any = None, **of: Any) -> LocatedBase:
    config = {"model_type": "llama"} | ({} if own is None else {"quantization_config": own})
    return LocatedBase(BaseRef(path="m", quantization=asked), "x", config=config, source="m", **of)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}),
        (
            {"type": "fp4", "double": True, "compute_dtype": "bfloat16", "skip": ["lm_head", "q_proj"]},
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
                "llm_int8_skip_modules": ["lm_head", "q_proj"],
            },
        ),
        ({"bits": 8}, {"load_in_8bit": True}),
    ],
)
def test_what_transformers_is_told(given: dict[str, Any], said: dict[str, Any]) -> None:
    made = QuantizeSection(**given).as_config()
    assert made == {"quant_method": BITSANDBYTES, **said} | ({} if "load_in_8bit" in said else {
        "bnb_4bit_compute_dtype": said.get("bnb_4bit_compute_dtype", "float32")
    })  # fmt: skip


def test_either_section_names_the_quantisation_of_the_base(tmp_path: Path) -> None:
    own = {"quant_method": "quanto", "weights": "int4"}
    for text, expected in (
        ("quantize: {bits: 8}", {"quant_method": BITSANDBYTES, "load_in_8bit": True}),
        ("quantization_config: {quant_method: quanto, weights: int4}", own),
        ("dtype: float32", None),
    ):
        (tmp_path / "spec.yaml").write_text(f"version: 1\nbase:\n  path: m\n  {text}\n{REST}")
        assert load_spec(tmp_path / "spec.yaml", registry=registry())[0].base_ref.quantization == expected


def test_all_mistakes_come_at_once_each_with_its_place() -> None:
    told = problems(
        "  quantize: {method: bitsandbites, bits: 8, type: nf4, double: true, compute_dtyp: bfloat16}\n"
        "  quantization_config: {quant_method: qanto}\n"
    )
    assert {place: diagnostic.code for place, diagnostic in told.items()} == {
        "$.base.quantize.method": "PC321",
        "$.base.quantize.type": "PC118",
        "$.base.quantize.double": "PC118",
        "$.base.quantize.compute_dtyp": "PC101",
        "$.base.quantization_config": "PC118",
        "$.base.quantization_config.quant_method": "PC321",
    }
    assert "`bitsandbytes`" in told["$.base.quantize.method"].fix
    assert "`quanto`" in told["$.base.quantization_config.quant_method"].fix
    assert "`compute_dtype`" in told["$.base.quantize.compute_dtyp"].fix
    assert (told["$.base.quantize.double"].where.line, told["$.base.quantize.double"].where.column) == (4, 56)


@pytest.mark.parametrize(
    ("base", "place", "code"),
    [
        ("  quantize: {bits: 5}\n", "$.base.quantize.bits", "PC102"),
        ("  quantize: {type: int4}\n", "$.base.quantize.type", "PC102"),
        ("  quantize: {method: quanto}\n", "$.base.quantize.method", "PC321"),
        ("  quantize: {method: 4}\n", "$.base.quantize.method", "PC102"),
        ("  quantize: {bits: 8, compute_dtype: float16}\n", "$.base.quantize.compute_dtype", "PC118"),
        ("  quantization_config: {weights: int8}\n", "$.base.quantization_config", "PC117"),
        ("  quantization_config: {quant_method: bitsandbytes}\n", "$.base.quantization_config", "PC117"),
        (
            "  quantization_config: {load_in_4bit: true, load_in_8bit: true}\n",
            "$.base.quantization_config.load_in_8bit",
            "PC118",
        ),
        (
            "  quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf5}\n",
            "$.base.quantization_config.bnb_4bit_quant_type",
            "PC102",
        ),
        (
            "  quantization_config: {load_in_8bit: true, bnb_4bit_use_double_quant: true}\n",
            "$.base.quantization_config.bnb_4bit_use_double_quant",
            "PC118",
        ),
    ],
)
def test_single_mistakes(base: str, place: str, code: str) -> None:
    assert {where: told.code for where, told in problems(base).items()} == {place: code}


def test_another_library_is_pointed_to_its_own_section() -> None:
    assert "quantization_config" in problems("  quantize: {method: quanto}\n")["$.base.quantize.method"].fix


def test_a_gguf_file_is_not_quantised_anew() -> None:
    text = f"version: 1\nbase:\n  gguf: m.gguf\n  quantize: {{bits: 4}}\n{REST}"
    (told,) = read_spec(parse_yaml(text, "spec.yaml"), registry()).diagnostics
    assert (told.code, told.where.path) == ("PC118", "$.base.quantize")
    with pytest.raises(PeftcError, match="PC118"):
        quantization_of(LocatedBase(BaseRef(gguf="m.gguf", quantization={"load_in_4bit": True}), "x", gguf=Path("m")))


def test_in_python_mistakes_are_errors_too() -> None:
    with pytest.raises(ConfigError, match="PC102"):
        QuantizeSection(bits=3)  # type: ignore[arg-type]


# packages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LIBRARIES)
def test_a_missing_package_is_told_with_the_line_that_installs_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = LIBRARIES[method].modules
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    if not modules:
        assert missing_of(method) is None
        return
    told = problems(f"  quantization_config: {{quant_method: {method}, load_in_8bit: true}}\n")
    found = told["$.base.quantization_config.quant_method"]
    assert found.code == "PC305"
    assert "pip install" in found.fix and all(package in found.fix for package in modules.values())


def test_only_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None if name == BITSANDBYTES else name)
    (place, told), *others = problems("  quantize: {method: bitsandbytes, bits: 8}\n").items()
    assert (place, told.code, others) == ("$.base.quantize.method", "PC305", [])
    assert told.fix == "Install it: `pip install bitsandbytes`."
    assert "$.base.quantize" in problems("  quantize: {bits: 8}\n")
    with pytest.raises(PeftcError, match="PC305"):
        quantization_of(located({"load_in_4bit": True}))


def test_a_module_that_stands_in_for_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_spec(name: str) -> None:
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(quantize, "find_spec", without_spec)
    assert missing_of("torchao") is not None


# a base that has been found -------------------------------------------------------------------------------------------

NF4 = {"quant_method": BITSANDBYTES, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_what_the_files_say_counts_or_what_is_asked() -> None:
    assert quantization_of(located()) is None
    assert quantization_of(located(asked=NF4)) == NF4
    assert quantization_of(located(NF4)) == NF4
    text = LocatedBase(BaseRef(path="m"), "x", config={"text_config": {"quantization_config": NF4}}, source="m")
    assert quantization_of(text) == NF4


def test_nothing_is_quantised_twice() -> None:
    files = {**NF4, "bnb_4bit_compute_dtype": "bfloat16"}
    assert quantization_of(located(files, NF4)) == files
    loading = {"quant_method": "compressed-tensors", "dequantize": True}
    assert quantization_of(located({"quant_method": "compressed-tensors", "config_groups": {}}, loading)) is not None
    for asked in ({**NF4, "bnb_4bit_quant_type": "fp4"}, {"quant_method": "quanto", "weights": "int8"}):
        with pytest.raises(PeftcError, match="already"):
            quantization_of(located(files, asked))


def test_what_is_asked_of_a_base_in_python_is_checked() -> None:
    with pytest.raises(PeftcError, match="PC321"):
        quantization_of(located(asked={"quant_method": "quantos"}))


def test_a_graph_is_kept_for_each_quantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftc.graph.cache._version", lambda name: name)
    keys = {key_of(located()), key_of(located(asked=NF4)), key_of(located(asked={**NF4, "load_in_8bit": True}))}
    assert len(keys) == 3
    monkeypatch.setattr("peftc.graph.cache._version", lambda name: f"{name} 2" if name == BITSANDBYTES else name)
    assert key_of(located(asked=NF4)) not in keys
