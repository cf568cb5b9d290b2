"""Every operation on adapted models in random order, each step compared with the plain model of what should be."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from torch import Tensor, nn

from peftc import rules
from peftc.runtime.layer.wrapper import BaseTunerLayer
from tests.states.given import Given
from tests.states.living import Living
from tests.states.pair import NAMES, same, within
from tests.states.worlds import World


class Machine(Living, Given):
    """All operations, how a model begins and ends, and what holds after each. Subclasses say in which world."""

    # beginning ----------------------------------------------------------------------------------------------------

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.wrap(self.world.build(), data.draw(st.sampled_from(self.world.kinds), "kind"), NAMES[0])

    # endings ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.layered and not self.blocks)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def unload(self, data: st.DataObject, name: str) -> None:
        """The base as it was; then another adapter."""
        base = self.model.unload()
        for own in list(self.plain.adapters):
            self.plain.delete(own)
        self._begin_again(base, self.plain.shown(()), data, name)

    @precondition(lambda self: self.layered and self.plain.adapters and not self.blocks)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def merge_for_good(self, data: st.DataObject, name: str) -> None:
        """The base with adapters folded in, and what they train whole; then another adapter."""
        some = st.lists(st.sampled_from(sorted(self.plain.adapters)), min_size=1, max_size=2, unique=True)
        names = data.draw(st.one_of(st.none(), some), "names")
        wanted = self.plain.active if names is None else names
        must = self.unmergeable(wanted)
        may = [rules.MERGE_ORDER.code] if self.plain.orders else []
        found: list[nn.Module] = []
        if self.attempt(lambda: found.append(self.model.merge_and_unload(adapter_names=names)), must, may):
            self._begin_again(found[0], self.plain.in_effect(wanted, for_good=True), data, name)

    def _begin_again(self, base: nn.Module, wanted: dict[str, Tensor], data: st.DataObject, name: str) -> None:
        kinds = {str(type(module).__name__) for module in base.modules() if isinstance(module, BaseTunerLayer)}
        assert not kinds, f"wrappers are left: {kinds}"
        state = base.state_dict()
        assert state.keys() == wanted.keys()
        for key, tensor in wanted.items():
            self.close(state[key], tensor, f"{key} of the base")
        self.plain = self.plain.again(state)
        self.wrap(base, data.draw(st.sampled_from(self.world.kinds), "kind"), name)

    # what holds after every step ----------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if self.model is None:
            return
        self.count += 1
        type(self).steps += 1
        Machine.steps += 1
        plain = self.plain
        assert list(self.model.peft_config) == list(plain.adapters)
        assert self.model.active_adapters == plain.active
        live = self.live
        assert live.keys() == plain.names(), f"names: {sorted(live.keys() ^ plain.names())[:4]}"
        trainable = {self.plain_name(n) for n, p in self.model.named_parameters() if p.requires_grad}
        wanted = plain.trainable()
        assert trainable == wanted, f"trainable: {sorted(trainable ^ wanted)[:4]}"
        for owner, adapter in plain.adapters.items():
            there = self.aside(owner) if plain.is_aside(owner) else live
            for name, tensor in adapter.tensors.items():
                found = within(there[name], tensor.shape)  # what is beyond is padding
                assert same(found, tensor), f"{name} of {owner} is not what it was"
                assert found.numel() == there[name].numel() or there[name].count_nonzero() == found.count_nonzero()
        for name, tensor in plain.shown(plain.acting).items():
            if name in plain.instead:
                self.close(live[name], plain.weights[name], f"{name}, merged,")
            else:
                assert same(live[name], tensor), f"{name} is not what it was"
        y = self.computed(self.model)
        if not (plain.training and self.is_random(y)):
            self.close(y, plain.output(), "the output")


def played(examples: int, length: int) -> settings:
    """How a machine runs: so many models, each with so many operations, however long it takes."""
    return settings(
        max_examples=examples,
        stateful_step_count=length,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


def machine(world: World) -> type[Machine]:
    """The machine of a world."""
    return type(f"Machine_{world.name.replace('-', '_')}", (Machine,), {"world": world})
