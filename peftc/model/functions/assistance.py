"""The functions of `peftc.helpers` and `peftc.functional`: small conveniences on adapted models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from types import MethodType
from typing import Any

from torch import nn

from peftc import rules
from peftc.config.files import read_config
from peftc.diagnostics import ConfigError, PeftcError
from peftc.model.injected import adapters_of, unwrapped
from peftc.model.peft_model import PeftModel
from peftc.runtime.journal import whole
from peftc.runtime.layer.wrapper import BaseTunerLayer, TunerLayer
from peftc.runtime.session.beginnings import beginning
from peftc.runtime.session.steps import take
from peftc.runtime.session.succession import delete
from peftc.runtime.session.values import taken, values_given
from peftc.tuner.maps import MapTuner

# training -------------------------------------------------------------------------------------------------------------


def take_step(model: nn.Module, step: int) -> tuple[str, ...]:
    """Let the methods of adapters that train act, as those that allocate ranks do: after the backward of optimiser step
    `step`, counted from 1, and before gradients are zeroed. Returns the adapters that took it.

    Works on a `PeftModel` and on a model adapted in place. Raises `PeftcError`, with the adapters as they were: none takes
    steps, one is merged, or no gradient is there.
    """
    return take(adapters_of(model), step)


# signatures -----------------------------------------------------------------------------------------------------------


def update_forward_signature(model: PeftModel) -> None:
    """Let `model.forward` show the base model's signature and documentation, if its own says nothing."""
    _show_signature_of_base(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """The same for `model.generate`, if the base model can generate."""
    if getattr(model.get_base_model(), "generate", None) is not None:
        _show_signature_of_base(model, "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """`update_forward_signature` (`"forward"`), `update_generate_signature` (`"generate"`), or both (`"all"`).

    Raises `ConfigError` for another word.
    """
    if method not in ("forward", "generate", "all"):
        what = f"`method` cannot be `{method}`"
        raise ConfigError(rules.BAD_VALUE(what, fix='Use `"forward"`, `"generate"` or `"all"`.'))
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show_signature_of_base(model: PeftModel, name: str) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(getattr(model, name)).parameters.values()}
    if not kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return
    own: Callable[..., Any] = getattr(type(model), name)
    base: Any = getattr(type(model.get_base_model()), name)

    def called(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    called.__name__, called.__doc__, called.__annotations__ = base.__name__, base.__doc__, base.__annotations__
    called.__signature__ = inspect.signature(base)  # type: ignore[attr-defined]  # functions may have one
    model.__dict__[name] = MethodType(called, model)


# questions and contexts -----------------------------------------------------------------------------------------------


def check_if_peft_model(model_name_or_path: str | PathLike[str]) -> bool:
    """Whether a folder or a repository of the hub holds an adapter whose config can be read."""
    try:
        read_config(model_name_or_path)
    except PeftcError:
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block the scaling of every adapter is multiplied; afterwards it is what it was.

    Raises `ConfigError` if `multiplier` is no number or if no adapter of the model has a scaling.
    """
    if not isinstance(multiplier, (float, int)) or isinstance(multiplier, bool):
        what = f"`multiplier` is a {type(multiplier).__name__}, not a number"
        raise ConfigError(rules.BAD_VALUE(what, fix="Use a number, such as 0.5."))
    layers = [layer for layer in model.modules() if isinstance(layer, TunerLayer) and _has_scaling(layer)]
    if not layers:
        what = "No adapter of this model has a scaling"
        raise ConfigError(
            rules.NOT_ADAPTED(what, fix="Use it on a model with adapters whose method scales its update.")
        )
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: scale * multiplier for name, scale in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            now, layer.scaling = layer.scaling, scaling
            for name in [name for name in scaling if name not in now]:  # deleted in the block
                del scaling[name]
            scaling.update({name: scale for name, scale in now.items() if name not in scaling})


def _has_scaling(layer: TunerLayer) -> bool:
    return any(type(layer.part(name).tuner).scaling is not MapTuner.scaling for name in layer.adapters)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block layers say that inputs are not to be cast to the dtype of their adapters' tensors.

    Libraries that store layers in a narrow format use it, and cast around every layer by hooks. An adapter's tensors are
    no layers here, so no hook casts them; its input goes on being cast to what they are, and the output is right.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, TunerLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@contextmanager
def row_values(model: nn.Module, **values: Any) -> Iterator[None]:
    """Within the block calls of a model that was adapted in place, or of any of its parts, have these values for the rows
    of their batch, such as `task_ids=[0, 2]`. Calls of a `PeftModel` can take them as keywords.

    Raises `PeftcError` for values that no adapter of the model reads, or that do not fit.
    """
    session = adapters_of(model)
    given = dict(values)
    found = taken(session, given)
    if given:
        what = f"No adapter of the model reads `{next(iter(given))}`"
        raise PeftcError(rules.ROW_VALUES(what, fix="Leave it out."))
    with values_given(session, found, (), {}) as gates, beginning(session, gates, found):
        yield


# adapters of any model ------------------------------------------------------------------------------------------------


@whole
def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Activate an adapter, or several in order, on a `PeftModel` or a model adapted in place.

    `layer_cls` is accepted and not needed. Raises `PeftcError` for a name that is not there.
    """
    model = unwrapped(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if isinstance(model, PeftModel):
        model.set_adapter(names, inference_mode)
    else:
        adapters_of(model).set_active(names, trainable=not inference_mode)


@whole
def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter's tensors; returns the adapters that are active then, None if there are none. If nothing is active
    any more, another adapter takes over, with a warning, and trains if the one that was active did.

    The model's `peft_config` keeps its entry if the model was adapted in place: its owner takes it out. `prefix` and
    `layer_cls` are accepted and not needed. Raises `PeftcError`: no such adapter, or merged.
    """
    model = unwrapped(model)
    session = adapters_of(model)
    if isinstance(model, PeftModel):
        model.delete_adapter(adapter_name)
    else:
        delete(session, [adapter_name])
    return list(session.active) or None


@whole
def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters' trainable tensors require gradients, or not, whichever are active.

    Raises `PeftcError` for a name that is not there.
    """
    model = unwrapped(model)
    session = adapters_of(model)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    session.require(names)
    for name in names:
        session.set_requires_grad(name, requires_grad)
        if isinstance(model, PeftModel) and model.prompt_encoder is not None:
            model._encoders()[name].set_trainable(requires_grad)
