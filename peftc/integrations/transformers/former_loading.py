"""Files of former layers through transformers' own loader: keys go to slots of today by the adapter's plan.

transformers renames keys by a list of conversions, gathers the tensors that go into one parameter, and has them converted.
Both conversions here are subclasses of its own which ask the plan instead of patterns. A key of a former layer is first
given a name that no other renaming knows, then its parameter's.

Relies on (transformers 5.23): `WeightTransform.rename_source_key(key) -> (key, pattern)` called for every key, renamings in
their order and then converters; `deepcopy` of a converter for each parameter; `add_tensor(target, source, pattern, future)`;
`materialize_tensors()`; `convert(name, ...)` returning values by name; `was_used()`, after which conversions are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from peftc.checkpoint.former import FormerReader, Joint
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError, Where
from peftc.model.injected import adapted_last, config_given, show
from peftc.runtime.session.session import Session

#: What a key of a former layer is called between the two conversions, with its number.
_TOKEN = "peftc-former-layer-"


@dataclass(eq=False)
class _Pending:
    """One load: the adapter that it is for, and keys of former layers that came by, in their order.

    The model is known once the adapter was put into it, which is before the first key comes.
    """

    config: PeftConfig
    adapter: str
    #: key -> its number, and by number the parameter that it goes into
    keys: dict[str, int] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)

    def token(self, key: str) -> str | None:
        """The name for a key that goes into a joint layer, None for any other."""
        place = next(iter(self._reader.places([key])), None) if self._reader is not None else None
        if place is None or place.site is None:
            return None
        slot = next((slot for slot in place.site.slots if slot.dotted == place.tail), None)
        if slot is None:
            return None
        if key not in self.keys:
            self.keys[key] = len(self.targets)
            self.targets.append(place.site.key(slot, self.adapter).memory())
        return f"{_TOKEN}{self.keys[key]}"

    def target(self, name: str) -> str | None:
        """The parameter that a name of `token` stands for."""
        _, found, number = name.rpartition(_TOKEN)
        return self.targets[int(number)] if found and number.isdigit() else None

    def joint(self, target: str) -> tuple[Joint, str]:
        """What goes into a parameter. Raises `PeftcError`, with the adapter taken off, where the keys do not fit."""
        return self._joints[target]

    @cached_property
    def _session(self) -> Session | None:
        session = adapted_last(self.config)
        return session if session is not None and self.adapter in session.plans else None

    @cached_property
    def _reader(self) -> FormerReader | None:
        session = self._session
        if session is None or not session.graph.former:
            return None
        given = config_given(session, self.adapter)  # which still says ranks by the names of then
        return FormerReader(session.plans[self.adapter], session.graph, given or self.config, Where())

    @cached_property
    def _joints(self) -> Mapping[str, tuple[Joint, str]]:
        assert self._reader is not None and self._session is not None
        former = self._reader.read(dict.fromkeys(self.keys))
        try:
            former.require()
        except PeftcError:
            self._session.remove(self.adapter)
            show(self._session.model, self._session)
            raise
        plan = self._session.plans[self.adapter]
        joints = {}
        for site in plan.maps:
            for slot in site.slots:
                key = site.key(slot, self.adapter)
                if key.disk() in former.joints:
                    joints[key.memory()] = former.joints[key.disk()]
        return joints


class FormerRenaming(WeightRenaming):
    """Gives keys of former layers their names in between. Goes before all others."""

    def __init__(self, pending: _Pending) -> None:
        super().__init__(_TOKEN, _TOKEN)
        self.pending = pending

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The key, renamed if it is one."""
        token = self.pending.token(source_key)
        return (source_key, None) if token is None else (token, _TOKEN)

    def was_used(self) -> bool:
        """Says no: it is of this load, not of the model's checkpoints."""
        return False


class FormerConverter(WeightConverter):
    """Makes one parameter of the tensors of former layers."""

    def __init__(self, pending: _Pending) -> None:
        super().__init__(_TOKEN, _TOKEN, [_Nothing()])
        self.pending = pending
        self.sources: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FormerConverter:
        return FormerConverter(self.pending)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The parameter's name for one of the names in between."""
        target = self.pending.target(source_key)
        return (source_key, None) if target is None else (target, _TOKEN)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Note the tensor of a key."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.sources.append(source_key)

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """The parameter's value by its name. Raises `PeftcError` where the layers cannot be joined."""
        tensors = dict(zip(self.sources, self.materialize_tensors()[_TOKEN], strict=True))
        joint, label = self.pending.joint(layer_name)
        return {layer_name: joint.made(label, tensors)}

    def was_used(self) -> bool:
        """Says no, as the renaming does."""
        return False


class _Nothing(ConversionOps):
    """A converter must have an operation."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """What is given."""
        return input_dict


def former_conversions(adapter: str, config: PeftConfig) -> tuple[FormerRenaming, FormerConverter]:
    """Conversions for an adapter that is put into a model next; of models without former layers they do nothing."""
    pending = _Pending(config, adapter)
    return FormerRenaming(pending), FormerConverter(pending)
