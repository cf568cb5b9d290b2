"""In which dtype a base is held: the same answer for the graph and for the loaded model, so that plan and model agree."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from peftc import rules
from peftc.diagnostics import PeftcError, did_you_mean
from peftc.graph.locate import LocatedBase
from peftc.host.loading import kept_in_float32

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def dtype_of(base: LocatedBase, config: PretrainedConfig) -> torch.dtype:
    """The dtype asked for, else the config's, else float32. Raises `PeftcError` on a name that is none."""
    name = base.ref.dtype
    if name is None or name == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) and base.gguf is None else torch.float32
    found = _DTYPES.get(name.removeprefix("torch."))
    if found is None:
        fix = did_you_mean(name, _DTYPES) or f"Known are {', '.join(_DTYPES)}."
        raise PeftcError(rules.BAD_VALUE(f"`{name}` is not a dtype that a base can be held in", fix=fix, where="dtype"))
    return found


def keep_some_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters of a meta model that loading keeps in float32 that dtype.

    Some architectures name modules that lose too much in half precision; transformers applies this only when it loads
    weights, not when it builds from a config.
    """
    pattern = kept_in_float32(model, dtype)
    if pattern is None:
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and pattern.search(name):
            tensor.data = tensor.data.to(torch.float32)
