"""Training beyond the optimiser: methods that act after each step, and terms that they add to the loss.

Who trains calls `take` after backward and before gradients are zeroed. The method says what is to change; it is done and
recorded here, for all adapters or for none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError, warn
from peftc.ops.combine import padded
from peftc.registry.boundary import boundary
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_trained, keep_values, note, whole
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.session.step_state import StepState
from peftc.runtime.slots.views import LayerView
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot, labelled
from peftc.tuner.steps import Changes

#: Optimiser steps without a step of the method, after which it is told: one may be a trial.
_PATIENCE = 2


def stepping(session: Session) -> list[str]:
    """Adapters that train and whose methods act after each step."""
    return [n for n in session.active if "on_step" in session.seams.get(n, ()) and n in session.requiring]


def schedule_problems(session: Session, steps: int) -> Iterator[Diagnostic]:
    """What the methods of adapters that train say of a training of so many optimiser steps."""
    for name in stepping(session):
        for tuner, _ in _by_tuner(session, name):
            with boundary(session.plans[name].peft_type, "schedule"):
                yield from tuner.schedule(session.plans[name].config, steps)


@whole
def take(session: Session, step: int) -> tuple[str, ...]:
    """Let the methods of adapters that train act, after the backward of optimiser step `step`, counted from 1, and before
    gradients are zeroed. Returns the adapters.

    Raises `PeftcError`, with the adapters as they were: none takes steps, one is merged, or no gradient is there.
    """
    names = stepping(session)
    if not names:
        what = "No adapter that trains has a method that acts after steps"
        raise PeftcError(rules.NO_STEPS(what, fix="Leave the call out, or activate such an adapter to train it."))
    for name in names:
        session.refuse_merged(name)
        if not any(p.grad is not None for layer in session.layers_of(name) for _, p in layer.parameters_of(name)):
            what = f"No tensor of `{name}` has a gradient at step {step}"
            fix = "Call it after `backward()` and before `zero_grad()`."
            raise PeftcError(rules.STEP_WITHOUT_GRADIENTS(what, fix=fix))
    with torch.no_grad():
        for name in names:
            state = _state_of(session, name)
            for tuner, layers in _by_tuner(session, name):
                with boundary(session.plans[name].peft_type, "on_step"):
                    changes = tuner.on_step(session.plans[name].config, step, _views(layers, name), state.values)
                _require_valid(changes, tuner, layers, session.plans[name].peft_type, name)
                _carry_out(session, name, changes, layers)
            state.last = step
    return tuple(names)


def _by_tuner(session: Session, name: str) -> list[tuple[MapTuner[Any], dict[str, TunerLayer]]]:
    """The adapter's layers by path, those of one mathematics together."""
    found: dict[int, tuple[MapTuner[Any], dict[str, TunerLayer]]] = {}
    for layer in session.layers_of(name):
        tuner = layer.part(name).tuner
        found.setdefault(id(tuner), (tuner, {}))[1][layer.site(name).path] = layer
    return list(found.values())


def _views(layers: Mapping[str, TunerLayer], name: str) -> dict[str, LayerView]:
    return {path: layer.part(name).view for path, layer in layers.items()}


# changes --------------------------------------------------------------------------------------------------------------


def _require_valid(
    changes: Changes, tuner: MapTuner[Any], layers: Mapping[str, TunerLayer], peft_type: str, name: str
) -> None:
    """Raise `PeftcError` for changes that the method may not ask for."""
    slots = {(path, label): slot for path, layer in layers.items() for label, slot in _slots(layer, name).items()}
    wrong = [f"there is no slot {place}" for place in {*changes.masks, *changes.trainable} - slots.keys()]
    for place, mask in changes.masks.items():
        if place in slots and (mask.dtype is not torch.bool or tuple(mask.shape) != slots[place].shape):
            wrong.append(f"the mask of {place} is {tuple(mask.shape)} {mask.dtype}, the slot {slots[place].shape}")
    frozen = [place for place, on in changes.trainable.items() if on and place in slots and not slots[place].trainable]
    wrong += [f"{place} is declared as frozen" for place in frozen]
    wrong += [f"`{option}` is not among its `step_options`" for option in changes.options.keys() - tuner.step_options]
    if wrong:
        fix = "Correct the plugin's `on_step`."
        raise PeftcError(rules.PLUGIN_INVALID(f"Changes that {peft_type} asks for: {'; '.join(wrong)}", fix=fix))


def _carry_out(session: Session, name: str, changes: Changes, layers: Mapping[str, TunerLayer]) -> None:
    for (path, slot), mask in changes.masks.items():
        tensor, blocks = _tensor(layers[path], name, slot), _slots(layers[path], name)[slot].blocks
        keep_values(tensor)
        tensor.masked_fill_(padded(~mask, tensor.shape, blocks), 0)
    for (path, slot), trains in changes.trainable.items():
        hold(layers[path], name, slot, not trains)
    patch(session, name, changes.options)


def _state_of(session: Session, name: str) -> StepState:
    """What steps left behind for an adapter, to be changed."""
    keep_entry(session.steps, name)
    state = session.steps.setdefault(name, StepState())
    keep(state)
    keep_entries(state.values)
    return state


def hold(layer: TunerLayer, name: str, slot: str, held: bool) -> None:
    """Stop a slot from training, until it is let go."""
    keep_entry(layer.held, name)
    own = layer.held.setdefault(name, set())
    keep_entries(own)
    (own.add if held else own.discard)(slot)
    keep_trained(_tensor(layer, name, slot), not held)


def patch(session: Session, name: str, options: Mapping[str, Any]) -> None:
    """Change options of an adapter, on every layer. Raises `PeftcError` if a value is wrong."""
    if not options:
        return
    plan = session.plans[name]
    plan.config.model_copy(update=dict(options)).revalidated()
    configs = {id(config): config for config in (plan.config, *(site.config for site in plan.sites))}
    for config in configs.values():
        for option, value in options.items():
            note(setattr, config, option, getattr(config, option))
            setattr(config, option, value)
    state = _state_of(session, name)
    state.options = {**state.options, **options}


def _tensor(layer: TunerLayer, name: str, label: str) -> Tensor:
    container, key = layer.where(name, _slots(layer, name)[label])
    tensor: Tensor = container[key]
    return tensor


def _slots(layer: TunerLayer, name: str) -> dict[str, Slot]:
    return labelled(layer.site(name).slots)


# calls ----------------------------------------------------------------------------------------------------------------


def finished(session: Session | None, outputs: Any) -> Any:
    """A call's outputs in training, its loss with what methods add to it. Warns, once, of an adapter that trains and whose
    method is not told of any step."""
    for name in () if session is None else session.active:
        assert session is not None
        seams = session.seams.get(name, ())
        if not seams or name not in session.requiring:
            continue
        if "on_step" in seams and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _watch(session, name)
        own = getattr(outputs, "loss", None)
        if "loss" in seams and isinstance(own, Tensor):
            for tuner, layers in _by_tuner(session, name):
                with boundary(session.plans[name].peft_type, "loss"):
                    more = tuner.loss(session.plans[name].config, _views(layers, name), outputs)
                if more is not None:
                    outputs.loss = own = own + more.to(own.device, own.dtype)
    return outputs


def added(session: Session, names: Iterable[str]) -> Tensor | float:
    """What methods of adapters would add to a loss that nobody has computed yet, after a call in training."""
    total: Tensor | float = 0.0
    for name in names:
        for tuner, layers in _by_tuner(session, name) if name in session.plans else ():
            if "loss" in tuner.seams:
                with boundary(session.plans[name].peft_type, "loss"):
                    more = tuner.loss(session.plans[name].config, _views(layers, name), None)
                total = total if more is None else total + more
    return total


def _watch(session: Session, name: str) -> None:
    """Tell whether an optimiser trains the adapter though no step is taken."""
    state = session.steps.setdefault(name, StepState())
    if state.last is not None or state.untold > _PATIENCE:
        return
    layer = next(session.layers_of(name), None)
    trained = () if layer is None else (p for _, p in layer.parameters_of(name) if p.requires_grad)
    tensor = next(iter(trained), None)
    state.untold += tensor is not None and _has_trained(tensor, state.since)
    state.since = _total()
    if state.untold >= _PATIENCE:
        state.untold = _PATIENCE + 1
        what = f"`{name}` ({session.plans[name].peft_type}) trains, but no step was told to it"
        fix = (
            "Call `peftc.helpers.take_step(model, step)` after each `backward()`, or give transformers' `Trainer` the \
callback `peftc.integrations.transformers.steps.AdapterSteps`."
        )
        warn([rules.STEPS_MISSED(what, fix=fix)])


#: how many steps each optimiser has taken since the first adapter was watched
_TAKEN: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


@cache
def _count_steps() -> None:
    """From the first watched forward on, have torch tell of every optimiser's steps: fused ones leave no other trace."""

    def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _TAKEN[optimizer] = _TAKEN.get(optimizer, 0) + 1

    register_optimizer_step_post_hook(count)


def _total() -> int:
    _count_steps()
    return sum(_TAKEN.values())


def _has_trained(tensor: Tensor, since: int | None) -> bool:
    """Whether there was a step since then, and the tensor is an optimiser's that took one."""
    if since is None or _total() == since:
        return False
    groups = (group for optimizer in _TAKEN for group in optimizer.param_groups)
    return any(tensor is p for group in groups for p in group["params"])


# checkpoints of a training --------------------------------------------------------------------------------------------


def step_states(session: Session) -> dict[str, Any]:
    """What steps left behind, by adapter: plain data and tensors."""
    found: dict[str, Any] = {}
    for name, state in session.steps.items():
        held = {site.site(name).path: sorted(site.held[name]) for site in session.layers_of(name) if name in site.held}
        found[name] = {"last": state.last, "values": state.values, "options": state.options, "held": held}
    return found


@whole
def restore_step_states(session: Session, stored: Mapping[str, Any]) -> None:
    """Go on from there. Raises `PeftcError` if an adapter is not there or an option has a wrong value."""
    session.require(stored)
    for name, content in stored.items():
        keep_entry(session.steps, name)
        session.steps[name] = StepState(content["last"], dict(content["values"]))
        patch(session, name, content["options"])
        for layer in session.layers_of(name):
            for slot in content["held"].get(layer.site(name).path, ()):
                hold(layer, name, slot, True)
