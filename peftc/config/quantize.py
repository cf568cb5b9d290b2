"""How a base is to be quantised when it is loaded: the section `base.quantize`, and transformers' own `quantization_config`.

Decides what may be said, and what transformers is told. Which packages a library takes is known here as data, so that one
that is missing is told before anything is loaded; nothing of them is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from peftc import rules
from peftc.config.base import ConfigModel
from peftc.config.problems import Problem, as_custom_error, shorten
from peftc.diagnostics import Diagnostic, did_you_mean

#: Transformers' key for the library, in a `quantization_config`.
METHOD = "quant_method"
BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True, slots=True)
class Library:
    """A library that transformers quantises with: the modules to be found, each with what installs it."""

    #: module to look for -> what `pip install` takes
    modules: Mapping[str, str]
    #: whether a model that it has quantised already may be given options of loading beside its own
    loads_with: bool = False


def _library(*, loads_with: bool = False, **modules: str) -> Library:
    return Library({name.replace("__", "."): package for name, package in modules.items()}, loads_with)


#: `quant_method` -> what it needs; the names are transformers'.
LIBRARIES: Mapping[str, Library] = {
    BITSANDBYTES: _library(bitsandbytes="bitsandbytes", accelerate="accelerate"),
    "torchao": _library(torchao="torchao"),
    "quanto": _library(optimum__quanto="optimum-quanto", accelerate="accelerate"),
    "hqq": _library(hqq="hqq"),
    "gptq": _library(gptqmodel="gptqmodel", optimum="optimum", loads_with=True),
    "awq": _library(gptqmodel="gptqmodel", accelerate="accelerate", loads_with=True),
    "auto-round": _library(auto_round="auto-round", loads_with=True),
    "compressed-tensors": _library(compressed_tensors="compressed-tensors", loads_with=True),
    "fp8": _library(accelerate="accelerate", loads_with=True),
    "mxfp8": _library(accelerate="accelerate", loads_with=True),
    "fbgemm_fp8": _library(accelerate="accelerate", loads_with=True),
    "mxfp4": _library(accelerate="accelerate", loads_with=True),
    "nvfp4": _library(accelerate="accelerate"),
    "aqlm": _library(aqlm="aqlm[gpu,cpu]", accelerate="accelerate"),
    "eetq": _library(kernels="kernels", accelerate="accelerate"),
    "higgs": _library(flute="flute-kernel", accelerate="accelerate"),
    "vptq": _library(vptq="vptq", accelerate="accelerate"),
    "spqr": _library(spqr_quant="spqr_quant[gpu]", accelerate="accelerate"),
    "bitnet": _library(accelerate="accelerate"),
    "quark": _library(quark="amd-quark"),
    "fp_quant": _library(fp_quant="fp-quant"),
    "sinq": _library(sinq="sinq"),
    "fouroversix": _library(fouroversix="fouroversix"),
    "metal": _library(kernels="kernels", loads_with=True),
    "gemma": _library(),
}


def _known_method(value: Any) -> Any:
    """Only bitsandbytes has a section of its own; the other libraries' options are too different from each other."""
    if value == BITSANDBYTES or not isinstance(value, str):
        return value
    if value in LIBRARIES:
        fix = f"Write `base: {{quantization_config: {{{METHOD}: {value}, …}}}}`, with the options that transformers has for it."
        why = f"`quantize` is short for {BITSANDBYTES}; other libraries have options of their own."
    else:
        close = did_you_mean(value, [BITSANDBYTES, *LIBRARIES])
        fix, why = close or f"Use `{BITSANDBYTES}`, or `quantization_config` for another library.", None
    raise as_custom_error(rules.QUANTIZER_UNKNOWN(f"`quantize` has no method `{value[:60]}`", fix=fix, why=why))


class QuantizeSection(ConfigModel):
    """How bitsandbytes is to quantise the base while it is loaded, as QLoRA does."""

    model_config = ConfigDict(title="quantize")

    method: Annotated[Literal["bitsandbytes"], BeforeValidator(_known_method)] = "bitsandbytes"
    """The library. Others are named by `quantization_config`, as transformers has it."""
    bits: Literal[4, 8] = 4
    """Bits of a stored number."""
    type: Literal["nf4", "fp4"] | None = None
    """The four-bit numbers: `nf4`, which is taken if it is left out, lie as normally distributed weights do."""
    double: bool | None = None
    """Quantise the scales of four-bit blocks too, which saves about 0.4 bits a number."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What four-bit layers compute in; left out, float32."""
    skip: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Modules that stay as they are; left out, the output embedding."""

    def as_config(self) -> dict[str, Any]:
        """The same as transformers says it."""
        said: dict[str, Any] = {METHOD: BITSANDBYTES, f"load_in_{self.bits}bit": True}
        if self.bits == 4:
            said["bnb_4bit_quant_type"] = self.type or "nf4"
            said["bnb_4bit_use_double_quant"] = bool(self.double)
            said["bnb_4bit_compute_dtype"] = self.compute_dtype or "float32"
        if self.skip is not None:
            said["llm_int8_skip_modules"] = list(self.skip)
        return said


# What is wrong, on plain data -----------------------------------------------------------------------------------------

#: Options that only four-bit layers have.
_OF_FOUR_BITS = ("type", "double", "compute_dtype")


def contradictions_of_base(base: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with how a base is to be quantised, between keys and in transformers' own words, by place in `base`."""
    section, config = base.get("quantize"), base.get("quantization_config")
    if section is not None and config is not None:
        what = "`quantize` and `quantization_config` both say how to quantise the base"
        yield Problem(("quantization_config",), rules.CONTRADICTION(what, fix="Keep one of them."), on_key=True)
    for name in (name for name in ("quantize", "quantization_config") if base.get(name) is not None):
        packed = next((key for key in ("gguf", "distribution") if base.get(key) is not None), None)
        if packed is not None:
            what = f"`{name}` cannot be had with `{packed}`: a GGUF file is quantised as it is, and unpacked when it is loaded"
            fix = f"Name a folder or a repository with the model's weights, or remove `{name}`."
            yield Problem((name,), rules.CONTRADICTION(what, fix=fix), on_key=True)
    if isinstance(section, Mapping) and section.get("bits") == 8:
        for key in _OF_FOUR_BITS:
            if section.get(key) is not None:
                what = f"`{key}` is for four bits, and `bits` is 8"
                told = rules.CONTRADICTION(what, fix=f"Remove `{key}`, or set `bits: 4`.")
                yield Problem(("quantize", key), told, on_key=True)
    if isinstance(config, Mapping):
        yield from (
            Problem(("quantization_config", *problem.location), problem.diagnostic, problem.on_key)
            for problem in problems_of_config(config)
        )


def method_of(config: Mapping[str, Any]) -> Any:
    """The library of a `quantization_config`. Old files of bitsandbytes do not name it."""
    old = config.get("load_in_8bit") or config.get("load_in_4bit")
    return config.get(METHOD, BITSANDBYTES if old else None)


def problems_of_config(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with a `quantization_config`, but for the options of single libraries, which are transformers' business."""
    method = method_of(config)
    if method is None:
        fix = f"Add it, one of {', '.join(LIBRARIES)}."
        yield Problem((), rules.MISSING_KEY(f"`{METHOD}` is missing", fix=fix))
    elif not isinstance(method, str) or method not in LIBRARIES:
        fix = did_you_mean(str(method), LIBRARIES) or f"There are {', '.join(LIBRARIES)}."
        yield Problem((METHOD,), rules.QUANTIZER_UNKNOWN(f"No quantisation is called `{str(method)[:60]}`", fix=fix))
    elif method == BITSANDBYTES:
        yield from _of_bitsandbytes(config)


def _of_bitsandbytes(config: Mapping[str, Any]) -> Iterator[Problem]:
    four, eight = (config.get(f"load_in_{bits}bit") is True for bits in (4, 8))
    if four and eight:
        what = "`load_in_4bit` and `load_in_8bit` cannot both be"
        yield Problem(("load_in_8bit",), rules.CONTRADICTION(what, fix="Keep one of them."), on_key=True)
    elif not four and not eight:
        what = "Neither `load_in_4bit` nor `load_in_8bit` is true"
        yield Problem((), rules.MISSING_KEY(what, fix="Add `load_in_4bit: true` or `load_in_8bit: true`."))
    kind = config.get("bnb_4bit_quant_type")
    if kind is not None and kind not in ("nf4", "fp4"):
        fix = did_you_mean(str(kind), ("nf4", "fp4")) or "Use `nf4` or `fp4`."
        what = f"`bnb_4bit_quant_type` cannot be `{shorten(kind)}`"
        yield Problem(("bnb_4bit_quant_type",), rules.BAD_VALUE(what, fix=fix))
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
        if eight and not four and config.get(key):
            what = f"`{key}` is for four bits, and the base is loaded in eight"
            yield Problem((key,), rules.CONTRADICTION(what, fix=f"Remove `{key}`."), on_key=True)


def missing_packages(base: Mapping[str, Any]) -> Iterator[Problem]:
    """Packages that the quantisation of a `base` section takes and that are not installed, by place there."""
    section, config = base.get("quantize"), base.get("quantization_config")
    if isinstance(section, Mapping) and section.get("method", BITSANDBYTES) == BITSANDBYTES:
        told = missing_of(BITSANDBYTES)
        if told is not None:
            yield Problem(("quantize", "method") if "method" in section else ("quantize",), told)
    if isinstance(config, Mapping) and isinstance(method_of(config), str):
        told = missing_of(method_of(config))
        at = ("quantization_config", METHOD) if METHOD in config else ("quantization_config",)
        if told is not None:
            yield Problem(at, told)


def missing_of(method: str) -> Diagnostic | None:
    """That packages of a library are not installed, with the line that installs them; None if all are there."""
    library = LIBRARIES.get(method)
    absent = [] if library is None else [package for name, package in library.modules.items() if not _is_there(name)]
    if not absent:
        return None
    named = " and ".join(f"`{package}`" for package in absent)
    what = f"A base quantised by `{method}` needs the package{'s' if len(absent) > 1 else ''} {named}"
    line = " ".join(f"'{package}'" if "[" in package else package for package in absent)
    return rules.DEPENDENCY_MISSING(what, fix=f"Install it: `pip install {line}`.")


def _is_there(module: str) -> bool:
    """Whether a module can be found. One inside a package without code of its own is looked for there."""
    try:
        outer = module.rpartition(".")[0]
        return (not outer or find_spec(outer) is not None) and find_spec(module) is not None
    except (ImportError, ValueError):  # a stand-in in `sys.modules` has no spec
        return False
