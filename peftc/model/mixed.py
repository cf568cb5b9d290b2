"""`PeftMixedModel`: adapters of several methods on one model, and several of them active at once.

Each method wraps what is there already, so adapters act in the order in which their methods came to a layer. Any method
that acts on single layers can be mixed; each adapter is saved and loaded as it would be alone.
"""

from __future__ import annotations

from torch import nn

from peftc import rules
from peftc.compiler.compile import cannot_mix
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import hold
from peftc.runtime.applying.tuner_model import MixedModel
from peftc.runtime.session.session import Session


class PeftMixedModel(PeftModel):
    """A base model with adapters of any methods that act on layers. Made by `get_peft_model(..., mixed=True)`."""

    mixes = True

    def _level(self, plan: InjectionPlan, session: Session) -> nn.Module:
        problems = [cannot_mix(adapter.peft_type) for adapter in plan.adapters if not adapter.nests]
        if problems:
            raise PeftcError(problems)
        return MixedModel.around(session, self.peft_config)

    def _refuse_type(self, config: PeftConfig) -> None:
        """Any type may come: which cannot be mixed is said when it is compiled."""
        default_registry().method_of(config)
        hold(self.get_base_model(), self.session)

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]  # as in the reference
        """Names of the active adapters."""
        return self.active_adapters

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Nothing is left to do: modules that a config names are copied when its adapter is added.

        Raises `PeftcError` if there is no such adapter, or if the config names other modules than its own.
        """
        self.session.require([adapter_name])
        own = getattr(self.peft_config[adapter_name], "modules_to_save", None) or ()
        more = [name for name in getattr(peft_config, "modules_to_save", None) or () if name not in own]
        if more:
            what = f"`{adapter_name}` was added without `modules_to_save` {', '.join(f'`{name}`' for name in more)}"
            fix = "Name them in the config before the adapter is added."
            raise PeftcError(rules.OPTION_NOT_AVAILABLE(what, fix=fix))
