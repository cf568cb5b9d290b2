"""Slots that others take for modules: hooked, wrapped, sharded or computed from other tensors, they are called.

A slot's module holds a tensor, and reading that is all that is done while it is plain. Whoever hangs something on it, wraps it
or puts another forward in its place is to be part of every call. Whether one did is looked at in each call, at the cost of a few
look-ups in dictionaries that torch changes in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host import parallel
from peftc.host.torch_modules import all_hooks, forward_hooks
from peftc.registry.boundary import is_out_of_memory
from peftc.runtime.call import Shared
from peftc.runtime.layer.bound import Watched, bound, can_bind
from peftc.runtime.layer.dropouts import found
from peftc.runtime.layer.gated import gated, is_gated
from peftc.runtime.layer.parts import Part, Path, Under
from peftc.runtime.layer.paths import compose
from peftc.runtime.layer.rows import by_rows
from peftc.runtime.layer.stored import stored_factors
from peftc.runtime.slots.containers import SlotModule, holder_of
from peftc.runtime.slots.filling import torch_dtype
from peftc.tuner.slots import Container, Slot


def _watched(layer: nn.Module, parts: Iterable[Part]) -> tuple[Watched, ...]:
    """The modules of these adapters' slots on a layer."""
    entries = []
    for part in parts:
        for slot in part.slots.values():
            if slot.container is Container.MODULE:
                container = layer._modules[slot.name]
                assert container is not None
                entries.append(_watch(container._modules, part.view.adapter))
        dropout = found(layer, part.view.adapter)
        if dropout is not None:
            entries.append(_watch({"": dropout}, ""))
    return tuple({id(entry[2]): entry for entry in entries}.values())


def _tables(layer: nn.Module, parts: Iterable[Part]) -> list[nn.Module]:
    """What holds the tensors of these adapters' slots that have no module of their own. DeepSpeed gives it another dictionary,
    and FSDP hangs its hooks on it, though nobody calls it."""
    slots = [(slot, part.view.adapter) for part in parts for slot in part.slots.values() if not slot.derived]
    tables = [holder_of(layer, slot, name) for slot, name in slots if slot.container is Container.PARAMETER]
    return list({id(table): table for table in tables}.values())


def _watch(modules: dict[str, Any], name: str) -> Watched:
    module = modules[name]
    return modules, name, module, module.__dict__


def noticing(
    layer: nn.Module, shared: Shared, under: Under, pending: Sequence[Part], rows: Mapping[str, Part] | None
) -> Path:
    """A layer's forward with the pending adapters in effect, and with those of rows where calls may name them: by reading
    slots while their modules are plain, else by calling these."""
    own = _noticing(layer, shared, under, pending, None)
    if rows is None:
        return own
    named = _noticing(layer, shared, under, pending, rows)

    def by_rows(*args: Any, **kwargs: Any) -> Tensor:
        call = shared.call
        return (own if call is None or not call.adapters else named)(*args, **kwargs)

    return by_rows


def _noticing(
    layer: nn.Module, shared: Shared, under: Under, pending: Sequence[Part], rows: Mapping[str, Part] | None
) -> Path:
    plain = _composed(shared, under, pending, rows)
    parts = {part.view.adapter: part for part in (*pending, *(rows or {}).values())}.values()
    modules, tables = _watched(layer, parts), _tables(layer, parts)
    if not modules and not tables:
        return plain
    wrapped = any(name and not isinstance(module, SlotModule) for _, name, module, _ in modules)
    hookable = (*(own[2] for own in modules), *tables)
    hooks = tuple(hooks for module in hookable for hooks in all_hooks(module))
    running = tuple(hooks for module in hookable for hooks in forward_hooks(module))
    watched = (*modules, *((table.__dict__, "_parameters", table._parameters, {}) for table in tables))
    change = calling if rows is None and not is_gated(shared, pending) else reading

    def called() -> Path:
        own = None if rows is None else {name: reading(layer, part) for name, part in rows.items()}
        now = (own or {}).get
        return _composed(shared, under, [now(p.view.adapter) or change(layer, p) for p in pending], own)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if wrapped or any(hooks if torch.is_grad_enabled() else running):
            return called()(*args, **kwargs)
        for home, name, own, state in watched:
            if home.get(name) is not own or "forward" in state:
                return called()(*args, **kwargs)
        return plain(*args, **kwargs)

    vars(run)["plain"] = plain
    if rows is not None or wrapped or is_gated(shared, pending) or not can_bind(under, pending):
        return run
    return bound(run, under, pending[0], watched, hookable)


def _composed(shared: Shared, under: Under, pending: Sequence[Part], rows: Mapping[str, Part] | None) -> Path:
    path = compose(under, pending)
    if is_gated(shared, pending):
        path = gated(path, shared, under, pending)
    return path if rows is None else by_rows(path, shared, under, rows)


# calling --------------------------------------------------------------------------------------------------------------


def reading(layer: nn.Module, part: Part) -> Part:
    """The adapter with its tensors as the slots' modules give them now, each module called once."""
    return replace(part.over(dict(_read(layer, part))), dropout=found(layer, part.view.adapter))


def _read(layer: nn.Module, part: Part) -> Iterator[tuple[str, Tensor]]:
    given: dict[int, dict[str, Tensor]] = {}
    for label, slot in part.slots.items():
        if slot.container is not Container.MODULE:
            table: Any = holder_of(layer, slot, part.view.adapter)
            tensor = part.view[label] if slot.derived else parallel.of_call(table[part.view.adapter])
            yield label, part.view[label] if tensor.is_meta else tensor
            continue
        module = _module(layer, slot, part.view.adapter)
        if id(module) not in given:
            tensors, tails = _given(module, label), _holder(module).tails
            given[id(module)] = dict(zip(tails, (tensors,) if isinstance(tensors, Tensor) else tensors, strict=True))
        yield label, given[id(module)][slot.tail]


def _given(module: nn.Module, label: str) -> Any:
    """What a slot's module gives where it is called without an input. Hooks that need one raise."""
    try:
        return module()
    except PeftcError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        what = f"The module of `{label}` was called for its tensors, without an input, and what hangs on it raised {error!r}"
        fix = "Take the hook off, or hang it on the layer: the method does not multiply an input by these tensors as they are."
        raise PeftcError(rules.SLOT_CALLED(what, fix=fix)) from error


def calling(layer: nn.Module, part: Part) -> Part:
    """The adapter with its modules called: with the layer's input and what the first makes of it, where two of them are the
    factors of a thin update as they stand; else for their tensors."""
    factors = _factors(part)
    if factors is None:
        return reading(layer, part)
    first, second = (_module(layer, part.slots[label], part.view.adapter) for label in factors[:2])
    return replace(part, modules=(first, second), scale=factors[2], dropout=found(layer, part.view.adapter))


def _factors(part: Part) -> tuple[str, str, float] | None:
    """The slots that are the factors of the method's thin update, untouched, if they are modules; and its scale."""
    if "thin" not in part.tuner.lowerings or part.view.layer.experts:
        return None
    slots = part.slots
    probes = {
        label: torch.zeros(slot.shape, dtype=torch_dtype(slot.dtype or "float32")) for label, slot in slots.items()
    }
    with torch.no_grad():
        found = stored_factors(part, part.view.over(probes))
    if found is None:
        return None
    are_modules = all(slots[label].container is Container.MODULE for label in (found.first, found.second))
    return (found.first, found.second, found.scale) if are_modules else None


def _module(layer: nn.Module, slot: Slot, adapter: str) -> nn.Module:
    """What stands in the place of a slot's module now: it, or a wrapper round it."""
    container = layer._modules[slot.name]
    module = None if container is None else container._modules[adapter]
    assert module is not None
    return module


def _holder(module: nn.Module) -> SlotModule:
    return next(part for part in module.modules() if isinstance(part, SlotModule))
