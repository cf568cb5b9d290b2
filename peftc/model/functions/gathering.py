"""What starts read of a model before an adapter begins: which layers an adapter would be on, and what is kept for them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.sites import MapSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.registry.manager import default_registry
from peftc.registry.starts import start_of
from peftc.runtime.applying.apply import session_of
from peftc.runtime.applying.planning import plan_for
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.bases.table import backend_of
from peftc.runtime.journal import whole
from peftc.runtime.layer import gathered
from peftc.runtime.layer.starting import WEIGHT
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.applied import Applied
from peftc.tuner.experts import tuner_for
from peftc.tuner.slots import labelled


@dataclass(frozen=True)
class Target:
    """A layer that an adapter begins on by its start. `module` is the base layer, `called` what the model calls."""

    path: str
    module: nn.Module
    called: nn.Module
    config: PeftConfig
    rank: int
    site: MapSite

    @property
    def weight(self) -> Tensor:
        """The base weight before any adapter, `(out, in · kernel)`, in float32 or wider."""
        if isinstance(self.called, TunerLayer):
            found = self.called.unchanged()[WEIGHT]
        else:
            own = tensor_of(self.module, WEIGHT)
            assert own is not None
            found = self.logical(own.detach())
        return found.flatten(1).to(torch.promote_types(found.dtype, torch.float32))

    def logical(self, tensor: Tensor) -> Tensor:
        """A tensor in the order in which the weight is stored, such as its gradient, as `(out, in · kernel)`."""
        return backend_of(self.site.layer).to_logical(WEIGHT, tensor).flatten(1)

    def gather(self, **tensors: Tensor) -> None:
        """Keep tensors for the start until the adapter begins."""
        method = default_registry().method_of(self.config)
        chosen = start_of(method, self.config)
        assert chosen is not None
        gathered.gather(self.module, chosen.start.name, tensors)


def start_targets(model: nn.Module, config: PeftConfig) -> Mapping[str, Target]:
    """The layers of a base model, adapted or not, on which an adapter with these options begins by the start that they name; by
    path. Raises `PeftcError` with every problem of the options, and where they name none."""
    session = session_of(model)
    graph = snapshot(model) if session is None else session.graph
    plan = compile_plan(graph, {"default": config}, active=[], task_heads=False)
    method = default_registry().method_of(config)
    chosen = start_of(method, config)
    found = {}
    known = Applied(model, graph) if session is None else session
    for site in plan.adapters[0].maps if chosen is not None else ():
        assert chosen is not None
        module = known.find(site.path)
        if module is None or not chosen.acts_on(site.layer):
            continue
        tuner = tuner_for(method, site.config, site.node(graph))
        rank = labelled(site.slots)[tuner.thin_slots(site.config, site.layer)[0]].shape[0]
        called = known.layers.get(site.path, module)
        found[site.path] = Target(site.path, module, called, site.config, rank, site)
    return found


def to_fill(model: nn.Module, adapter_name: str) -> PeftModel:
    """A model whose adapter can be given other tensors. Raises `PeftcError` for what is none, or has no such adapter; and for one
    that is merged."""
    if not isinstance(model, PeftModel):
        what = f"A {type(model).__name__} is no `PeftModel`"
        raise PeftcError(rules.NOT_A_MODEL(what, fix="Make one with `get_peft_model`."))
    model.session.require([adapter_name])
    model.session.refuse_merged(adapter_name)
    return model


@whole
def begin_anew(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Let an adapter of a `PeftModel` begin again with other options; it is as active and as trainable as it was.

    Raises `PeftcError` with the model as it was.
    """
    model = to_fill(model, adapter_name)
    session = model.session
    plan = plan_for(model.get_base_model(), {adapter_name: config}, given=None, mixed=model.mixes)
    active, trained = session.active, adapter_name in session.requiring
    model._drop(adapter_name)
    model._attach(plan, None)
    session.activate(active)
    session.set_requires_grad(adapter_name, trained)
