"""Which adapters of a `PeftModel` act: activated, switched off for a while, deleted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.model.parts.prompts import PromptsMixin
from peftc.runtime.journal import keep_entries, whole
from peftc.runtime.session.session import Session
from peftc.runtime.session.succession import delete
from peftc.runtime.session.switched import disabled


class ActivationMixin(PromptsMixin):
    """The part of a `PeftModel` that is about what acts."""

    peft_config: dict[str, PeftConfig]

    @property
    def active_adapters(self) -> list[str]:
        session: Session | None = self.__dict__.get("_session")
        names = () if session is None else session.active
        return [name for name in names if session is not None and not session.is_weighed(name)]

    @property
    def active_adapter(self) -> str:
        active = self.active_adapters
        return active[0] if active else ""

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first active adapter. Raises `PeftcError` if there is none."""
        active = self.active_adapters
        if not active:
            fix = "Activate one with `set_adapter`."
            raise PeftcError(rules.NOT_ADAPTED("No adapter is active", fix=fix, also=AttributeError))
        return self.peft_config[active[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts."""
        session: Session | None = self.__dict__.get("_session")
        return session is not None and session.enabled and bool(session.active)

    @whole
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or several in order; exactly their tensors become trainable."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self.prompt_encoder is not None:
            self._refuse_several(names)
        self.session.set_active(names, trainable=not inference_mode)
        for name, encoder in self._encoders().items():
            encoder.set_trainable(name in names and not inference_mode)

    @whole
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the trainable tensors of adapters require gradients, or not, active or not."""
        session, names = self.session, [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        session.require(names)
        for name in names:
            session.set_requires_grad(name, requires_grad)
            if name in self._encoders():
                self._encoders()[name].set_trainable(requires_grad)

    @whole
    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several, and their tensors. If nothing is active any more, another adapter takes over, with a
        warning, and trains if the one that was active did. Raises `PeftcError`, with nothing changed."""
        session, names = self.session, [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        encoders = self._encoders()
        acted = [encoder for name, encoder in encoders.items() if name in names and name in session.active]
        trained = any(parameter.requires_grad for encoder in acted for parameter in encoder.parameters())
        delete(session, names, trained)
        self._forget(names)
        if acted and session.active:
            for name, encoder in self._encoders().items():
                encoder.set_trainable(trained and name in session.active)

    def _forget(self, names: Sequence[str]) -> None:
        """Let adapters go that the session has no more."""
        keep_entries(self.peft_config)
        for name in names:
            if self.prompt_encoder is not None:
                keep_entries(self.prompt_encoder._modules)
                self.prompt_encoder._modules.pop(name, None)
            self.peft_config.pop(name, None)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as its base does, merged or not; afterwards it is in the state that it was in.
        Trainability is not touched."""
        with disabled(self.session):
            yield
