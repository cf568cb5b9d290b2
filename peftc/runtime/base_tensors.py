"""Tensors of the base model that adapters change: biases that train along, and embeddings that a checkpoint carries.

What they were before is kept by adapter, so that deleting an adapter, or unloading, puts it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from peftc.compiler.plan import AdapterPlan
from peftc.diagnostics import PeftcError
from peftc.runtime.journal import Journal
from peftc.runtime.layer import Source
from peftc.runtime.places import refuse_offloaded, whole

if TYPE_CHECKING:
    from peftc.runtime.session import Session


class VocabularyTensor(NamedTuple):
    """A tensor of the base model's embeddings: its key in a checkpoint, its module's path, and whether that is adapted."""

    disk: str
    path: str
    tensor: nn.Parameter
    adapted: bool


class BaseTensors:
    """Those of one session's model."""

    def __init__(self, session: Session) -> None:
        self._session = session
        #: adapter -> tensors that it changed, as they were before
        self._before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}

    @property
    def is_changed(self) -> bool:
        """Whether any tensor may differ from what it was."""
        return any(self._before.values())

    def change(self, plan: AdapterPlan, source: Source | None, journal: Journal) -> None:
        """Load tensors that the checkpoint carries, and keep what they were: for trained ones, a copy."""
        before: list[tuple[nn.Parameter, Tensor]] = []
        journal.note(_put_back, before)
        find = source or (lambda key: None)
        refuse_offloaded(self._session.model, dict(self.trained(plan)))
        for disk, parameter in self.trained(plan).items():
            found = find(disk)
            before.append((parameter, parameter.detach().clone()))
            if found is not None:
                parameter.copy_(found)
        self._before[plan.name] = before
        self.carry(plan, find, journal)

    def carry(self, plan: AdapterPlan, find: Source, journal: Journal) -> None:
        """Load embeddings that the adapter's checkpoint carries; deleting the adapter restores them."""
        before = self._before[plan.name]
        known = {id(parameter) for parameter, _ in before}
        for disk, _, own, _ in self.vocabulary(plan):
            found = find(disk)
            if found is None:
                continue
            here = whole(self._session.model, {disk: own})[disk]
            if torch.equal(found.to(here), here):
                continue
            refuse_offloaded(self._session.model, {disk: own})
            journal.note(setattr, own, "data", own.data)
            if id(own) not in known:
                before.append((own, own.data))
            own.data = found.to(own.device, own.dtype)

    def restore(self, names: Iterable[str]) -> None:
        """Put back what adapters changed."""
        for name in names:
            _put_back(self._before.pop(name, ()))

    def keep(self) -> None:
        """Let tensors stay as adapters made them."""
        self._before = {}

    def trained(self, plan: AdapterPlan) -> dict[str, nn.Parameter]:
        """Parameters that train along with an adapter, by checkpoint key. Raises `PeftcError` for one that is gone."""
        names = [p.name for p in replace(plan, maps=(), modules=(), saves=()).parameters()] if plan.trains else []
        found = {}
        for name, site in zip(names, plan.trains, strict=True):
            module = self._session.find(site.path)
            parameter = module._parameters.get(site.name) if module is not None else None
            if parameter is None:
                raise PeftcError(self._session.gone(f"{site.path}.{site.name}"))
            found[name] = parameter
        return found

    def vocabulary(self, plan: AdapterPlan) -> list[VocabularyTensor]:
        """The base model's input and output embeddings, which a checkpoint of the adapter may carry whole.

        Those that the adapter trains in a copy of its own are left out. Where input and output are one tensor, both keys
        have it.
        """
        adapted, copied = {site.path for site in plan.maps}, {save.path for save in plan.saves}
        tensors = []
        for path in dict.fromkeys(
            (self._session.graph.model.input_embeddings, self._session.graph.model.output_embeddings)
        ):
            module = None if path is None or path in copied else self._session.find(path)
            if path is None or module is None:
                continue
            owner = f"{plan.root}{path}.base_layer" if path in adapted else f"{plan.root}{path}"
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    tensors.append(VocabularyTensor(f"{owner}.{name}", path, tensor, path in adapted))
        return tensors


def _put_back(before: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in before:
        parameter.data = data
