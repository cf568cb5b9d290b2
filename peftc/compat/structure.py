"""Functions of the reference's internals that find their way through a model's modules and names. Nothing here needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from peftc.graph.nodes import suffixes

if TYPE_CHECKING:
    from torch import nn


def _find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The shortest endings that mean all targets and none of the others. Raises `ValueError` on names that are no names, or
    are in both."""
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ValueError("target_modules should not contain an empty string.")
    if both := set(target_modules) & set(other_module_names):
        raise ValueError(f"target_modules and other_module_names contain common elements: {', '.join(sorted(both))}")
    taken = {ending for name in other_module_names for ending in suffixes(name)}
    found: set[str] = set()
    for name in sorted(target_modules, key=lambda name: name.split(".")[::-1]):
        endings = sorted(suffixes(name), key=len)
        if found.isdisjoint(endings):
            found.add(next((ending for ending in endings if ending not in taken), name))
    return found


def _is_key_under_prefixes(key: str, prefixes: Collection[str]) -> bool:
    """Whether the key, or something that it is in, is one of the prefixes; the parts of names are compared whole."""
    return any(path in prefixes for path in accumulate(key.split("."), lambda path, name: f"{path}.{name}"))


def _filter_state_dict_by_key_prefixes(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """Those entries whose keys are under one of the prefixes."""
    return {key: value for key, value in state_dict.items() if _is_key_under_prefixes(key, prefixes)}


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Paths of what adapters have on layers, and beside the model; with a name, of that adapter. Modules that are trained
    whole are not among them."""
    from peftc.runtime.applying.tuner_model import TunerModel
    from peftc.runtime.around.saved_modules import AuxiliaryTrainingWrapper
    from peftc.runtime.layer.wrapper import TunerLayer

    found: set[str] = set()
    whole: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            whole.add(path)
        elif isinstance(module, (TunerLayer, TunerModel)) and not _is_key_under_prefixes(path, whole):
            found.update(f"{path}.{name}".lstrip(".") for name in _own(module, adapter_name))
    return found


def _own(module: nn.Module, adapter_name: str | None) -> Iterator[str]:
    """Names of what is in a wrapper beside that which it wraps."""
    from torch.nn import ModuleDict, ParameterDict

    from peftc.runtime.slots.buffers import BufferDict

    for name in [*module._modules, *module._parameters, *module._buffers]:
        held = getattr(module, name)
        if name in ("base_layer", "model") or held is None:
            continue
        by_adapter = isinstance(held, (ModuleDict, ParameterDict, BufferDict))
        if adapter_name is None or not by_adapter:
            yield name
        elif adapter_name in held:
            yield f"{name}.{adapter_name}"


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Paths of the modules of a transformers model whose weight is that of the input embeddings, as it declares."""
    unwrap = getattr(model, "get_base_model", None)
    base: Any = unwrap() if unwrap is not None else model
    declared = getattr(base, "_tied_weights_keys", None)
    if not declared or getattr(getattr(base, "config", None), "tie_word_embeddings", None) is False:
        return []
    if not isinstance(declared, Mapping):
        return sorted({name.rpartition(".")[0] for name in declared})
    own = set(base.get_input_embeddings().parameters())
    named = [name for name, tensor in base.named_parameters(remove_duplicate=False) if tensor in own]
    real = {name.replace("base_layer.", ""): name for name in named}
    tied = {
        f"{path}.{name}".lstrip("."): f"{path}.{source}".lstrip(".")
        for path, module in base.named_modules()
        for name, source in dict(getattr(module, "_tied_weights_keys", None) or {}).items()
    }
    return sorted({real.get(name, name).rpartition(".")[0] for name, source in tied.items() if source in real})


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Names of classes whose modules are to stay on one device, as the model declares."""
    return set(getattr(model, "_no_split_modules", None) or ())
