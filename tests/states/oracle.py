"""The plain model: what an adapted model should be, told by a few tables and matrices, whatever happened to it before.

It never asks the model under test. What one adapter does to one weight is read off a fresh model that has this adapter
alone; how several come together is computed here, by the documented order: adapters fold in the order in which they were
activated, those of several methods in the order in which their methods came to a layer. All numbers are float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call

from peftc import get_peft_model
from peftc.testing.subjects import quiet
from tests.states.alone import BASE, Adapter, output_of, plain_name, set_scale
from tests.states.worlds import DTYPE, World

#: What stands for a method where rows train beside one.
ROWS = "rows"
#: What rounding explains, by dtype.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.2}


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}


class Plain:
    """A model with adapters, as it should be."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.bare = world.build()
        self.base = {name: tensor.clone() for name, tensor in self.bare.state_dict().items()}
        #: the model's own dtype; what adapters train of `base` goes back in what the model has then
        self.dtype = next(tensor.dtype for tensor in self.base.values() if tensor.is_floating_point())
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.enabled = True
        self.training = False
        #: adapters merged at each layer, first to last, and the weights that came out
        self.merged: dict[str, list[str]] = {}
        self.weights: dict[str, Tensor] = {}
        #: wrappers of each layer, innermost first: PEFT type and adapters
        self.chains: dict[str, list[tuple[str, set[str]]]] = {}
        #: whether modules were copied since wrappers were taken out last
        self.has_copied = False
        #: what dtype the model had when an adapter left it
        self.aside: dict[str, torch.dtype] = {}
        #: dtypes that the model had since nothing was merged
        self.coarse: set[torch.dtype] = set()

    # what happens -------------------------------------------------------------------------------------------------

    def add(self, adapter: Adapter) -> None:
        if adapter.copies or self.has_copied:  # wrappers that hold nothing and lie on top are taken out
            for chain in self.chains.values():
                while chain and not chain[-1][1]:
                    chain.pop()
        self.has_copied = bool(adapter.copies) or any(other.copies for other in self.adapters.values())
        self.adapters[adapter.name] = adapter
        rows = {site.path for site in adapter.plan.maps if site.inside}
        for path in adapter.layers:
            chain = self.chains.setdefault(path, [])
            if path in rows:  # those of all methods are directly round the layer
                if not chain or chain[0][0] != ROWS:
                    chain.insert(0, (ROWS, set()))
                chain[0][1].add(adapter.name)
                continue
            if not chain or chain[-1][0] != adapter.peft_type:
                chain.append((adapter.peft_type, set()))
            chain[-1][1].add(adapter.name)
        self.aside[adapter.name] = self.dtype

    def activate(self, names: Sequence[str], trains: bool = True) -> None:
        if self.merged_names and set(names) != set(self.active):
            self.unmerge()
        dtype = self.dtype
        for name, adapter in self.adapters.items():
            adapter.requires = trains and name in names
            if name in names:
                _cast(adapter.trained, dtype)
            if self.is_aside(name) and name in names and self.aside[name] != dtype:
                _cast(adapter.tensors, dtype)
                adapter.changed()
            self.aside[name] = self.aside.get(name, dtype) if self.is_aside(name) and name not in names else dtype
        self.active = list(dict.fromkeys(names))

    def delete(self, name: str) -> None:
        del self.adapters[name]
        for chain in self.chains.values():
            for _, names in chain:
                names.discard(name)
        self.active = [other for other in self.active if other != name]

    def delete_and_succeed(self, name: str) -> None:
        """Where nothing is active any more, another takes over, and trains if that did: the first by name, on layers."""
        acted, trained = name in self.active, self.adapters[name].requires
        self.delete(name)
        if acted and not self.active and self.adapters:
            on_layers = any(adapter.layers for adapter in self.adapters.values())
            self.activate([min(self.adapters) if on_layers else next(iter(self.adapters))], trained)

    def load(self, new: Adapter) -> None:
        """An adapter from a file, in place of one of its name if there is one: no other is concerned."""
        old = self.adapters.get(new.name)
        if old is None or not old.is_like(new):
            active = list(self.active)
            if old is not None:
                self.delete(new.name)
            self.add(new)
            self.active = active
        else:
            new.scale = old.scale  # only values are exchanged
        self.adapters[new.name] = new

    def merge(self, names: Sequence[str]) -> None:
        """Fold adapters in, where they are on top of what is merged; what lies over them is folded in anew."""
        pristine = self.pristine(self.active)
        self.coarse.add(self.dtype)
        for path in self.chains:
            before = self.merged.get(path, [])
            wanted = self.order(path, [*before, *(name for name in names if name not in before)])
            onto = before == wanted[: len(before)]
            running = {**pristine, **(self.weights if onto else {})}
            for name in wanted[len(before) :] if onto else wanted:
                changed = self.adapters[name].alone.folded(path, running, pristine)
                running |= changed
                self.weights |= changed
            if wanted:
                self.merged[path] = wanted

    def unmerge(self) -> None:
        self.merged, self.weights = {}, {}
        self.coarse = self.coarse if self.hides else set()

    @property
    def hides(self) -> bool:
        """Whether there are buffers that are not in a state dict, such as a language model's frequencies or projections that
        no file holds: they stay as coarse as they were made."""
        return self.world.model.is_language_model or any(adapter.facts.hides for adapter in self.adapters.values())

    @property
    def is_all_shown(self) -> bool:
        """Whether a state dict has every tensor: nothing is kept aside for later, and no buffer is left out."""
        aside = self.merged_names or any(self.is_aside(n) or a.biases for n, a in self.adapters.items())
        return not aside and not self.hides

    def cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        apart = {key for name, adapter in self.adapters.items() if name in self.active for key in adapter.trained}
        cast = {key: tensor for key, tensor in self.base.items() if key not in apart}
        _cast(cast, dtype)
        self.base |= cast
        for name, adapter in self.adapters.items():
            if name in self.active:
                _cast(adapter.trained, dtype)
            if not self.is_aside(name):
                _cast(adapter.tensors, dtype)
                adapter.changed()
        self.coarse |= {dtype} if self.weights or self.hides else set()

    # what is ------------------------------------------------------------------------------------------------------

    @property
    def merged_names(self) -> set[str]:
        return {name for names in self.merged.values() for name in names}

    @property
    def acting(self) -> list[str]:
        """Active adapters, if they are to act."""
        return self.active if self.enabled else []

    def shown(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The base tensors, with what these adapters made of those that train along."""
        found = dict(self.base)
        _cast(found, self.dtype)
        for name in names:
            found |= {key: tensor.to(self.dtype) for key, tensor in self.adapters[name].trained.items()}
        return found

    def pristine(self, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """The same in float64."""
        return {name: t.double() if t.is_floating_point() else t for name, t in self.shown(names).items()}

    @property
    def tolerance(self) -> float:
        """What rounding explains, relative to the largest value: now, or since something was merged."""
        tensors = [t for own in (self.shown(()), *(a.tensors for a in self.adapters.values())) for t in own.values()]
        floats = {t.dtype for t in tensors if t.is_floating_point()} | self.coarse
        return max(self.world.model.tolerance, *(ROUNDING[dtype] for dtype in floats))

    @property
    def orders(self) -> bool:
        """Whether adapters may be on one layer that cannot change places."""
        return self.world.mixed or any(chain[0][0] == ROWS for chain in self.chains.values() if chain)

    def order(self, path: str, names: Sequence[str]) -> list[str]:
        """Of these adapters, those on a layer, in the order in which they act."""
        return [name for _, there in self.chains.get(path, ()) for name in names if name in there]

    def copied(self, names: Sequence[str]) -> dict[str, str]:
        """Modules that are replaced by a copy, with whose."""
        found: dict[str, str] = {}
        for name in names:
            for path in self.adapters[name].copies:
                found.setdefault(path, name)
        return found

    def in_effect(self, names: Sequence[str], merged: bool = True, for_good: bool = False) -> dict[str, Tensor]:
        """The base model's tensors with these adapters, beside what is merged; `for_good` with all that the latter train."""
        pristine = self.pristine(names)
        running = {**pristine, **(self.weights if merged else {})}
        for path in self.chains:
            for name in self.order(path, names):
                if not (merged and name in self.merged.get(path, ())):
                    running |= self.adapters[name].alone.folded(path, running, pristine)
        for path, name in self.copied([*names, *(sorted(self.merged_names) if for_good else ())]).items():
            for key in [key for key in running if key.startswith(f"{path}.")]:
                tail = key.removeprefix(f"{path}.")
                running[key] = self.adapters[name].tensors[f"{path}.modules_to_save.{name}.{tail}"].double()
        return running

    def of_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The base model's output with these tensors in it."""
        with torch.no_grad():
            out = functional_call(self.bare, dict(weights), (), self.world.arguments)
        return out if isinstance(out, Tensor) else out.logits

    def output(self) -> Tensor:
        """What the model should compute."""
        return self.of_adapters(self.active if self.enabled else [], merged=self.enabled)

    def of_adapters(self, names: Sequence[str], merged: bool = False) -> Tensor:
        """What it should compute with these adapters in effect, in this order."""
        if all(self.adapters[name].facts.merges for name in names):
            return self.of_weights(self.in_effect(names, merged))
        return self._fresh(names)

    def _fresh(self, names: Sequence[str]) -> Tensor:
        """The same where an adapter is more than a change of weights: by a fresh model that has nothing else."""
        first, *others = (self.adapters[name] for name in names)
        model = first.alone.model
        if others:
            with quiet():
                model = (
                    get_peft_model(self.world.build(), first.config.model_copy(deep=True), first.name).eval().to(DTYPE)
                )
                for other in others:
                    model.add_adapter(other.name, other.config.model_copy(deep=True))
                model.set_adapter(list(names))
        live = {plain_name(n, model, first.facts.plans): t for n, t in model.state_dict().items()}
        wanted = self.pristine(self.acting)
        for adapter in (first, *others):
            wanted |= adapter.tensors
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(wanted[name])
            for adapter in (first, *others):
                set_scale(model, adapter.name, adapter.scale)
            return output_of(self.world, model).double()

    def rows(self, names: Sequence[str]) -> Tensor:
        """What a batch should come to whose rows have these adapters."""
        whole = {name: self.of_adapters([] if name == BASE else [name]) for name in dict.fromkeys(names)}
        return torch.stack([whole[name][row] for row, name in enumerate(names)])

    def names(self) -> set[str]:
        """Plain names of all that is in the model."""
        found = set(self.base)
        for name, adapter in self.adapters.items():
            found |= set() if self.is_aside(name) else set(adapter.tensors)
            found |= {f"{path}.{tail}" for path in self.wrapped(adapter.peft_type) for tail in adapter.facts.shared}
        return found

    def wrapped(self, peft_type: str) -> list[str]:
        """Layers that have, or had, adapters of a method: they go on holding what all layers of it share."""
        return [path for path, chain in self.chains.items() if any(own == peft_type for own, _ in chain)]

    def is_aside(self, name: str) -> bool:
        """Whether an adapter's tensors are not in the model for now."""
        return bool(self.adapters[name].plan.modules) and name not in self.active

    @property
    def instead(self) -> set[str]:
        """Base tensors in whose place merged ones are."""
        return set(self.weights) if self.enabled else set()

    def trainable(self) -> set[str]:
        """Plain names of what should require gradients; what stands in for a merged weight does not."""
        requiring = {n: a for n, a in self.adapters.items() if a.requires and not self.is_aside(n)}
        found = {name for adapter in requiring.values() for name in adapter.facts.trainable}
        still = {name for n, adapter in requiring.items() if n not in self.active for name in adapter.biases}
        return found - still - self.instead

    def grown(self) -> set[str]:
        """Plain names of what a backward pass should reach."""
        acting = [a for n, a in self.adapters.items() if a.requires and n in self.active]
        found = {name for a in acting for name in a.biases} - self.instead
        if not self.enabled:
            return found
        copied = self.copied(self.active)
        for name in (name for name in self.active if self.adapters[name].requires):
            adapter, trainable = self.adapters[name], self.adapters[name].facts.trainable
            out = [path for path in adapter.layers if name in self.merged.get(path, ())]
            out += [path for path in adapter.copies if copied[path] != name]
            out += [path for path in adapter.layers if self.is_replaced(name, path)]
            found |= {n for n in trainable if not any(n.startswith(f"{path}.") for path in out)} - self.instead
        return found

    def again(self, state: Mapping[str, Tensor]) -> Plain:
        """A plain model that goes on with the base alone, as it is by now."""
        found = Plain(self.world)
        found.dtype, found.training = self.dtype, self.training
        found.base = {key: tensor.detach().clone() for key, tensor in state.items()}
        found.coarse = self.coarse if self.world.model.is_language_model else set()
        return found

    def is_replaced(self, name: str, path: str) -> bool:
        """Whether another adapter of its method has the layer's parameters as its own, in place of what this one made."""
        own, order = self.adapters[name], self.order(path, self.active)
        later = [self.adapters[other] for other in order[order.index(name) + 1 :]]
        pristine = self.pristine()
        return any(o.peft_type == own.peft_type and o.alone.is_put_in_place(path, pristine) for o in later)

    @property
    def has_replaced(self) -> bool:
        """Whether any acting adapter is without effect on a layer for another's parameters in their place."""
        return any(self.is_replaced(name, path) for name in self.acting for path in self.adapters[name].layers)

    def in_files(self, name: str) -> Adapter:
        """An adapter as its files have it: copies of modules beside a base in half precision are as coarse as that."""
        found = self.alike(name)
        copies = {key for key in found.tensors for path in found.copies if key.startswith(f"{path}.modules_to_save.")}
        if self.dtype.itemsize < 4:
            found.tensors |= {key: found.tensors[key].to(self.dtype).to(found.tensors[key].dtype) for key in copies}
        return found

    def alike(self, name: str) -> Adapter:
        """An adapter as it is now, for later."""
        own = self.adapters[name]
        trained = {n: t.clone() for n, t in own.trained.items()}
        tensors = {n: t.clone() for n, t in own.tensors.items()} | trained
        found = replace(own, config=own.config.model_copy(deep=True), tensors=tensors, trained=trained)
        found.changed()  # it has more tensors than the one that it is like
        return found
