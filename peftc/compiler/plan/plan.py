"""The injection plan: exactly what will be adapted, why, with which parameters. Frozen data; apply only carries it out.

A plan lists, per adapter, map sites (a layer gets slots), module sites (a module is wrapped), copies (`modules_to_save`),
base parameters that become trainable (`bias`), and prompts. `parameters()` names everything that the applied model will have more than its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peftc.compiler.plan.adapter import AdapterPlan, nesting
from peftc.compiler.plan.sites import PlannedParameter
from peftc.diagnostics import Diagnostic
from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import ModelFacts, ModuleGraph


@dataclass(frozen=True)
class InjectionPlan:
    """Adapters to apply to one base model. `graph_digest` ties the plan to the structure it was made for.

    `warnings` are what the compiler found worth saying; `graph` is absent in a plan that was read from a file, and `base`,
    the base model as a spec names it, in one that was compiled for a live model.
    """

    model: ModelFacts
    adapters: tuple[AdapterPlan, ...]
    active: tuple[str, ...]
    base_numel: int
    warnings: tuple[Diagnostic, ...] = ()
    graph: ModuleGraph | None = field(default=None, compare=False, repr=False)
    stored_digest: str | None = field(default=None, compare=False)
    stored_bytes: int = field(default=0, compare=False)
    base: BaseRef | None = None

    @property
    def graph_digest(self) -> str:
        """Digest of the graph that the plan was made from."""
        if self.graph is not None:
            return self.graph.digest
        return self.stored_digest or ""

    @property
    def base_bytes(self) -> int:
        """Bytes of the base model's parameters, tied ones counted once."""
        return self.stored_bytes if self.graph is None else self.graph.nbytes

    def adapter(self, name: str) -> AdapterPlan:
        """The adapter of that name. Raises `KeyError`."""
        return {a.name: a for a in self.adapters}[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.adapters)

    def parameters(self) -> Iterator[PlannedParameter]:
        """All parameters of all adapters, as in the applied model: those of inactive adapters are frozen, or kept aside."""
        depths = nesting(self.adapters)
        for adapter in self.adapters:
            active, depth = adapter.name in self.active, depths.get(adapter.name)
            yield from adapter.parameters(self.is_trained(adapter), active, depth)

    def counts(self) -> tuple[int, int]:
        """`(trainable, total)` parameters of the applied model, as `get_nb_trainable_parameters` returns them."""
        trainable = total = 0
        for adapter in self.adapters:
            tally = adapter.tally(adapter.name in self.active)
            trainable += sum(tally.trained.values()) if self.is_trained(adapter) else 0
            total += sum(tally.added.values())
        return trainable, self.base_numel + total

    def is_trained(self, adapter: AdapterPlan) -> bool:
        """Whether the adapter's parameters are trainable in the applied model."""
        return adapter.name in self.active and not adapter.config.inference_mode
