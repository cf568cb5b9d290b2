"""What is done to adapters where they are: added, activated, switched off, merged, trained, copied, cast."""

from __future__ import annotations

import copy
import pickle

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor, nn

from peftc import PeftcError, rules
from peftc.helpers import rescale_adapter_scale
from peftc.testing.models import seeded
from tests.states.alone import BASE, Adapter, output_of, set_scale
from tests.states.pair import CLASH, NAMES, Pair, within
from tests.states.worlds import DTYPE


class Living(Pair):
    """Operations without a file."""

    # adapters -----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def add(self, data: st.DataObject, name: str) -> None:
        kind = data.draw(st.sampled_from(self.world.kinds), "kind")
        beside = list(self.plain.adapters.values())
        new = Adapter(self.world, name, kind.config())
        must = self.cannot_join(new, beside)
        must += [rules.ADAPTER_EXISTS.code] if name in self.plain.adapters else []
        with seeded(self.count):
            if self.attempt(lambda: self.model.add_adapter(name, kind.config()), must):
                self.plain.add(self.adopted(name, self.model.peft_config[name]))

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), frozen=st.booleans())
    def activate(self, names: list[str], frozen: bool) -> None:
        unknown = [name for name in names if name not in self.plain.adapters]
        must = [rules.ADAPTER_UNKNOWN.code] if unknown else []
        must += [rules.ONE_PROMPT.code] if len(names) > 1 and not self.layered else []
        must += [CLASH] if not unknown and self.is_clash(names) else []
        if self.attempt(lambda: self.model.set_adapter(names, inference_mode=frozen), must):
            self.plain.activate(names, not frozen)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        must = [] if name in self.plain.adapters else [rules.ADAPTER_UNKNOWN.code]
        if name in self.plain.merged_names:
            must = [rules.WHILE_MERGED.code]
        if self.attempt(lambda: self.model.delete_adapter(name), must):
            self.plain.delete_and_succeed(name)

    @rule(name=st.sampled_from(NAMES), requires=st.booleans())
    def require(self, name: str, requires: bool) -> None:
        must = [] if name in self.plain.adapters else [rules.ADAPTER_UNKNOWN.code]
        if self.attempt(lambda: self.model.set_requires_grad(name, requires), must):
            self.plain.adapters[name].requires = requires

    @precondition(lambda self: self.layered and self.plain.adapters)
    @rule(data=st.data(), scale=st.sampled_from([0.5, 1.0, 2.0]))
    def scale(self, data: st.DataObject, scale: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.plain.adapters)), "adapter")
        if self.world.mixed and name in self.plain.merged_names:
            return  # which scale it is merged with depends on what is merged below it later
        set_scale(self.model, name, scale)
        self.plain.adapters[name].scale = scale

    # acting -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.blocks) < 2)
    @rule()
    def begin_block(self) -> None:
        block = self.model.disable_adapter()
        self.blocks.append((block, self.plain.enabled))
        block.__enter__()
        self.plain.enabled = False

    @precondition(lambda self: self.blocks)
    @rule()
    def end_block(self) -> None:
        block, before = self.blocks.pop()
        block.__exit__(None, None, None)
        self.plain.enabled = before

    @precondition(lambda self: self.layered and not self.blocks)
    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        base = self.model.base_model
        base.enable_adapter_layers() if enabled else base.disable_adapter_layers()
        self.plain.enabled = enabled

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)
        self.plain.training = training

    @precondition(lambda self: self.plain.adapters)
    @rule(data=st.data())
    def rows(self, data: st.DataObject) -> None:
        names = [BASE, *sorted(self.plain.adapters)]
        count = len(next(iter(self.world.arguments.values())))
        rows = data.draw(st.lists(st.sampled_from(names), min_size=count, max_size=count), "rows")
        concerned = [self.plain.adapters[name] for name in rows if name != BASE]
        bare = set(rows) == {BASE}
        must = [rules.WHILE_MERGED.code] if self.plain.merged_names and not bare else []
        if any(not a.plan.nests for a in concerned):
            must.append(rules.CALL_NOT_POSSIBLE.code)
        if any(
            a.biases and not bare and (set(rows) != {n} or n not in self.plain.active)
            for n, a in self.plain.adapters.items()
        ):
            must.append(rules.CALL_NOT_POSSIBLE.code)
        if any(a.plan.modules for n, a in self.plain.adapters.items() if n in self.plain.active):
            must.append(rules.CALL_NOT_POSSIBLE.code)
        found: list[Tensor] = []
        random = self.plain.training and self.plain.adapters and self.is_random(self.computed(self.model))
        if self.attempt(lambda: found.append(self.computed(self.model, adapter_names=rows)), must) and not random:
            wanted = self.plain.rows(rows if self.plain.enabled else [BASE] * count)
            self.close(found[0], wanted, "the output by rows")

    @precondition(lambda self: self.layered)
    @rule(factor=st.sampled_from([0.5, 3.0]))
    def rescaled(self, factor: float) -> None:
        before = {name: adapter.scale for name, adapter in self.plain.adapters.items()}
        try:
            with rescale_adapter_scale(self.model, factor):
                for adapter in self.plain.adapters.values():
                    adapter.scale *= factor
                y = self.computed(self.model)
                if not (self.plain.training and self.is_random(y)):
                    self.close(y, self.plain.output(), "the output rescaled")
        except PeftcError as error:
            assert error.diagnostics[0].code == rules.NOT_ADAPTED.code
        for name, scale in before.items():
            self.plain.adapters[name].scale = scale

    # merging ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.layered and self.plain.adapters)
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: st.DataObject, safe: bool) -> None:
        some = st.lists(st.sampled_from(sorted(self.plain.adapters)), min_size=1, max_size=2, unique=True)
        names = data.draw(st.one_of(st.none(), some), "names")
        wanted = self.plain.active if names is None else names
        may = [rules.MERGE_ORDER.code] if self.plain.orders else []
        if self.attempt(lambda: self.model.merge_adapter(names, safe_merge=safe), self.unmergeable(wanted), may):
            self.plain.merge(wanted)

    @precondition(lambda self: self.layered)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.plain.unmerge()

    # training -----------------------------------------------------------------------------------------------------

    @rule()
    def step(self) -> None:
        """A step of training: gradients reach exactly what they should, and nothing else changes."""
        self.model.zero_grad(set_to_none=True)
        y = output_of(self.world, self.model, self.plain.dtype)
        grown = self.plain.grown()
        # it may require gradients that then reach nothing: of parameters in whose place others are
        replaced = y.requires_grad and self.plain.has_replaced
        assert y.requires_grad == bool(grown) or replaced, f"the output requires gradients: {y.requires_grad}"
        if not y.requires_grad:
            return
        with seeded(3):
            seed = torch.randn(y.shape, dtype=torch.float32).to(y.dtype)
        (y * seed).sum().backward()
        live = {self.plain_name(name): p for name, p in self.model.named_parameters()}
        found = {name for name, p in live.items() if p.grad is not None}
        assert found == grown, f"gradients: {sorted(found ^ grown)[:4]} are wrong"
        for name in found if self.plain.enabled else ():  # what trains along is the base's own otherwise
            self.moved(live[name])
        for owner, adapter in self.plain.adapters.items() if self.plain.enabled else ():
            for name in () if self.plain.is_aside(owner) else found & set(adapter.tensors):
                adapter.tensors[name] = within(live[name].detach(), adapter.tensors[name].shape).clone()
                adapter.changed()
            for name in found & adapter.trained.keys():
                adapter.trained[name] = live[name].detach().clone()
                adapter.changed()
        self.model.zero_grad(set_to_none=True)

    def moved(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad.sign()

    # copies -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.blocks and len(self.left) < 2)
    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        weighs = any(kind.subject.method.call_tuner is not None for kind in self.world.kinds)  # hooks of transformers
        y = self.computed(self.model)
        old = self.model
        self.model = pickle.loads(pickle.dumps(old)) if pickled and not weighs else copy.deepcopy(old)
        if self.plain.training == old.training:
            self.left.append((old, y))

    @precondition(lambda self: self.plain.enabled or not any(a.biases for a in self.plain.adapters.values()))
    @rule(dtype=st.sampled_from([DTYPE, torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.plain.cast(dtype)

    @precondition(lambda self: self.plain.is_all_shown)
    @rule()
    def through_meta(self) -> None:
        """Without memory, and back: each tensor gets its values from the state dict."""
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.to("meta").to_empty(device="cpu").load_state_dict(state)
