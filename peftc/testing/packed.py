"""Methods on packed layers: the tiny models with their linear layers in a storage, and the subjects with these.

Layers compute in float32 as libraries have them, in sizes that libraries can pack. What two ways to compute may differ by is what a
call of the packed layers differs by from one of plain layers with the opened weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn

from peftc.graph.nodes import ModuleGraph
from peftc.registry.boundary import boundary
from peftc.testing.cells import cell_of
from peftc.testing.models import LANGUAGE_MODEL, Mlp, TinyModel, language_model
from peftc.testing.storage import ROUNDED, known
from peftc.testing.subjects import Subject, on_model
from peftc.tuner.method import TunerMethod
from peftc.tuner.storage import Storage

Layers: TypeAlias = dict[str, nn.Module]
#: Sizes of the models: libraries pack groups of up to 64 numbers.
_SIZES = (64, 128, 64)


@dataclass(frozen=True)
class PackedModel(TinyModel):
    """A model with its linear layers in a storage; all of it in float32, whatever is asked for."""

    storage: Storage = ROUNDED

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        return super().build()

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return super().arguments()

    @cached_property
    def graph(self) -> ModuleGraph:
        with known(self.storage):
            return super().graph

    @cached_property
    def plain(self) -> TinyModel:
        """The same with plain layers of the opened weights."""
        return TinyModel(self.name, self._opened, self.inputs, self.tolerance, self.base)

    def _opened(self) -> nn.Module:
        model = self.build()
        for path, packed in self.packed_in(model).items():
            with boundary(f"the storage `{self.storage.name}`", "open", path):
                weight = self.storage.open(packed).detach().float()
            plain = nn.Linear(weight.shape[1], weight.shape[0], packed.bias is not None)
            plain.weight = nn.Parameter(weight.clone())
            if isinstance(packed.bias, Tensor):
                plain.bias = nn.Parameter(packed.bias.detach().clone())
            model.set_submodule(path, plain)
        return model

    def packed_in(self, model: nn.Module) -> Layers:
        """The layers of a model without adapters that are packed, by path."""
        return {path: layer for path, layer in model.named_modules() if path in self.packed_paths}

    @cached_property
    def packed_paths(self) -> frozenset[str]:
        """Paths of the packed layers."""
        return frozenset(node.path for node in self.graph.nodes if node.facts.packed is not None)


@contextmanager
def known_to(s: object) -> Iterator[None]:
    """Within, the storage of a subject's model is known."""
    model = s.model if isinstance(s, Subject) else None
    if not isinstance(model, PackedModel):
        yield
        return
    with known(model.storage):
        yield


def packed_subjects(method: TunerMethod, storage: Storage = ROUNDED) -> list[Subject]:
    """The method's examples on packed layers; where it adapts none, the first on a packed language model."""
    with known(storage):
        for speaks in (False, True):
            model = packed_model(speaks, storage)
            found = [s for options in method.examples or ({},) for s in on_model(method, options, model)]
            if found:
                return list(_told_apart(found, model)) if method.adapts_layers else [replace(found[0], first=True)]
    return []


def _told_apart(found: list[Subject], model: PackedModel) -> Iterator[Subject]:
    """Of those that are refused also what is left where no packed layer is among the targets; the first that is not is marked."""
    first = True
    for s in found:
        for one in (
            s,
            replace(s, targets=tuple(path for path in s.targets or () if path not in model.packed_paths), part="rest"),
        ):
            refused = bool(cell_of(one).codes) if one is s or one.targets else True
            if one is s or not refused:
                yield replace(one, first=first and not refused)
            if not refused:
                first = False
                break


@cache
def packed_model(speaks: bool, storage: Storage = ROUNDED) -> PackedModel:
    """The model of linear layers, or the language model, in a storage."""
    plain = (
        language_model("llama", {**LANGUAGE_MODEL, "hidden_size": 64, "intermediate_size": 128}, 1e-5)
        if speaks
        else None
    )

    def make() -> nn.Module:
        model = Mlp(*_SIZES) if plain is None else plain.make()
        for path, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and not path.endswith("lm_head"):
                with boundary(f"the storage `{storage.name}`", "example", path):
                    made = storage.example(layer)
                    vars(made).update(
                        storage.settings(made)
                    )  # as on a model with adapters, so that bases compute alike
                model.set_submodule(path, made)
        return model

    name = f"{'mlp' if plain is None else plain.name}-{storage.name}"
    inputs = (lambda: {"x": torch.randn(2, 3, _SIZES[0])}) if plain is None else plain.inputs
    return PackedModel(name, make, inputs, 1e-5, None if plain is None else plain.base, storage=storage)
