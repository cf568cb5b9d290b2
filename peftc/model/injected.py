"""Models that were adapted in place: whose adapters they have, and what other libraries did to them meanwhile.

Their `peft_config` is a plain attribute that others edit: they take names out of it, delete it, and unwrap layers
themselves. What it says counts, and the session follows it before anything else is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.host import parallel
from peftc.model.peft_model import PeftModel
from peftc.runtime.applying.apply import SESSION, session_of
from peftc.runtime.journal import keep, keep_entries, whole
from peftc.runtime.session.session import Session
from peftc.runtime.session.succession import delete

ATTRIBUTE = "peft_config"


@dataclass(frozen=True, slots=True)
class _Adapted:
    """A model, and the config and name of the adapter that was put into it. Neither model nor config is kept alive by this;
    `given` is a copy of the config as it was handed over, before it was filled in."""

    config: ReferenceType[PeftConfig]
    given: PeftConfig
    model: ReferenceType[nn.Module]
    adapter: str


#: The last one. Loaders that put an adapter into a model before they load it know its config as it was given, or only that.
_last: ContextVar[_Adapted | None] = ContextVar("last", default=None)


def note_adapted(config: PeftConfig, given: PeftConfig, model: nn.Module, adapter: str) -> None:
    """Remember that an adapter was put into a model by this config; `given` is a copy of it from before."""
    _last.set(_Adapted(ref(config), given, ref(model), adapter))


def adapted_last(config: PeftConfig) -> Session | None:
    """The adapters of the model that this very config was used on last; None if another came after it."""
    last = _last.get()
    model = last.model() if last is not None and last.config() is config else None
    return None if model is None else session_of(model)


def config_given(session: Session, adapter: str) -> PeftConfig | None:
    """The config by which an adapter was put into its model, as it was given; None if another came after it."""
    last = _last.get()
    known = last is not None and last.model() is session.model and last.adapter == adapter
    return last.given if last is not None and known else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that `torch.compile`, FSDP or DDP wraps, or the model itself."""
    return parallel.unwrapped(model)


def adapters_of(model: nn.Module) -> Session:
    """The session of a `PeftModel`, of the model in one, or of a model adapted in place.

    Raises `PeftcError` if the model has no adapter.
    """
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        return model.session
    session = followed(model)
    if session is None:
        what = f"This {type(model).__name__} has no adapter"
        raise PeftcError(rules.NOT_ADAPTED(what, fix="Use `inject_adapter_in_model` or `get_peft_model` first."))
    return session


@whole
def followed(model: nn.Module) -> Session | None:
    """The session of a model after `peft_config` was followed; None if no adapter is left."""
    session = session_of(model)
    if session is None or session.shown is None:
        return session
    shown: Any = model.__dict__.get(ATTRIBUTE)
    names = set(shown) if isinstance(shown, Mapping) else set()
    gone = [name for name in session.plans if name not in names]
    in_place = any(_in_place(model, path, layer) for path, layer in session.layers.items())
    if gone and in_place:
        delete(session, gone)
    if session.plans and (in_place or not gone):
        _notice(session)
        return session
    if in_place:
        session.prune()
    keep(model)
    model.__dict__.pop(SESSION, None)
    return None


def _notice(session: Session) -> None:
    """Take over what layers were told one by one: which adapters are active, and whether they act."""
    layers = [layer for layer in session.wrappers() if layer.adapters]
    keep(session, session.shared)
    session.active = tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    session.enabled = not layers or not all(layer.disable_adapters for layer in layers)


def show(model: nn.Module, session: Session) -> None:
    """Let the model's `peft_config` be what is applied; the same dictionary as before, if there was one."""
    keep(model, session)
    if session.shown is None:
        session.shown = {}
    keep_entries(session.shown)
    configs: dict[str, PeftConfig] = session.shown
    configs |= {name: plan.config for name, plan in session.plans.items()}
    for name in [name for name in configs if name not in session.plans]:
        del configs[name]
    model.__dict__[ATTRIBUTE] = configs


def _in_place(model: nn.Module, path: str, layer: nn.Module) -> bool:
    """Whether the wrapper is still in the model, perhaps under others."""
    with suppress(AttributeError):
        return any(module is layer for module in model.get_submodule(path).modules())
    return False
