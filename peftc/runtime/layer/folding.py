"""The parameters of a base layer as adapters change them: what merging puts in their place, and what a layer runs with where a
method can do nothing but change parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.graph.nodes import Kind
from peftc.ops.transposed import transposed
from peftc.registry.boundary import guarded
from peftc.runtime.bases.backend import Backend
from peftc.runtime.bases.places import tensor_of
from peftc.runtime.bases.table import BACKENDS
from peftc.runtime.layer.affine import Form, form_of
from peftc.runtime.layer.experts import over_experts
from peftc.runtime.layer.parts import Part, Under
from peftc.runtime.layer.sums import Sums, is_sum
from peftc.runtime.slots.views import LayerView
from peftc.tuner.experts import PerExpert


def opened(under: Under) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base layer's logical parameters: as they are, and as they were before any merge."""
    running = under.backend.opened(under.inner)
    kept = under.aside()
    return running, under.backend.opened_with(under.inner, kept) if kept else dict(running)


def trained_of(under: Under) -> dict[str, Tensor]:
    """Logical parameters of the base layer that train along, such as its bias, part of the graph."""
    trained = [name for name, own in under.inner._parameters.items() if own is not None and own.requires_grad]
    found = ((name, tensor_of(under.inner, name)) for name in trained)
    return {name: under.backend.to_logical(name, own) for name, own in found if own is not None}


def adapted_as_trained(under: Under, parts: Sequence[Part]) -> Mapping[str, Tensor]:
    """The same as `adapted`, differentiable in parameters of the base layer that train along too."""
    running, pristine = opened(under)
    return folded(under, parts, {**running, **trained_of(under)}, pristine)


def adapted(under: Under, parts: Sequence[Part]) -> Mapping[str, Tensor]:
    """The base layer's logical parameters with the adapters folded in, in activation order; the first change of each to
    the running parameters `p`, beside the pristine `p0`. Differentiable in the slots."""
    return folded(under, parts, *opened(under))


def folded(
    under: Under, parts: Sequence[Part], running: Mapping[str, Tensor], pristine: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The parameters that adapters change, with all of them folded in, first to last; `running` are the layer's as they are,
    `pristine` as they were before any merge. Both in logical order."""
    base, backend = under.inner, under.backend
    for part in parts:
        dtype = torch.promote_types(part.view.dtype(), next(iter(pristine.values())).dtype)
        summed = _summed(part, running["weight"], pristine) if is_sum(part.tuner, part.parameter) else None
        if summed is not None:
            running = {**running, "weight": summed}
            continue
        if part.parameter:
            name = part.parameter
            p, p0 = _widened({"weight": running[name]}, {"weight": pristine[name]}, dtype)
            running = {**running, name: _changed_parameter(base, backend, part, p, p0)}
            continue
        p, p0 = _widened(running, pristine, dtype)
        running = {**running, **_changed(base, backend, part, p, p0)}
    return running


def refuse_waiting(parts: Sequence[Part]) -> None:
    """Raise `PeftcError` if one of these adapters acts on some tokens only: changed parameters act on all."""
    for part in parts:
        if part.tuner.waits:
            name = part.view.config.peft_type
            what = f"{name} acts from some token of a call on at `{part.path}`, and a weight acts on all"
            raise PeftcError(rules.CANNOT_MERGE(what, fix="Keep the adapter beside the model.", where=part.path))


def _summed(part: Part, weight: Tensor, pristine: Mapping[str, Tensor]) -> Tensor | None:
    """`W + s · B A` without widening the whole weight beside it, where nothing is to be differentiated and the product is of that
    kind of number; else None."""
    sums = Sums.of([part], weight, next(iter(pristine.values())).dtype)
    if sums is None:
        return None
    made = torch.empty_like(weight, dtype=sums.dtype)
    sums.whole(sums.lying(weight), sums.lying(made))
    return made


def _widened(
    running: Mapping[str, Tensor], pristine: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both in a dtype; what is one tensor in both stays one, so that a large weight is not there twice."""
    p = {name: tensor.to(dtype) for name, tensor in running.items()}
    return p, {name: p[name] if t is running.get(name) else t.to(dtype) for name, t in pristine.items()}


def _changed_parameter(
    base: nn.Module, backend: Backend, part: Part, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]
) -> Tensor:
    """The weights of all experts; where the mathematics is that of one, as it changes a linear layer's."""
    tuner = part.tuner
    if not isinstance(tuner, PerExpert):
        return _changed(base, backend, part, p, p0)["weight"]
    one, linear = tuner.one, BACKENDS[Kind.LINEAR]

    def fold(view: LayerView, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _changed(base, linear, Part(one, view, part.path, None, part.parameter, known=part.known), p, p0)

    return over_experts(tuner, part.view, fold, p, p0)


def _changed(
    base: nn.Module, backend: Backend, part: Part, p: Mapping[str, Tensor], p0: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    tuner, view = part.tuner, part.view
    if "params" in tuner.lowerings:
        changed = dict(part.lowering("params")(view, p, p0))
        if not changed.keys() <= p.keys():
            raise PeftcError(_of_no_parameter(part, p, changed))
        return changed
    if "thin" in tuner.lowerings:
        A, B, scale = part.lowering("thin")(view)
        if view.layer.experts:
            return {**p, "weight": torch.baddbmm(p["weight"], B * scale, A)}
        return {**p, "weight": p["weight"] + scale * (B.flatten(1) @ A.flatten(1))}
    if "rescaled" in tuner.lowerings:
        A, B, scale, gain = part.lowering("rescaled")(view)
        return {**p, "weight": (p["weight"] + scale * (B.flatten(1) @ A.flatten(1))) * gain.unsqueeze(1)}
    if "vectors" in tuner.lowerings and backend.vector_axis is not None:
        index, values = part.lowering("vectors")(view)
        rows = values if backend.vector_axis == 0 else values.t()
        return {**p, "weight": p["weight"].index_copy(backend.vector_axis, index, rows.to(p["weight"].dtype))}
    if not tuner.lowerings & {"input", "output"}:
        what = f"{view.config.peft_type} says what it adds to an output, not how it changes the weight"
        fix = "Keep it beside the model, alone on its layer; the plugin would have to give `params` or `thin`."
        if tuner.beside:
            what = f"The update of `{part.path}` is no change of its weight: {tuner.beside}"
            fix = "Keep the adapter beside the model, or exclude such layers when it is trained (`exclude_modules`)."
        raise PeftcError(rules.CANNOT_MERGE(what, fix=fix, where=part.path))
    changed = dict(p)
    if "input" in tuner.lowerings:
        changed["weight"] = _weight_after_input(base, backend, part, changed["weight"])
    return changed | _after_output(base, part, changed) if "output" in tuner.lowerings else changed


def _after_output(base: nn.Module, part: Part, p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias where `output` is `y -> M y + c`: `M W`, and `M b + c`. A layer that has no bias gets one if c is due.

    Raises `PeftcError` if it is no such map, or c has no place.
    """
    output, view, spares = part.lowering("output"), part.view, part.tuner.spares_bias
    form, weight = form_of_output(part), output(view, p["weight"].t())
    if form is Form.LINEAR:
        return {"weight": weight.t(), **({"bias": output(view, p["bias"])} if "bias" in p and not spares else {})}
    has_place = "bias" in p or ("bias" in base._parameters and not part.parameter)
    if form is Form.NEITHER or spares or not has_place:
        raise PeftcError(_no_fold(part, form))
    constant = output(view, weight.new_zeros(weight.shape[-1]))
    return {"weight": (weight - constant).t(), "bias": output(view, p["bias"]) if "bias" in p else constant}


def form_of_output(part: Part) -> Form:
    """What the method's `output` is, found out once for an adapter's layer."""
    if "form" not in part.known:
        part.known["form"] = _tried(part)
    return part.known["form"]


def _tried(part: Part) -> Form:
    tuner, view = part.tuner, part.view
    if isinstance(tuner, PerExpert):
        own = tuner.stacked(view.config, view.layer)
        tensors = {label: tensor[0] if label in own else tensor for label, tensor in view.tensors().items()}
        tuner, view = tuner.one, view.of_expert(tensors)
    if "output" not in tuner.lowerings or tuner.lowerings & {"params", "thin", "rescaled", "vectors"}:
        return Form.LINEAR
    return form_of(guarded(tuner.output, str(view.config.peft_type), part.path), view)


def _no_fold(part: Part, form: Form) -> Diagnostic:
    name, path = part.view.config.peft_type, part.path
    if form is Form.NEITHER:
        what = f"`output` of {name} is neither a linear map nor one with a constant, so that no weight of `{path}` does the same"
        fix = "Keep it beside the model. In the plugin: give `branch` in place of `output`, which is not folded."
    elif part.tuner.spares_bias:
        what = f"`output` of {name} adds a constant, and is declared to spare the bias (`spares_bias`)"
        fix = "In the plugin: leave out `spares_bias`, or the constant."
    else:
        what = f"`output` of {name} adds a constant, and `{path}` has no bias that could take it"
        fix = "Keep it beside the model. In the plugin: leave such kinds of layer out of `supports`, or give `branch` there."
    return rules.CANNOT_MERGE(what, fix=fix, where=path)


def _of_no_parameter(part: Part, known: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Diagnostic:
    names = ", ".join(f"`{name}`" for name in changed if name not in known)
    what = f"`params` of {part.view.config.peft_type} gives {names}, which the layer has not; it has {', '.join(known)}"
    fix = "Give only parameters that are in `p`: `a.layer.has_bias` tells whether there is a bias."
    return rules.PLUGIN_INVALID(what, fix=fix, where=part.path)


def _weight_after_input(base: nn.Module, backend: Backend, part: Part, weight: Tensor) -> Tensor:
    """`W M` where `input` is `x -> M x`: the vector-Jacobian product of `input` at W, so M is never formed."""
    patches = part.tuner.input_space == "patches"
    rows = backend.input_rows(weight, base, patches)
    product = transposed(lambda x: part.lowering("input")(part.view, x), rows)
    return backend.from_input_rows(product, weight, base, patches)
