"""Which optional packages are there, asked without importing them wherever that is enough."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from packaging.version import Version

_GPTQMODEL = Version("7.0.0")
_OPTIMUM = Version("1.24.0")
_TORCHAO = Version("0.16.0")


def _there(package: str) -> bool:
    return find_spec(package) is not None


def _require(package: str, least: Version) -> bool:
    """Whether a package is installed. Raises `ImportError` if it is too old."""
    if not _there(package):
        return False
    try:
        found = Version(version(package))
    except PackageNotFoundError:
        return False
    if found < least:
        raise ImportError(f"`{package}` {found} is installed; {least} or newer is needed")
    return True


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _there("bitsandbytes")


@cache
def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed and has 4-bit layers."""
    if not is_bnb_available():
        return False
    import bitsandbytes  # type: ignore[import-not-found]

    return getattr(bitsandbytes.nn, "Linear4bit", None) is not None


def is_gptqmodel_available() -> bool:
    """Whether gptqmodel is installed. Raises `ImportError` if it, or the optimum that it needs, is too old."""
    if not _require("gptqmodel", _GPTQMODEL):
        return False
    if not _require("optimum", _OPTIMUM):
        raise ImportError(f"`gptqmodel` needs `optimum` {_OPTIMUM} or newer")
    return True


def is_optimum_available() -> bool:
    """Whether optimum is installed."""
    return _there("optimum")


def is_aqlm_available() -> bool:
    """Whether aqlm is installed."""
    return _there("aqlm")


def is_eetq_available() -> bool:
    """Whether eetq is installed."""
    return _there("eetq")


def is_hqq_available() -> bool:
    """Whether hqq is installed."""
    return _there("hqq")


def is_inc_available() -> bool:
    """Whether Intel's neural compressor is installed."""
    return _there("neural_compressor")


def is_torchao_available() -> bool:
    """Whether torchao is installed. Raises `ImportError` if it is too old."""
    return _require("torchao", _TORCHAO)


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _there("diffusers")


def is_te_available() -> bool:
    """Whether Transformer Engine is installed."""
    return _there("transformer_engine")


def is_te_pytorch_available() -> bool:
    """Whether Transformer Engine is installed with its part for torch."""
    return is_te_available() and _there("transformer_engine.pytorch")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is installed and, if that is to be checked, has a device."""
    if not _there("torch_xla"):
        return False
    if check_device:
        import torch_xla.core.xla_model as xm  # type: ignore[import-not-found]

        try:
            xm.xla_device()
        except RuntimeError:
            return False
    return True


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch finds an Intel GPU; torch always looks for the device itself."""
    return torch.xpu.is_available()
