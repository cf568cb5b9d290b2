"""From a model and a config to an adapted model: wrapped in a `PeftModel`, or adapted in place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.former import former_ranks, with_ranks
from peftc.config.base import PeftConfig
from peftc.config.files import config_from_dict
from peftc.diagnostics import PeftcError, warn
from peftc.model.injected import followed, note_adapted, show, unwrapped
from peftc.model.mixed import PeftMixedModel
from peftc.model.parts.adapted import DEFAULT
from peftc.model.peft_model import PeftModel
from peftc.model.tasks import task_model_class
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import apply_plan, let_go, session_of
from peftc.runtime.applying.handed import with_handed
from peftc.runtime.applying.planning import hollow, paths_in, plan_for, targeted
from peftc.runtime.collector import collector_paused
from peftc.runtime.journal import keep, keep_entry, whole
from peftc.runtime.session.succession import make_room
from peftc.tuner.method import TunerMethod


@whole
@collector_paused()
def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A `PeftModel` round the model, its adapter fresh, active and trainable; if `mixed`, one that others of any method
    can join. Raises `PeftcError`, model unchanged."""
    keep(peft_config)
    _name_base(peft_config, model)
    if revision is not None:
        _name_revision(peft_config, revision)
    if isinstance(model, nn.Module):  # anything else is refused below
        followed(model)
    cls = PeftMixedModel if mixed else task_model_class(peft_config)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _name_base(config: PeftConfig, model: nn.Module) -> None:
    """A config that was used before names another base model, and would be saved so."""
    old, new = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if not isinstance(new, str) or not new or old == new:
        return
    if old is not None:
        what = f"The base model of the config was renamed from '{old}' to '{new}', which it is put on"
        warn([rules.BASE_RENAMED(what, fix="Check that this is the model you mean.")])
    config.base_model_name_or_path = new


def _name_revision(config: PeftConfig, revision: str) -> None:
    """The revision of the base model that is given here takes the place of the config's, which it may contradict."""
    if config.revision not in (None, revision):
        already = f"peft config has already set base model revision to {config.revision}"
        what = f"{already}, overwriting with revision {revision}"
        warn([rules.BASE_RENAMED(what, fix="Give one revision, that of the weights which the model has.")])
    config.revision = revision


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that a dictionary of options describes; `peft_type` decides the class. Raises `ConfigError`."""
    return config_from_dict(config_dict, lenient=False)[0]


@whole
@collector_paused()
def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = DEFAULT,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt the model in place and return it; it stays of its own class. For methods on layers.

    The new adapter is the active one of its method, in the dtype of its layers; what was trainable before stays so. The
    model shows its configs as `peft_config`. With `low_cpu_mem_usage` its tensors are on the meta device until
    `set_peft_model_state_dict` gives them values. Such an adapter, and a frozen one, is taken for one that is loaded next: how
    it would start is not judged. With `state_dict` the modules that its keys name are adapted, whatever
    the config says; values are not used.

    An adapter of that name makes room for the new one, with a warning. Into a `PeftModel` the adapter is put as one of its own.

    Raises `PeftcError`, with the model unchanged.
    """
    method = default_registry().method_of(peft_config)
    if method.is_prompt:
        what = "A prompt adapts the call, which a model without wrapper does not let through"
        raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Use `get_peft_model`."))
    if method.call_tuner is not None:
        what = f"{method.peft_type} acts around calls, which a model without wrapper does not let through"
        raise PeftcError(rules.CALL_AROUND(what, fix="Use `get_peft_model`."))
    given_model = model
    owner = _owner(model, method) if isinstance(model, nn.Module) else None
    if owner is not None:
        model = owner.get_base_model()
    elif isinstance(model, nn.Module):  # anything else is refused below
        given_model = model = unwrapped(model)
        let_go(model)
        followed(model)
    asked, as_given = peft_config, peft_config.model_copy()
    given = None if state_dict is None else paths_in(state_dict, method.prefix)
    if given is not None:
        peft_config = targeted(peft_config, given)
    loading = low_cpu_mem_usage or peft_config.inference_mode
    planned = partial(plan_for, model, autocast_adapter_dtype=False, loading=loading, task_heads=False, mixed=True)
    plan = planned({adapter_name: peft_config}, given=given)
    ranks = former_ranks(plan, asked) if loading else {}
    if ranks:
        plan = planned({adapter_name: with_ranks(plan.adapters[0].config, ranks)}, given=given)
    plan = with_handed(plan, model, {adapter_name: asked})
    sources = {adapter_name: hollow(plan.adapters[0])} if low_cpu_mem_usage else {}
    make_room(session_of(model), adapter_name)
    session = apply_plan(model, plan, sources=sources, mixed=True)
    session.bring_in(adapter_name, trainable=not plan.adapters[0].config.inference_mode)
    if owner is None:
        show(model, session)
    else:
        keep_entry(owner.peft_config, adapter_name)
        owner.peft_config[adapter_name] = plan.adapters[0].config
    note_adapted(asked, as_given, model, adapter_name)
    return given_model


def _owner(model: nn.Module, method: TunerMethod) -> PeftModel | None:
    """The `PeftModel` that is meant, if it can hold adapters of the method: such a one is put into the model inside of it."""
    model = unwrapped(model)
    if not isinstance(model, PeftModel) or model.prompt_encoder is not None or not model.peft_config:
        return None
    return model if model.mixes or model.peft_type == method.peft_type else None
