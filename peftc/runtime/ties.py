"""Weights that a base model's config says are one: a merge that makes them two is refused until the config says so.

Whoever saves or loads the merged model goes by the config, keeps one of the two and loses the other, trained one or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.runtime.places import tensor_of
from peftc.runtime.session import Session


def refuse_parting(session: Session, names: Sequence[str] | None) -> None:
    """Raise `PeftcError` if merging these adapters (the active ones) gives values to tied weights that differ.

    Nothing is changed. A model whose config does not tie its embeddings is not looked into: there both are kept.
    """
    names = session.active if names is None else names
    session.require(names)
    if not session.graph.ties or not _says_tied(session.model):
        return
    parted = [group for group in session.graph.ties if _differ([_merged(session, name, names) for name in group])]
    if not parted:
        return
    weights = ", ".join(" and ".join(f"`{name}`" for name in group) for group in parted)
    what = (
        f"The config says that {weights} are one tensor; merged, they differ, and a saved model keeps only one of them"
    )
    fix = "To keep both, set `model.config.tie_word_embeddings = False` before merging; or keep the adapter beside the model."
    raise PeftcError(rules.TIE_BROKEN(what, fix=fix))


def _says_tied(model: nn.Module) -> bool:
    """Whether the config of the model, or of a model inside it, ties its word embeddings."""
    configs = {
        id(config): config for module in model.modules() if (config := module.__dict__.get("config")) is not None
    }
    return any(getattr(config, "tie_word_embeddings", False) for config in configs.values())


def _merged(session: Session, name: str, adapters: Sequence[str]) -> Tensor | None:
    """A parameter of the base model as it will be after merging."""
    for path, copy in session.copies.items():
        if name.startswith(f"{path}."):
            return copy.current.get_parameter(name.removeprefix(f"{path}."))
    path, _, tail = name.rpartition(".")
    layer, module = session.layers.get(path), session.find(path)
    if layer is not None:
        merged = [name for wrapper in layer.chain() for name in wrapper.merged_adapters]
        changed = layer.merged_parameters([name for name in adapters if name not in merged])
        if tail in changed:
            return changed[tail]
    return tensor_of(module, tail) if module is not None else None


def _differ(tensors: Sequence[Tensor | None]) -> bool:
    found = [*{id(tensor): tensor for tensor in tensors if tensor is not None and not tensor.is_meta}.values()]
    return any(not torch.equal(found[0], other) for other in found[1:])
