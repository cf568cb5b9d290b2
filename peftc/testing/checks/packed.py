"""Layers whose weight a storage packs: methods do on them what they do on plain layers with the opened weights, or say why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import boundary
from peftc.testing.cells import cell_of
from peftc.testing.checks.cells import refused_as_planned
from peftc.testing.checks.lifecycle import clash
from peftc.testing.compare import close, same, same_names, same_tensors, state_of
from peftc.testing.packed import PackedModel
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, layers_of
from peftc.tuner.storage import Storage

_CORE = "Report this as a bug of peftc."
#: The largest share of an output that rounding in calls may explain.
_LOOSE = 0.05
_FIX = "Read the base weight through the view alone, and let the lowerings say the same."


def trains_as_on_plain_layers(s: Subject) -> None:
    """An adapter on packed layers learns as on plain ones with the opened weights, biases too, or is refused: by the plan as by the
    model."""
    cell = cell_of(s)
    if cell.codes:
        refused_as_planned(s, cell)
        return
    biases: dict[str, Any] = {"bias": "all"} if s.first and "bias" in s.method.config.model_fields else {}
    model, twin, near = s.trained(**biases), _plain(s).trained(**biases), _near(s)
    _train(s, model)
    own, others = dict(model.named_parameters()), dict(twin.named_parameters())
    for step in range(2):
        close(s.output(model), s.output(twin), f"The output after {step} steps on packed layers", _FIX, tolerance=near)
        found, wanted = s.grown(model), s.grown(twin)
        same_names(found, wanted, "The set of tensors with a gradient on packed layers", _FIX)
        for name, gradient in wanted.items():
            close(found[name], gradient, f"The gradient of `{name}` on packed layers", _FIX, tolerance=10 * near)
            for parameters in (own, others):
                parameters[name].detach().sub_(0.01 * gradient)


def merges_into_packed_layers(s: Subject) -> None:
    """Merging packs the changed weight anew, as near as the storage rounds; unmerging brings back the bits. A storage that takes
    no other weight says so, and nothing is changed."""
    if cell_of(s).codes:
        return
    model, twin = s.trained("first"), _plain(s).trained("first")
    for one in (model, twin):
        s.join(one, "second")
        if not clash(one):
            one.set_adapter(["first", "second"])
    y, state = s.output(model), state_of(model)
    if _sealed(s, model):
        _stays(s, model, y)
        return
    twin.merge_adapter()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        _as_near_as_it_rounds(s, model, twin)
        model.unmerge_adapter()
        same_tensors(state_of(model), state, "the model unmerged from packed layers", _CORE)
        same(s.output(model), y, "The output after unmerging from packed layers", _CORE)


def _as_near_as_it_rounds(s: Subject, model: PeftModel, twin: PeftModel) -> None:
    """What layers hold is what was to be merged, up to what packing that loses; twice that, where numbers lie between two."""
    storage = _storage(s)
    for path, layer in layers_of(twin, "first").items():
        base, plain = model.session.layers[path].get_base_layer(), layer.get_base_layer()
        if path not in _model(s).packed_paths:
            continue
        wanted = plain.get_parameter("weight").detach()
        with torch.no_grad(), boundary(f"the storage `{storage.name}`", "pack", path):
            found, lost = storage.open(base).float(), _packed_and_opened(s, wanted) - wanted
        rounding = float(lost.abs().max()) + 1e-6
        if float((found - wanted).abs().max()) > 2 * rounding:
            off = float((found - wanted).abs().max())
            what = f"The weight that was merged into `{path}` is off by {off:.3g}, and packing it loses {rounding:.3g}"
            raise broken(what, "Correct `params`, or the storage's `open` and `pack`.", path)


def _packed_and_opened(s: Subject, weight: Tensor) -> Tensor:
    """A weight as the storage has it, by a layer of its own."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], False)
    plain.weight = nn.Parameter(weight.clone())
    opened: Tensor = _storage(s).open(_storage(s).example(plain))
    return opened.float()


def _sealed(s: Subject, model: PeftModel) -> bool:
    """Whether a weight that adapters change is in a layer that takes no other."""
    changed = (layer for path, layer in layers_of(model, "first").items() if path in _model(s).packed_paths)
    return any(_storage(s).cannot_pack(layer.get_base_layer()) for layer in changed)


def _stays(s: Subject, model: PeftModel, y: Tensor) -> None:
    try:
        model.merge_adapter()
    except PeftcError as error:
        if {problem.code for problem in error.diagnostics} == {rules.PACKED_FOR_GOOD.code}:
            same(s.output(model), y, "The output after a merge into packed layers was refused", _CORE)
            return
        raise
    raise broken(f"`{_storage(s).name}` takes no other weight, and merging is not refused", _CORE)


def _plain(s: Subject) -> Subject:
    """The same on plain layers with the opened weights."""
    return replace(s, model=_model(s).plain)


def _train(s: Subject, model: nn.Module) -> None:
    """Put the packed layers alone into training: some libraries round their inputs as well where they are not."""
    packed = {type(layer) for layer in _model(s).packed_in(s.build()).values()}
    for module in model.modules():
        if type(module) in packed:
            module.training = True


def _near(s: Subject) -> float:
    """How far outputs may be apart: as far as those of the bare models are, for libraries round in calls as well."""
    base = s.build()
    _train(s, base)
    y = s.output(base)
    apart = float((y - s.output(_plain(s).build())).abs().max())
    if apart > _LOOSE * float(y.abs().max()):
        what = f"`{_storage(s).name}` opens other weights than its layers compute with: outputs are {apart:.3g} apart"
        raise broken(what, "Correct `open`.")
    return 1e-5 + 4 * apart


def _model(s: Subject) -> PackedModel:
    assert isinstance(s.model, PackedModel)
    return s.model


def _storage(s: Subject) -> Storage:
    return _model(s).storage
