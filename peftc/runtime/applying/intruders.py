"""An adapter with less of its intruder dimensions (Shuttleworth et al., arXiv:2410.21228, section 6).

Among the first left singular vectors of `W + ΔW`, intruders are those that are like none of `W`: what thin updates add and full
fine-tuning does not, and what a model forgets by. Each is scaled by λ, and the change that is left becomes an adapter of the same
rank: `ΔW' = ΔW + (λ - 1) Σ u σ vᵀ`, by its closest factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import Collector, Diagnostic, PeftcError
from peftc.ops.combine import padded
from peftc.ops.factors import of_thin
from peftc.registry.boundary import guarded
from peftc.runtime.applying.apply import name_taken
from peftc.runtime.applying.conversion import beside_weights
from peftc.runtime.applying.weighted import Combined
from peftc.runtime.bases.shards import refuse_sharded
from peftc.runtime.layer.starting import WEIGHT
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.session import Session
from peftc.runtime.session.starts import changes_base, turning
from peftc.tuner.experts import one_of
from peftc.tuner.maps import Former
from peftc.tuner.slots import labelled

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Mitigation:
    """Which singular vectors are intruders, and what is left of them: of the first `top_k`, those whose cosines with the base's are
    all below `threshold`, which is every one above 1, times `scale`."""

    top_k: int = 10
    threshold: float = 0.5
    scale: float = 0.75

    def problems(self) -> Iterator[Diagnostic]:
        """What is wrong with the numbers."""
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            yield rules.BAD_VALUE(f"`top_k` cannot be `{self.top_k}`", fix="Give a whole number of 1 or more.")
        if not self.threshold >= 0:  # nor a NaN
            what = f"`threshold_epsilon` cannot be `{self.threshold}`"
            yield rules.BAD_VALUE(what, fix="Give a cosine, from 0 to 1; above 1 every vector counts as an intruder.")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            what = f"`mitigation_lambda` cannot be `{self.scale}`"
            yield rules.BAD_VALUE(what, fix="Give what is left of an intruder: 1 for all, 0 for nothing.")


@dataclass(frozen=True)
class Reduced:
    """The new adapter, how many intruders each layer had, by path, and whether its tensors are wider than a base in half precision,
    as those of the old one."""

    made: Combined
    is_wide: bool = True
    intruders: Mapping[str, int] = field(default_factory=dict)


def reduced(session: Session, name: str, new: str, how: Mitigation, tell: Callable[[str], object]) -> Reduced:
    """The adapter `name` as one called `new`; `tell` hears of each layer. The model stays as it is.

    Raises `PeftcError` with everything that keeps it from that: numbers out of range, no such adapter, a name that is taken, an
    adapter that does more than add thin products to weights, or one whose start changed the base.
    """
    found = Collector()
    found.add(*how.problems(), *([name_taken(new)] if new in session.plans else []))
    found.raise_errors()
    session.require([name])
    plan = session.plans[name]
    refuse_sharded(session.ways_to([plan]), "its tensors are not here to be decomposed")
    found.add(*beside_weights(session, plan), *_beside_products(session, plan))
    found.raise_errors()
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for layer in session.layers_of(name):
        site = layer.site(name)
        place = f"{site.path}.{site.parameter}" if site.parameter else site.path
        slots, counts[place] = _of_layer(layer, name, how)
        kept = {label: slot for label, slot in labelled(site.slots).items() if not slot.derived}
        tensors |= {site.key(slot, new).disk(): slots[label] for label, slot in kept.items()}
        number = counts[place]
        tell(f"{plan.root}{place}: {f'Intruders: {number}' if number else 'No intruders'}")
    trained = tuple(f"{plan.root}{save.path}." for save in plan.saves)
    own = session.tensors(name).items() if trained else ()
    tensors |= {key: tensor.detach().clone() for key, tensor in own if key.startswith(trained)}
    wide = not any(t.dtype in _HALF for layer in session.layers_of(name) for _, t in layer.parameters_of(name))
    paths = frozenset[str]() if plan.adapts_parameters else frozenset(counts)  # the config says which parameters
    return Reduced(Combined(plan.config.model_copy(deep=True), paths, tensors), wide, counts)


def _beside_products(session: Session, plan: AdapterPlan) -> Iterator[Diagnostic]:
    """What an adapter has that is no thin product beside the original weight of a layer."""
    if changes_base(session, plan.name):
        what = f"The start of `{plan.name}` changed the base weights, which the new adapter would do anew"
        yield rules.CANNOT_CONVERT(what, fix=turning([plan.name]))
    for layer in session.layers_of(plan.name):
        path, tuner = layer.site(plan.name).path, layer.part(plan.name).tuner
        stacked = bool(layer.site(plan.name).layer.experts)
        if not tuner.is_rankable or not tuner.is_mergeable or (stacked and not tuner.joins):
            what = f"What `{plan.name}` ({plan.peft_type}) does to `{path}` is no product of thin factors that is added to its weight"
            fix = "Convert it first, if the method changes weights alone: `peftc.convert_adapter(model, ...)`."
            yield rules.CANNOT_CONVERT(what, fix=fix, where=path)
            return
        if _original(layer) is None:
            what = f"The weight of `{path}` cannot be read"
            yield rules.CANNOT_CONVERT(what, fix="Load the base without quantisation.", where=path)
            return


def _of_layer(layer: TunerLayer, name: str, how: Mitigation) -> tuple[Mapping[str, Tensor], int]:
    """The new slots of one layer, by label, and how many intruders there were; without any they are the old ones. Experts in one
    parameter are taken one by one."""
    site, part = layer.site(name), layer.part(name)
    facts, config, tuner = site.layer, site.config, part.tuner
    with torch.no_grad():
        A, B, scale = part.lowering("thin")(part.view.fixed(training=False))
        weight = _original(layer)
        assert weight is not None  # looked at before
        own = tuner.scaling(config, facts)
        same = math.isclose(own, float(part.view.scaling))
        if facts.experts:
            triples = zip(weight, A * float(scale), B, strict=True)
        else:
            triples = zip([weight.flatten(1)], [A.flatten(1) * float(scale)], [B.flatten(1)], strict=True)
        found = [_mitigated(W, first, second, own, how) for W, first, second in triples]
        number = sum(count for count, *_ in found)
        if not number and same:
            return {label: part.view[label].detach().clone() for label in labelled(site.slots)}, 0
        peft_type = str(config.peft_type)
        of_thin = guarded(tuner.of_thin, peft_type, site.path)
        one = one_of(facts) if facts.experts else facts
        slots = [of_thin(config, one, first.to(A.dtype), second.to(A.dtype)) for _, first, second in found]
        made = slots[0]
        if facts.experts:
            join = guarded(tuner.joined, peft_type, site.path)
            made = {label: join(config, facts, label, [[Former(each[label])] for each in slots]) for label in made}
    _require_shapes(site, made)
    return made, number


def _original(layer: TunerLayer) -> Tensor | None:
    """The base weight `(out, in)` that the adapter was trained beside, whatever other adapters have in its place now."""
    name = layer.parameter or WEIGHT
    own = layer.memory_of(name)
    return (
        layer.pristine().get(name)
        if own is None or layer.backend.opens_anew
        else layer.backend.to_logical(name, own.detach())
    )


def _mitigated(W: Tensor, A: Tensor, B: Tensor, scaling: float, how: Mitigation) -> tuple[int, Tensor, Tensor]:
    """How many intruders `B A` brings to a weight `(out, in)`, and factors of what is left of it, of the same rank, whose product a
    layer scales."""
    exact = torch.float64 if torch.float64 in (W.dtype, A.dtype) else torch.float32
    W, first, second = W.to(A.device, exact), A.to(exact), B.to(exact)
    before = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(W + second @ first, full_matrices=False)
    likeness = (U[:, : how.top_k].T @ before).abs().amax(dim=1)
    found = torch.nonzero(likeness < how.threshold).flatten()
    if not len(found):
        return 0, first / scaling if scaling else first, second
    rank = first.shape[0]
    first = torch.cat([first, Vh[found]])
    second = torch.cat([second, (how.scale - 1) * U[:, found] * S[found]], dim=1)
    left = of_thin(first, second, rank)
    first, second = _balanced(left.A, left.B, scaling)
    return len(found), padded(first, (rank, A.shape[1])), padded(second, (B.shape[0], rank))


def _balanced(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Closest factors for a layer that scales their product, each with the root of the singular values, so that both train alike."""
    B = B / scaling
    root = B.norm(dim=0).sqrt()
    share = torch.where(root > 0, root, 1)
    return A * share[:, None], B / share


def _require_shapes(site: MapSite, made: Mapping[str, Tensor]) -> None:
    for label, slot in labelled(site.slots).items():
        if not slot.derived and tuple(made[label].shape) != slot.shape:
            what = f"`{site.path}` has {label} {slot.shape}, in which no closest factors have a place"
            raise PeftcError(rules.CANNOT_CONVERT(what, fix="Keep the adapter as it is.", where=site.path))
