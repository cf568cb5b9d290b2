"""Tensors of the base model that adapters change: biases that train along, and embeddings that a checkpoint carries.

What they were before is kept by adapter, so that deleting an adapter, or unloading, puts it back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError
from peftc.runtime.bases.places import entire, refuse_offloaded
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_memory, keep_trained, note
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.session.applied import Applied


class VocabularyTensor(NamedTuple):
    """A tensor of the base model's embeddings: its key in a checkpoint, its module's path, whether that is adapted, and whether by
    the method, and not by rows that train beside it alone."""

    disk: str
    path: str
    tensor: nn.Parameter
    adapted: bool
    targeted: bool


class BaseTensors:
    """Those of one session's model."""

    def __init__(self, session: Applied) -> None:
        self._session = session
        #: adapter -> tensors that it changed, as they were before: those that it trains, and those that it carries
        self._trained: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        self._before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        #: what adapters made of those that they train, while they do not act
        self._own: dict[str, list[Tensor]] = {}

    @property
    def is_changed(self) -> bool:
        """Whether any tensor may differ from what it was."""
        return any(self._before.values()) or any(self._trained.values())

    def change(self, plan: AdapterPlan, source: Source | None) -> None:
        """Load tensors that the checkpoint carries, and keep what they were: for trained ones, a copy."""
        before: list[tuple[nn.Parameter, Tensor]] = []
        find = source or (lambda key: None)
        refuse_offloaded(self._session.model, dict(self.trained(plan)))
        for disk, parameter in self.trained(plan).items():
            found = find(disk)
            own = parameter.detach()
            before.append((parameter, own.clone()))
            note(own.copy_, before[-1][1])
            if found is not None:
                parameter.copy_(found)
        keep_entry(self._trained, plan.name)
        keep_entry(self._before, plan.name)
        self._trained[plan.name], self._before[plan.name] = before, []
        self.carry(plan, find)

    def carry(self, plan: AdapterPlan, find: Source) -> None:
        """Load embeddings that the adapter's checkpoint carries; deleting the adapter restores them."""
        before = self._before[plan.name]
        keep_entries(before)
        known = {id(parameter) for parameter, _ in (*self._trained[plan.name], *before)}
        for disk, _, own, *_ in self.vocabulary(plan):
            found = find(disk)
            if found is None:
                continue
            here = entire(self._session.model, {disk: own})[disk]
            if torch.equal(found.to(here), here):
                continue
            refuse_offloaded(self._session.model, {disk: own})
            keep_memory(own)
            if id(own) not in known:
                before.append((own, own.data))
            own.data = found.to(own.device, own.dtype)

    def act(self, names: Collection[str]) -> None:
        """Have what these adapters train as they made it, and what others train as it was before."""
        keep_entries(self._own)
        for name, before in self._trained.items():
            if name in names and name in self._own:
                own = self._own.pop(name)
                _put_back((parameter, data) for (parameter, _), data in zip(before, own, strict=True))
            elif before and name not in names and name not in self._own:
                self._own[name] = [parameter.data for parameter, _ in before]
                _put_back(before)

    def restore(self, names: Iterable[str]) -> None:
        """Put back what adapters changed."""
        keep_entries(self._before, self._trained, self._own)
        for name in names:
            self._own.pop(name, None)
            _put_back(self._before.pop(name, ()))
            _put_back(self._trained.pop(name, ()))

    def keep_changes(self) -> None:
        """Let tensors stay as adapters made them."""
        keep(self)
        self._before, self._trained = {}, {}

    def values(self, plan: AdapterPlan) -> dict[str, Tensor]:
        """What an adapter made of the parameters that it trains, in place or not, by checkpoint key."""
        trained = self.trained(plan)
        return dict(zip(trained, self._own[plan.name], strict=True)) if plan.name in self._own else {**trained}

    def trained(self, plan: AdapterPlan) -> dict[str, nn.Parameter]:
        """Parameters that train along with an adapter, by checkpoint key. Raises `PeftcError` for one that is gone."""
        names = [p.name for p in replace(plan, maps=(), modules=(), saves=()).parameters()] if plan.trains else []
        found = {}
        for name, site in zip(names, plan.trains, strict=True):
            parameter = self._of(site.path).get(site.name)
            if parameter is None:
                raise PeftcError(self._session.gone(f"{site.path}.{site.name}"))
            found[name] = parameter
        return found

    def let_train(self, plan: AdapterPlan, acts: bool) -> None:
        """Let what an adapter trains require gradients, if it is to train and acts: while others act, these are the base's own
        tensors, and a step would change the base."""
        for parameter in self.trained(plan).values():
            keep_trained(parameter, acts and plan.name in self._session.requiring)

    def take_turns(self, plans: Iterable[AdapterPlan], names: Collection[str]) -> None:
        """Let what these adapters train require gradients, or not any more, before others than now are active."""
        for plan in plans:
            if (plan.name in names) != (plan.name in self._session.active):
                self.let_train(plan, plan.name in names)

    def _of(self, path: str) -> dict[str, nn.Parameter | None]:
        """The base's parameters at a path, as they are without what is merged into them."""
        module, layer = self._session.find(path), self._session.layers.get(path)
        return {} if module is None else {**module._parameters, **({} if layer is None else layer.aside())}

    def still(self) -> None:
        """Have nothing train that stands in for a trained tensor: it goes when the adapter is taken out again."""
        for plan in self._session.plans.values():
            for site in plan.trains:
                module, own = self._session.find(site.path), self._of(site.path).get(site.name)
                layer = self._session.layers.get(site.path)
                aside = [] if layer is None else [wrapper._folded.get(site.name) for wrapper in layer.chain()]
                for live in (None if module is None else module._parameters.get(site.name), *aside):
                    if live is not None and live is not own:
                        keep_trained(live, False)

    def vocabulary(self, plan: AdapterPlan) -> list[VocabularyTensor]:
        """The base model's input and output embeddings, which a checkpoint of the adapter may carry whole.

        Those that the adapter trains in a copy of its own are left out. Where input and output are one tensor, both keys
        have it.
        """
        # rows that train beside a method are in a wrapper of their own; where both are, the method's is named
        sites = sorted(plan.maps, key=lambda site: not site.inside)
        adapted = {site.path: f"{site.path}.{site.inside}" if site.inside else site.path for site in sites}
        targeted, copied = {site.path for site in sites if not site.inside}, {save.path for save in plan.saves}
        tensors = []
        for path in dict.fromkeys(
            (self._session.graph.model.input_embeddings, self._session.graph.model.output_embeddings)
        ):
            if path is None or path in copied:
                continue
            owner = f"{plan.root}{adapted[path]}.base_layer" if path in adapted else f"{plan.root}{path}"
            for name, tensor in self._of(path).items():
                if tensor is not None:
                    tensors.append(VocabularyTensor(f"{owner}.{name}", path, tensor, path in adapted, path in targeted))
        return tensors


def _put_back(before: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Where and in what dtype the model has them now: it may have been moved or cast meanwhile."""
    for parameter, data in before:
        keep_memory(parameter)
        parameter.data = data.to(parameter.device, parameter.dtype)
