"""Plans of every registered method on a small model, for tests that must hold for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.mixins import ModulesToSaveMixin, TargetsMixin
from peftc.graph.nodes import ModuleGraph
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot
from peftc.testing.subjects import adapters_for, subjects
from peftc.tuner.method import TunerMethod


class Block(nn.Module):
    """Two layers in front of each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)


class Little(nn.Module):
    """Embedding, two blocks, a normalisation with buffers, a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)


def little_graph(width: int = 8) -> ModuleGraph:
    """Its graph, with the facts that a language model has."""
    graph = snapshot(Little(width))
    dims = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 12}
    model = replace(graph.model, cls="Little", name_or_path=f"little-{width}", input_embeddings="embed", dims=dims)
    return replace(graph, model=model)


def config_of(method: TunerMethod, example: dict[str, Any]) -> PeftConfig:
    """An example's config, aimed at the little model."""
    options: dict[str, Any] = dict(example)
    if issubclass(method.config, TargetsMixin):
        options.setdefault("target_modules", ["up", "down"])
    if issubclass(method.config, ModulesToSaveMixin):
        options.setdefault("modules_to_save", ["head", "norm"])
    if method.call_tuner is not None:
        options.setdefault(method.call_tuner.option, adapters_for(method, subjects(method)[0].model))
    if method.is_prompt:
        options.setdefault("task_type", "CAUSAL_LM")
    return method.config(**options)


def examples() -> Iterator[tuple[str, TunerMethod, dict[str, Any]]]:
    """Every example of every registered method, with a name for the test."""
    registry = default_registry()
    for name in registry.names:
        method = registry.get(name)
        for number, example in enumerate(method.examples or ({},)):
            yield f"{name.lower()}-{number}", method, dict(example)


def injection_plan(
    method: TunerMethod, example: dict[str, Any], adapter: str = "default", width: int = 8
) -> InjectionPlan:
    """The compiled plan of one example."""
    return compile_plan(graph_for(method, width), {adapter: config_of(method, example)})


def graph_for(method: TunerMethod, width: int = 8) -> ModuleGraph:
    """The little model's graph; for a method that chooses modules itself or weighs adapters, that of a model it fits."""
    if method.module_tuner is None and method.call_tuner is None:
        return little_graph(width)
    return subjects(method)[0].model.graph


def adapter_plan(method: TunerMethod, example: dict[str, Any], adapter: str = "default", width: int = 8) -> AdapterPlan:
    """The adapter's part of it."""
    return injection_plan(method, example, adapter, width).adapters[0]
