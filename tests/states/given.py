"""What is given to adapters: files saved, loaded and swapped in, sums of others, values from a dictionary."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from safetensors.torch import load_file
from torch import Tensor

from peftc import PeftConfig, PeftModel, rules
from peftc.model.functions.hotswap import hotswap_adapter
from peftc.model.functions.state import set_peft_model_state_dict
from peftc.testing.models import seeded
from tests.states.alone import Adapter, output_of
from tests.states.oracle import Plain
from tests.states.pair import CLASH, NAMES, Pair
from tests.states.worlds import DTYPE

SLOTS = ("s0", "s1")


class Given(Pair):
    """Operations that give an adapter its tensors."""

    # files --------------------------------------------------------------------------------------------------------

    @rule(slot=st.sampled_from(SLOTS))
    def save(self, slot: str) -> None:
        must = [] if self.plain.adapters else [rules.NOT_ADAPTED.code]
        if not self.attempt(lambda: self.model.save_pretrained(self.folder / slot), must):
            return
        content = {}
        for name in self.plain.adapters:
            place = self.place(slot, name)
            found = load_file(place / "adapter_model.safetensors")
            with torch.no_grad():
                wanted = self.plain.in_files(name).alone.model.adapter_tensors(name)
            assert found.keys() == wanted.keys(), f"saved keys of {name}: {sorted(found.keys() ^ wanted.keys())[:4]}"
            for key, tensor in wanted.items():
                if self.plain.adapters[name].plan.prompt is not None:  # computed from its slots, in their dtype
                    self.close(found[key], tensor, f"saved {key} of {name}")
                else:
                    assert torch.equal(found[key].double(), tensor.double()), f"saved {key} of {name}"
            content[name] = self.plain.in_files(name).placed(PeftConfig.from_pretrained(place))
        self.saved[slot] = {**self.saved.get(slot, {}), **content}

    def place(self, slot: str, name: str) -> Path:
        return self.folder / slot if name == "default" else self.folder / slot / name

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def reload(self, data: st.DataObject) -> None:
        """What was saved, on a fresh base."""
        slot = data.draw(st.sampled_from(sorted(self.saved)), "slot")
        name = data.draw(st.sampled_from(sorted(self.saved[slot])), "adapter")
        adapter = self.saved[slot][name]
        model = PeftModel.from_pretrained(self.world.build(), self.place(slot, name), adapter_name=name)
        fresh = Plain(self.world)
        fresh.add(
            Adapter(self.world, name, adapter.config, adapter.tensors, stored=adapter.stored, trained=adapter.trained)
        )
        fresh.activate([name])
        with torch.no_grad():
            self.close(output_of(self.world, model, DTYPE), fresh.output(), "the output of a loaded adapter")

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(NAMES), trains=st.booleans())
    def load(self, data: st.DataObject, name: str, trains: bool) -> None:
        """What was saved, beside what is there or over it."""
        place, new = self._saved(data, name)
        old = self.plain.adapters.get(name)
        must = self.cannot_join(new, [other for other in self.plain.adapters.values() if other is not old])
        must += [rules.WHILE_MERGED.code] if name in self.plain.merged_names else []
        if self.attempt(lambda: self.model.load_adapter(place, name, is_trainable=trains), must):
            if not trains:
                self.plain.training = False
            new.requires = trains if old is None else old.requires or (trains and name in self.plain.active)
            stays = old.trained if old is not None and old.is_like(new) else {}
            new.trained = self.in_place_of(stays, new.trained)
            self.plain.load(new)
            self.take(new)
            found, wanted = self.model.adapter_tensors(name), load_file(place / "adapter_model.safetensors")
            assert found.keys() == wanted.keys()
            for key, tensor in found.items():
                assert torch.equal(tensor, wanted[key].to(tensor.dtype)), f"{key} is not what was loaded"

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def swap(self, data: st.DataObject, name: str) -> None:
        """The values of what was saved, in place of an adapter's own."""
        place, new = self._saved(data, name)
        must = [] if name in self.plain.adapters else [rules.ADAPTER_UNKNOWN.code]
        must += [rules.WHILE_MERGED.code] if name in self.plain.merged_names else []
        may = [rules.CANNOT_SWAP.code, rules.NOTHING_LOADS.code]
        if not self.attempt(lambda: hotswap_adapter(self.model, place, name), must, may):
            return
        old = self.plain.adapters[name]
        config = self.model.peft_config[name]
        if set(new.layers) != set(old.layers):  # the config is the new one's; layers stay
            config = config.model_copy(update={"target_modules": set(old.layers)})
        swapped = self.adopted(name, config)
        swapped.requires = old.requires
        swapped.trained = self.in_place_of(old.trained, new.trained)
        self.plain.adapters[name] = swapped
        if not swapped.facts.merges:
            for key, tensor in new.tensors.items():
                assert torch.equal(swapped.tensors[key], tensor.to(swapped.tensors[key].dtype)), f"{key} is not swapped"
            return
        pristine = self.plain.pristine()
        for path in swapped.layers:
            found = swapped.alone.folded(path, pristine, pristine)
            wanted = (
                new.alone.folded(path, pristine, pristine) if path in new.layers else {k: pristine[k] for k in found}
            )
            for key, tensor in found.items():
                self.close(tensor, wanted[key], f"{key} with what was swapped in")

    def _saved(self, data: st.DataObject, name: str) -> tuple[Path, Adapter]:
        """Where one of the saved adapters is, and what it is under this name."""
        slot = data.draw(st.sampled_from(sorted(self.saved)), "slot")
        own = data.draw(st.sampled_from(sorted(self.saved[slot])), "saved adapter")
        saved = self.saved[slot][own]
        prompt = saved.plan.prompt is not None
        new = Adapter(self.world, name, saved.config.model_copy(deep=True), stored=prompt)
        if not prompt:
            pairs = zip(new.facts.own, saved.facts.own, strict=True)
            new.tensors = {key: saved.tensors[other].clone() for key, other in pairs}
        new.trained = {key: tensor.clone() for key, tensor in saved.trained.items()}
        return self.place(slot, own), new

    def in_place_of(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values of base tensors in the dtype of those that were there: what is kept aside is not cast with the model."""
        return {key: tensor.to(old[key].dtype if key in old else self.plain.dtype) for key, tensor in new.items()}

    def take(self, adapter: Adapter) -> None:
        """Let tensors that were given to the model be as it has them: in its dtype, and of a prompt the table alone."""
        there = self.aside(adapter.name) if self.plain.is_aside(adapter.name) else self.live
        given = {key: there[key].clone() for key in adapter.facts.own} if adapter.stored else adapter.tensors
        adapter.tensors = {key: tensor.to(there[key].dtype) for key, tensor in given.items()}
        adapter.changed()

    @precondition(lambda self: self.layered and self.plain.adapters)
    @rule(data=st.data(), name=st.sampled_from(NAMES), way=st.sampled_from(["cat", "linear", "svd"]))
    def combine(self, data: st.DataObject, name: str, way: str) -> None:
        """A new adapter out of others, weighted; with `cat`, exactly their sum."""
        some = st.lists(st.sampled_from(sorted(self.plain.adapters)), min_size=1, max_size=2, unique=True)
        names = data.draw(some, "names")
        weights = data.draw(st.lists(st.sampled_from([0.5, -1.0, 2.0]), min_size=len(names), max_size=len(names)))
        must = [rules.ADAPTER_EXISTS.code] if name in self.plain.adapters else []
        may = [rules.CANNOT_COMBINE.code, CLASH]
        add = self.model.base_model.add_weighted_adapter
        if not self.attempt(lambda: add(names, weights, name, combination_type=way), must, may):
            return
        new = self.adopted(name, self.model.peft_config[name])
        self.plain.add(new)
        pristine = self.plain.pristine(self.plain.acting)
        for path in new.layers:
            parts = [self.plain.adapters[own] for own in names if path in self.plain.adapters[own].layers]
            if way == "cat" and all(own.facts.layers[path].part(own.name).tuner.additive for own in (new, *parts)):
                own, key = new.alone.folded(path, pristine, pristine), f"{path}.weight"
                shares = dict(zip(names, weights, strict=True))
                changes = [
                    shares[p.name] * (p.alone.folded(path, pristine, pristine)[key] - pristine[key]) for p in parts
                ]
                self.close(own[key], pristine[key] + sum(changes), f"{key} of the combination")

    @precondition(lambda self: self.plain.adapters)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        """Values from a dictionary."""
        name = data.draw(st.sampled_from(sorted(self.plain.adapters)), "adapter")
        with seeded(self.count):
            own = self.model.adapter_tensors(name)
            given = {k: t + torch.rand_like(t) if t.is_floating_point() else t.clone() for k, t in own.items()}
        must = [rules.WHILE_MERGED.code] if name in self.plain.merged_names else []
        may = [] if self.layered else [rules.TABLE_REFUSED.code]
        if self.attempt(lambda: set_peft_model_state_dict(self.model, given, name), must, may):
            for key, tensor in self.model.adapter_tensors(name).items():
                assert torch.equal(tensor, given[key]), f"{key} is not what was put in"
            adapter = self.plain.adapters[name]
            there = self.aside(name) if self.plain.is_aside(name) else self.live
            adapter.tensors = {key: there[key].clone() for key in adapter.tensors}
            adapter.changed()
            own = {self.plain_name(key): tensor for key, tensor in given.items()}
            adapter.trained = self.in_place_of(adapter.trained, {key: own[key] for key in adapter.trained})
