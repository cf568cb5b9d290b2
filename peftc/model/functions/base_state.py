"""The base model's own tensors, by the names that it has without adapters: out of an adapted model, and into one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.keys import listed
from peftc.diagnostics import Diagnostic, PeftcError, did_you_mean
from peftc.model.functions.state import LoadResult
from peftc.model.injected import adapters_of, unwrapped
from peftc.model.peft_model import PeftModel
from peftc.runtime.around.saved_modules import ModulesToSaveWrapper
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.switched import disabled


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state dict as it would be without adapters: its own keys, its own tensors, not copied.

    Works on a `PeftModel` and on a model adapted in place. While adapters are merged, weights contain them. Raises
    `PeftcError` if the model has no adapter.
    """
    base = _base_of(model)
    with disabled(adapters_of(model)) if _rebases(model) else nullcontext():
        named = ((_own_name(base, key), tensor) for key, tensor in base.state_dict().items())
        return {name: tensor for name, tensor in named if name is not None}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load tensors into the base model under an adapted one, by the base model's own keys; adapters are left alone.

    Returns missing and unexpected keys, of which there are none with `strict`. Raises `PeftcError`, with nothing changed:
    no adapter, keys that do not fit with `strict`, tensors of another shape, merged adapters.
    """
    base, session = _base_of(model), adapters_of(model)
    for adapter in session.merged:
        session.refuse_merged(adapter)
    live = base.state_dict()
    key_of = {name: key for key in live if (name := _own_name(base, key)) is not None}
    missing = [name for name in key_of if name not in state_dict]
    unexpected = [name for name in state_dict if name not in key_of]
    misfits = [
        f"`{name}` is {tuple(tensor.shape)}, in the model {tuple(live[key_of[name]].shape)}"
        for name, tensor in state_dict.items()
        if name in key_of and isinstance(tensor, Tensor) and live[key_of[name]].shape != tensor.shape
    ]
    problems = [*_unfit(missing, unexpected)] if strict else []
    if misfits:
        what = f"{len(misfits)} tensors have another shape: {'; '.join(misfits[:3])}"
        problems.append(rules.BASE_STATE(what, fix="Load weights of the same architecture and size."))
    if problems:
        raise PeftcError(problems)
    with torch.no_grad(), disabled(session) if _rebases(model) else nullcontext():
        base.load_state_dict({key_of[n]: t for n, t in state_dict.items() if n in key_of}, strict=False)
    return LoadResult(missing, unexpected)


def _rebases(model: nn.Module) -> bool:
    """Whether weights of adapters may be in place of the base's own, which are not merged."""
    session = adapters_of(model)
    return session.shared.rebases and not session.merged


def _unfit(missing: list[str], unexpected: list[str]) -> list[Diagnostic]:
    fix = "Load a whole state dict of the base model, or pass `strict=False`."
    problems = []
    if missing:
        problems.append(
            rules.BASE_STATE(f"Missing key(s) in state_dict, {len(missing)} tensors: {listed(missing)}", fix=fix)
        )
    if unexpected:
        hint = did_you_mean(unexpected[0], missing)
        what = f"Unexpected key(s) in state_dict, {len(unexpected)} tensors without a place: {listed(unexpected)}"
        problems.append(rules.BASE_STATE(what, fix=f"{hint} {fix}".strip()))
    return problems


def _base_of(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    adapters_of(model)  # which says so if there is none
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _own_name(base: nn.Module, key: str) -> str | None:
    """What a key of the adapted model is called without adapters; None if it belongs to one."""
    parts: list[str] = []
    module: nn.Module | None = base
    for part in key.split("."):
        inside = {TunerLayer: "base_layer", ModulesToSaveWrapper: "original_module"}
        hidden = next((name for cls, name in inside.items() if isinstance(module, cls)), None)
        if hidden is not None and part != hidden:
            return None
        if hidden is None:
            parts.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join(parts)
