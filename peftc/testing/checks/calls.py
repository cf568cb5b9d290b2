"""What a method's functions may do when they are called: give tensors of the right shapes, and change nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.sites import MapSite
from peftc.graph.nodes import CONV_KINDS, LINEAR_KINDS, Kind, LayerFacts
from peftc.model.peft_model import PeftModel
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.testing.compare import same, state_of
from peftc.testing.models import seeded
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, calls_of, layers_of, quiet

#: What lowerings must return, for the messages.
_RETURNS = {
    "thin's A": "`(r, in · kernel)`",
    "thin's B": "`(out, r)`",
    "rescaled's A": "`(r, in · kernel)`",
    "rescaled's B": "`(out, r)`",
    "rescaled's g": "`(out,)`",
    "branch": "the shape of the layer's output",
    "input": "the shape of the input, which only linear maps of its last dimension keep",
    "output": "the shape of the output",
}


def lowerings_have_their_shapes(s: Subject) -> None:
    """What a lowering returns is added to, or takes the place of, tensors of the base layer, whose shapes it must have."""
    model, base = s.trained(dtype=torch.float64), s.build(torch.float64)
    layers = layers_of(model)
    arguments = calls_of({path: base.get_submodule(path) for path in layers}, lambda: s.output(base, torch.float64))
    for path, layer in layers.items():
        with torch.no_grad(), s.calling(model):
            for name, found, expected in _shapes(layer, arguments.get(path, ())):
                if found != expected:
                    what = f"`{name}` gives {found} on `{path}`, where {expected} is due"
                    raise broken(what, f"Return {_RETURNS.get(name, 'what the layer has')}.", path)


def _shapes(layer: TunerLayer, args: tuple[Tensor, ...]) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Each thing that the method's lowerings give for a layer: its name, its shape, and the shape that it must have."""
    facts, part, base = layer.site("default").layer, layer.part("default"), layer.get_base_layer()
    given, view = part.tuner.lowerings, part.view
    if "thin" in given:
        A, B, _ = part.lowering("thin")(view)
        yield "thin's A", tuple(A.flatten(1).shape), (A.shape[0], _fan_in(facts))
        yield "thin's B", tuple(B.flatten(1).shape), (facts.out_features, A.shape[0])
    if "rescaled" in given:
        A, B, _, gain = part.lowering("rescaled")(view)
        yield "rescaled's A", tuple(A.flatten(1).shape), (A.shape[0], _fan_in(facts))
        yield "rescaled's B", tuple(B.flatten(1).shape), (facts.out_features, A.shape[0])
        yield "rescaled's g", tuple(gain.shape), (facts.out_features,)
    if "branch" in given and args:
        y0 = base(*args)
        yield "branch", tuple(part.lowering("branch")(view, args[0], y0).shape), tuple(y0.shape)
    if facts.kind in LINEAR_KINDS | CONV_KINDS | {Kind.EMBEDDING}:
        width = _fan_in(facts) if part.tuner.input_space == "patches" else facts.in_features
        for name, size in (("input", width), ("output", facts.out_features)):
            if name in given and not (name == "input" and facts.kind is Kind.EMBEDDING):
                rows = torch.ones(3, size, dtype=torch.float64)
                yield name, tuple(part.lowering(name)(view, rows).shape), (3, size)
    if "params" in given:
        p = {name: tensor.clone() for name, tensor in layer.backend.opened(base).items()}
        after = part.lowering("params")(view, dict(p), dict(p))
        for name, tensor in p.items():
            shape = tuple(after[name].shape) if name in after else ()
            yield f"params' {name}", shape, tuple(tensor.shape)


def _fan_in(facts: LayerFacts) -> int:
    return facts.in_features // facts.groups * math.prod(facts.kernel)


def calls_change_nothing(s: Subject) -> None:
    """A call computes: the same every time in evaluation mode, and without a trace in what it was given."""
    model = s.trained()
    if s.method.is_prompt:
        s.output(model)  # the first may bring slots back to where they may be (`constrain`), all further ones not
    options, state = _options_of(model), state_of(model)
    with seeded(5):
        before = torch.random.get_rng_state()
        first = s.output(model)
        if not torch.equal(torch.random.get_rng_state(), before):
            fix = "Draw random numbers in `init`, and elsewhere in training only."
            raise broken("A call in evaluation mode draws from torch's random numbers", fix)
    same(s.output(model), first, "The output of a second call with the same input", "Keep no state between calls.")
    layers = layers_of(model) if s.method.adapts_layers else {}
    for path, args in calls_of(layers, lambda: s.output(model)).items():
        kept = [arg.clone() for arg in args]
        with torch.no_grad(), s.calling(model):
            layers[path](*args)
        for arg, before_call in zip(args, kept, strict=True):
            same(arg, before_call, f"The input of `{path}` after a call", "Change no tensor in place.", path)
    for name, tensor in model.state_dict().items():
        same(tensor, state[name], f"`{name}` after a call", "Change no tensor in place.", name)
    if _options_of(model) != options:
        raise broken("A call changed the config", "Only read `a.config`.")


def starting_leaves_the_config_alone(s: Subject) -> None:
    """The config that is saved is the one that was planned, whatever the method does with it when it starts."""
    with quiet():
        plan = compile_plan(s.model.graph, {"default": s.config()}).adapters[0]
    planned = {"": plan.config.to_dict(), **{_key(site): site.config.to_dict() for site in plan.maps}}
    found = _options_of(s.wrap())
    changed = sorted(
        {
            name
            for key in planned.keys() & found.keys()
            for name, value in planned[key].items()
            if found[key][name] != value
        }
    )
    if changed:
        raise broken(f"Starting an adapter changed its options {changed}", "Only read the config that `init` is given.")


def _options_of(model: PeftModel) -> dict[str, dict[str, Any]]:
    """The options that the adapter's config and each of its layers have now; layers compute by copies of their own."""
    sites = [layer.site("default") for layer in model.session.wrappers() if "default" in layer.adapters]
    own = {_key(site): site.config.to_dict() for site in sites}
    return {"": model.peft_config["default"].to_dict(), **own}


def _key(site: MapSite) -> str:
    return f"{site.path}:{site.parameter}"
