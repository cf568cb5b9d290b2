"""Quantised bases: planned as transformers' quantiser makes them, and loaded with the options that a spec gives.

What cannot be had here is refused before any weight is read, in the quantiser's own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from peftc import rules
from peftc.config.quantize import LIBRARIES, METHOD, method_of
from peftc.diagnostics import PeftcError, Where, did_you_mean
from peftc.graph.locate import LocatedBase
from peftc.graph.quantised import packed_config, quantization_of
from peftc.host.quantisers import Build, config_of, is_known, quantised
from peftc.integrations.transformers.architecture import FAILURES, told
from peftc.registry.boundary import is_out_of_memory


def quantised_meta_model(
    base: LocatedBase, options: Mapping[str, Any], dtype: torch.dtype, build: Build
) -> PreTrainedModel:
    """The model without storage, with the layers of the quantiser. Raises `PeftcError` if that cannot be had here."""
    _require_known(base, options)
    try:
        return quantised(options, packed_config(base) is not None, dtype, build)
    except PeftcError:
        raise
    except FAILURES as error:  # `NotImplementedError` is among them, as a `RuntimeError`
        if is_out_of_memory(error):
            raise
        raise _refused(base, options, error) from error


def loading_options(base: LocatedBase, device: torch.device | str) -> dict[str, Any]:
    """Options of `from_pretrained` for a base that is or is to be quantised; none for others. Raises `PeftcError`."""
    options = quantization_of(base)
    if options is None:
        return {}
    _require_known(base, options)
    placed: dict[str, Any] = {"device_map": {"": device}}  # left out, some libraries take the accelerator
    asked = base.ref.quantization
    if asked is None or (packed_config(base) is not None and not LIBRARIES[str(method_of(asked))].loads_with):
        return placed
    try:
        return {**placed, "quantization_config": config_of({METHOD: method_of(asked), **asked})}
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise _refused(base, asked, error) from error


def _require_known(base: LocatedBase, options: Mapping[str, Any]) -> None:
    """Raise `PeftcError` for a library that transformers does not know: it would load packed numbers as if they were weights."""
    method = str(method_of(options))
    if not is_known(method):
        fix = did_you_mean(method, LIBRARIES) or "Update transformers, or register the quantiser with it."
        what = f"transformers has no quantisation `{method[:60]}`"
        raise PeftcError(rules.QUANTIZER_UNKNOWN(what, fix=fix, where=Where(file=base.ref.name)))


def _refused(base: LocatedBase, options: Mapping[str, Any], error: Exception) -> PeftcError:
    where, method = Where(file=base.ref.name), method_of(options)
    if isinstance(error, ImportError):
        return PeftcError(rules.DEPENDENCY_MISSING(told(error), fix="Install what the message names.", where=where))
    fix = "Change the options of the quantisation, or load the model on a machine that has what the message names."
    return PeftcError(rules.QUANTIZER_REFUSES(f"`{method}` cannot pack this base: {told(error)}", fix=fix, where=where))
