"""From a model and a config to an adapted model: wrapped in a `PeftModel`, or adapted in place."""

from __future__ import annotations

from torch import nn

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError, warn
from peftc.model.loading import plan_for
from peftc.model.peft_model import DEFAULT, PeftModel
from peftc.model.tasks import task_model_class
from peftc.registry.manager import default_registry
from peftc.runtime.apply import apply_plan
from peftc.runtime.collector import collector_paused


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
    """A `PeftModel` round the model, its adapter fresh, active and trainable. Raises `PeftcError`, model unchanged."""
    _name_base(peft_config, model)
    if revision is not None:
        peft_config.revision = revision
    cls = task_model_class(peft_config)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _name_base(config: PeftConfig, model: nn.Module) -> None:
    """A config that was used before names another base model, and would be saved so."""
    old, new = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if not isinstance(new, str) or not new or old == new:
        return
    if old is not None:
        what = f"The config named `{old}` as its base model; it is put on `{new}` now and will name that"
        warn([rules.BASE_RENAMED(what, fix="Check that this is the model you mean.")])
    config.base_model_name_or_path = new


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = DEFAULT, low_cpu_mem_usage: bool = False
) -> nn.Module:
    """Adapt the model in place and return it; it stays of its own class. For methods on layers."""
    registry = default_registry()
    if registry.method_of(peft_config).is_prompt:
        what = "A prompt adapts the call, which a model without wrapper does not let through"
        raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Use `get_peft_model`."))
    session = apply_plan(model, plan_for(model, {adapter_name: peft_config}, task_heads=False))
    model.__dict__["peft_config"] = {name: p.config for name, p in session.plans.items()}
    return model
