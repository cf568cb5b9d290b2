"""Worlds that the machine plays in: a base model, the adapters that may come onto it, and how they are put there.

Everything is read off the registry: a method that is installed is a world of its own, and those that nest are one together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peftc import PeftcError
from peftc.compiler.compile import compile_plan
from peftc.config.base import PeftConfig
from peftc.registry.manager import default_registry
from peftc.testing.models import TinyModel
from peftc.testing.subjects import Subject, quiet, subjects
from peftc.tuner.method import TunerMethod

#: Exact enough that every effect of an adapter is told from rounding.
DTYPE = torch.float64


@dataclass(frozen=True, eq=False)
class Kind:
    """An adapter to be: what a user would write to get it."""

    subject: Subject
    changes: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> PeftConfig:
        """A fresh config."""
        return self.subject.config(**self.changes)

    def __repr__(self) -> str:
        more = "".join(f",{name}={value}" for name, value in self.changes.items())
        return f"<{self.subject.method.peft_type} {self.subject}{more}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis shows it: on one line."""
        printer.text(repr(self))


@dataclass(frozen=True, eq=False)
class World:
    """What a machine plays with. `mixed`: adapters of several methods."""

    name: str
    model: TinyModel
    kinds: tuple[Kind, ...]
    mixed: bool = False

    def build(self) -> nn.Module:
        """The bare model."""
        return self.model.build(DTYPE)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Keywords of a call, beside what adapters read."""
        return self.model.arguments(DTYPE)


def kinds_of(subject: Subject) -> Iterator[Kind]:
    """A method's adapters for one model: on all layers and on some, with what can ride along; those that can be planned."""
    yield Kind(subject)
    fields = subject.method.config.model_fields
    if subject.targets:
        yield Kind(subject, {"target_modules": list(subject.targets[:1])})
    if "modules_to_save" in fields:
        rest = [n.path for n in subject.model.graph.nodes if n.facts.params and n.path not in (subject.targets or ())]
        for path in rest[:1]:
            yield Kind(subject, {"modules_to_save": [path]})
        if subject.targets and len(subject.targets) > 1:
            yield Kind(
                subject, {"target_modules": list(subject.targets[:-1]), "modules_to_save": [subject.targets[-1]]}
            )
    if "bias" in fields:
        yield Kind(subject, {"bias": "all"})
    if "trainable_token_indices" in fields and subject.targets:
        embeddings = [node.path for node in subject.model.graph.nodes if node.facts.kind.value == "embedding"]
        rest = [path for path in subject.targets if path not in embeddings]
        if embeddings and rest:
            changes = {"target_modules": rest, "trainable_token_indices": {embeddings[0]: [3, 5]}}
            yield Kind(subject, changes)


def _can_be(kind: Kind) -> bool:
    try:
        with quiet():
            compile_plan(kind.subject.model.graph, {"default": kind.config()})
    except PeftcError:
        return False
    return True


def _depends_on_calls(subject: Subject) -> bool:
    """Whether an example of a variant acts by chance, by what a call gives, or by buffers that calls in training move: the
    oracle knows tensors and options alone."""
    if subject.method.variant_for(subject.config()) is None:
        return False
    with quiet():
        plan = compile_plan(subject.model.graph, {"default": subject.config()}).adapters[0]
    return subject.draws or subject.rebases or bool(subject.values) or any(slot.derived for _, slot in plan.slots())


def _of_method(method: TunerMethod) -> Iterator[World]:
    by_model: dict[str, list[Kind]] = {}
    found = [s for s in subjects(method) if s.model.name in ("mlp", "embedding", "conv2d")] or [
        s for s in subjects(method) if s.model.name == "llama"
    ]
    for subject in found:
        if _depends_on_calls(subject):
            continue
        more = kinds_of(subject) if subject.first else [Kind(subject)]
        by_model.setdefault(subject.model.name, []).extend(kind for kind in more if _can_be(kind))
    for name, kinds in by_model.items():
        yield World(f"{method.peft_type}-{name}", kinds[0].subject.model, tuple(kinds))


def _of_text(method: TunerMethod) -> Iterator[World]:
    """A language model, for a method that trains heads, embeddings and single tokens along."""
    if "trainable_token_indices" not in method.config.model_fields:
        return
    subject = next(s for s in subjects(method) if s.first and s.model.name == "llama")
    some = {"target_modules": ["q_proj", "up_proj"]}
    changes: list[dict[str, Any]] = [
        some,
        {**some, "modules_to_save": ["lm_head"]},
        {**some, "modules_to_save": ["embed_tokens"]},
        {**some, "trainable_token_indices": [5, 7]},
    ]
    kinds = (Kind(subject, change) for change in changes)
    yield World(f"{method.peft_type}-llama", subject.model, tuple(kind for kind in kinds if _can_be(kind)))


@cache
def worlds() -> dict[str, World]:
    """All worlds by name."""
    registry = default_registry()
    methods = [registry.get(name) for name in registry.names]
    found = [world for method in methods for world in (*_of_method(method), *_of_text(method))]
    for model in ("mlp", "embedding"):
        nesting = [
            world for world in found if world.model.name == model and world.kinds[0].subject.method.adapts_layers
        ]
        kinds = tuple(kind for world in nesting for kind in world.kinds[:2])
        found.append(World(f"several-{model}", nesting[0].model, kinds, mixed=True))
    return {world.name: world for world in found}
