"""Whether the config of a model whose layers are replicated describes it: whoever loads the merged model has only that.

What a layer is, or what it scales by, may go by its index in ways that no option has an entry for: another layer would be
there after loading, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from peftc import rules
from peftc.diagnostics import Diagnostic, Severity
from peftc.graph.replication import REPLICATION_OPTION
from peftc.runtime.session.session import Session

#: What simple attributes of modules are of.
_SIMPLE = (bool, int, float, str)
#: Attributes that say what a module is doing, and not what it is.
_STATES = frozenset(["training", "gradient_checkpointing"])


def undescribed(session: Session, severity: Severity) -> Iterator[Diagnostic]:
    """What of the replicated layers would be another after saving and loading, if anything; models without a config that
    builds them are not looked into."""
    replication = session.graph.replication
    if session.stack is None or replication is None:
        return
    from peftc.host.architectures import as_configured  # here: it takes long, and few models have replicas

    path, difference = replication.stack, ""
    try:
        made = as_configured(session.model)
    except ValueError as error:
        difference = f"nothing can be made of it ({error})"
    else:
        if made is None:
            return
        inside = (node.path for node in session.graph.nodes if node.path.startswith(f"{replication.stack}."))
        found = ((path, _difference(session.find(path), _at(made, path))) for path in inside)
        path, difference = next(((path, told) for path, told in found if told), (path, ""))
    if difference:
        what = f"The config does not describe `{path}` as it is here: {difference}"
        why = "Merged, saved and loaded again, the model would be another."
        fix = f"Keep the adapter beside its base, or choose another `{REPLICATION_OPTION}`."
        yield rules.NO_REPLICATION(what, why=why, fix=fix, where=path, severity=severity)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    return module


def _difference(now: nn.Module | None, then: nn.Module | None) -> str:
    """How a module differs from the one that the config makes; nothing if it does not."""
    if now is None or type(now) is not type(then):
        return f"a {type(now).__name__}, and not a {type(then).__name__}"
    shapes = [
        {name: tuple(p.shape) for name, p in m.named_parameters(recurse=False)} for m in (now, then) if m is not None
    ]
    if shapes[0] != shapes[1]:
        return "its tensors have other shapes"
    own, other = _simple(now), _simple(then)
    name = next((name for name, value in own.items() if name in other and other[name] != value), "")
    return name and f"`{name}` is {own[name]}, and not {other[name]}"


def _simple(module: nn.Module | None) -> dict[str, Any]:
    """What a module goes by beside its tensors, as far as it is in simple attributes of its own."""
    kept = {} if module is None else vars(module)
    return {n: v for n, v in kept.items() if isinstance(v, _SIMPLE) and not n.startswith("_") and n not in _STATES}
