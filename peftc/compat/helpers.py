"""Small functions of the reference's internals that other libraries call. Nothing in peftc needs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from peftc.compiler.match import Deadline, Layers, PatternKeys, is_all_linear, matches
from peftc.compiler.passes.draft import option
from peftc.compiler.passes.select import wanted_layers
from peftc.config.base import PeftConfig
from peftc.config.mixins import LayersMixin
from peftc.diagnostics import warn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from peftc.runtime.layer.wrapper import TunerLayer


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Parent, module and last name of a path. Raises `AttributeError` if there is no such module."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Path of the input embeddings, or the default."""
    get = getattr(model, "get_input_embeddings", None)
    embeddings = get() if get is not None else None
    found = (name for name, module in model.named_modules() if module is embeddings)
    return next(found, default)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Stop gradients of every parameter that has the adapter's name as a part of its own."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad_(False)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """Rows of a batch, from ids `(rows, tokens)` or embeddings `(rows, tokens, hidden)`. Raises `ValueError` without."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise ValueError("Give either `input_ids` or `inputs_embeds`")
    return given.shape[0]


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path is the target or ends in it at a dot."""
    return f".{key}".endswith(f".{target_key}")


def match_target_against_key(target_pattern: str, key: str) -> bool:
    """Whether a regular expression over the full path matches. Raises `PeftcError` on a bad one."""
    return matches(target_pattern, key)


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether a config's options mean the module of that path. Raises `PeftcError` on a bad pattern.

    The reference returns a match or an object that is false instead; who asks for the truth gets the same.
    """
    excluded, targets = option(config, "exclude_modules"), option(config, "target_modules")
    whole = option(config, "modules_to_save") or ()
    parents = ["", *accumulate(key.split("."), lambda path, name: f"{path}.{name}")]
    if (excluded and matches(excluded, key)) or any(matches(whole, parent) for parent in parents):
        return False
    if targets is None or not matches(targets, key):
        return False
    if isinstance(targets, str) or key in targets or not isinstance(config, LayersMixin):
        return True
    wanted = wanted_layers(config)
    patterns = config.layers_pattern or ()
    named = [patterns] if isinstance(patterns, str) else patterns
    return not wanted or Layers(named, Deadline(), "layers_pattern").index(key) in wanted


def _maybe_include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """Write the paths of the layers that are meant by `all-linear` in its place."""
    from peftc.runtime.applying.planning import plan_for  # below the torch line

    if is_all_linear(option(peft_config, "target_modules")):
        plan = plan_for(model, {"default": peft_config}, task_heads=False, loading=True, mixed=True)
        peft_config.target_modules = {site.path for site in plan.adapters[0].maps if not site.inside}
    return peft_config


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first pattern key that matches the end of a path, or the path. Raises `PeftcError` on a bad pattern."""
    return PatternKeys(list(pattern_keys), Deadline(), "$").find(key_to_match) or key_to_match


def str_to_bool(value: str) -> int:
    """1 for yes, y, true, t, on, 1; 0 for their opposites, in any case. Raises `ValueError` on another word."""
    if re.fullmatch(r"y|yes|t|true|on|1", value, re.IGNORECASE):
        return 1
    if re.fullmatch(r"n|no|f|false|off|0", value, re.IGNORECASE):
        return 0
    raise ValueError(f"`{value}` is neither yes nor no")


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The matrix transposed if it is stored as (in, out); a parameter stays one."""
    from torch import nn

    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tensors that share a storage have in common: device, address and size in bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def check_adapters_to_merge(module: TunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """Those of the adapters, or of the active ones, that are not merged yet; warns if some are."""
    from peftc.runtime.session.together import merged_already

    if isinstance(adapter_names, str):
        raise TypeError(f"`adapter_names` is a list of names, not `{adapter_names}`")
    wanted = module.active_adapters if adapter_names is None else adapter_names
    again = [name for name in wanted if name in module.merged_adapters]
    if again:
        warn([merged_already(again, wanted, "unmerge")])
    return [name for name in wanted if name not in again]
