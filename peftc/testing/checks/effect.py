"""What an adapter does to the model's output: nothing at the start, nothing when disabled, the same when merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peftc.graph.nodes import LINEAR_KINDS, Kind
from peftc.model.peft_model import PeftModel
from peftc.runtime.layer.folding import adapted
from peftc.runtime.layer.parts import Part, Under
from peftc.runtime.layer.paths import compose, has_functional_form
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.testing.compare import close, different, objects_of, same, same_tensors, state_of
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, calls_of, layers_of, quiet, slots_of
from peftc.tuner.experts import PerExpert
from peftc.tuner.maps import Former

#: Lowerings that say the same in different words; `input` and `output` are two halves of one.
_WORDINGS = (("thin",), ("rescaled",), ("branch",), ("vectors",), ("params",), ("input", "output"))


def starts_as_declared(s: Subject) -> None:
    """Training should begin from the base model; a method that does not must say so."""
    start, base = s.output(s.wrap()), s.output(s.build())
    if not start.isfinite().all():
        raise broken("The output of a fresh adapter is not finite", "Correct `init`.")
    if not s.method.identity_at_start(s.config()):
        return
    fix = "Correct `init`, or say so with `identity_at_start`."
    close(start, base, "The output of a fresh adapter is not the base's: it", fix, tolerance=1e-6)


def acts_when_trained(s: Subject) -> None:
    """An adapter whose slots moved must change the output: otherwise nothing is learnt."""
    y, base = s.output(s.trained()), s.output(s.build())
    if not torch.isfinite(y).all():
        raise broken("The output with moved slots is not finite", "Correct the lowerings.")
    different(y, base, "Moved slots change nothing in the output", "Use the slots in the lowerings.")


def starts_from_the_seed(s: Subject) -> None:
    """Runs are repeated by seeding torch."""
    first, second = s.wrap().adapter_tensors("default"), s.wrap().adapter_tensors("default")
    same_tensors(second, first, "the adapter made again from one seed", "Draw random numbers from torch in `init`.")


def disabled_is_base(s: Subject) -> None:
    """Within `disable_adapter` the model computes as its base does, bit for bit."""
    model, base = s.trained(), s.output(s.build())
    before = s.output(model)
    with model.disable_adapter():
        same(s.output(model), base, "The output with the adapter disabled", "Act through slots only.")
    same(s.output(model), before, "The output after enabling again", "Keep no state between calls.")


def disabled_is_base_while_merged(s: Subject) -> None:
    """A merged model is asked for what its base says, as the reference model of a preference loss is: bit for bit."""
    model, base = s.trained(), s.output(s.build())
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    model.merge_adapter()
    state, y = state_of(model), s.output(model)
    different(y, base, "Merging changes nothing in the output", "Correct `params`, or what it is derived from.")
    fix = "Report this as a bug of peftc."
    with model.disable_adapter():
        same(s.output(model), base, "The output while merged and disabled", fix)
        for layer in layers:
            layer.enable_adapters(True)
        same(s.output(model), y, "The output while merged, every layer enabled", fix)
    for layer in layers:
        layer.enable_adapters(False)
    same(s.output(model), base, "The output while merged, every layer disabled", fix)
    for layer in layers:
        layer.enable_adapters(True)
    same_tensors(state_of(model), state, "the merged model", fix)
    model.unmerge_adapter()
    with model.disable_adapter():
        model.merge_adapter()
        same(s.output(model), base, "The output of a model merged while disabled", fix)
    same_tensors(state_of(model), state, "the model merged while disabled", fix)


def merged_equals_unmerged(s: Subject) -> None:
    """People train with an adapter beside the weights and serve with it merged."""
    model = s.trained(dtype=torch.float64)
    y = s.output(model, torch.float64)
    fix = "Correct `params` or the lowering that it is derived from."
    tolerance = s.model.tolerance
    model.merge_adapter(safe_merge=True)
    close(s.output(model, torch.float64), y, "The output while merged", fix, tolerance=tolerance)
    model.unmerge_adapter()
    config = getattr(model.get_base_model(), "config", None)
    if config is not None:
        config.tie_word_embeddings = False  # where an adapter parts the two, both are to be kept
    merged = model.merge_and_unload()
    close(s.output(merged, torch.float64), y, "The output of the merged model", fix, tolerance=tolerance)
    torn = [name for name, parameter in merged.named_parameters() if not parameter.is_contiguous()]
    if torn:
        raise broken(
            f"`{torn[0]}` is not contiguous after merging, and cannot be saved", "Report this as a bug of peftc."
        )


def unmerging_restores(s: Subject) -> None:
    """Merging is tried out on models that go on training: nothing may be left of it."""
    model = s.trained()
    objects, state, y = objects_of(model), state_of(model), s.output(model)
    model.merge_adapter()
    model.unmerge_adapter()
    if objects_of(model) != objects:
        raise broken("Unmerging leaves other parameter objects", "Compute new tensors; do not replace the layer's own.")
    same_tensors(state_of(model), state, "the unmerged model", "Change nothing in place in `params`.")
    same(s.output(model), y, "The output after unmerging", "Change nothing in place in `params`.")


def merging_leaves_tensors_alone(s: Subject) -> None:
    """Base weights may be memory-mapped, shared with other processes, or tied to other layers."""
    model = s.trained()
    before = {id(p): p.detach().clone() for p in model.parameters()}
    own = list(model.parameters())
    model.merge_adapter()
    for p in own:
        same(p, before[id(p)], "A tensor of the model was changed in place by merging: it", "Return new tensors.")


def lowerings_agree(s: Subject) -> None:
    """The core picks the cheapest lowering that fits; which one it is must not matter."""
    model = s.trained(dtype=torch.float64)
    for path, layer, args in _layer_calls(s, model):
        with torch.no_grad(), s.calling(model):
            results = dict(_each_way(layer, args))
            results["the layer"] = layer(*args)
        first, *others = results
        for other in others:
            what = f"What `{other}` gives for `{path}`, compared with `{first}`,"
            close(results[other], results[first], what, "Let all lowerings say the same.", tolerance=1e-9, where=path)


def combining_adds_updates(s: Subject) -> None:
    """A method that makes slots of thin factors must give an adapter with them that does what the factors say."""
    model = s.trained(dtype=torch.float64)
    layers = layers_of(model)
    if not all(layer.part("default").tuner.is_rankable for layer in layers.values()):
        return
    s.join(model, "second")
    with quiet():
        model.add_weighted_adapter(["default", "second"], [2.0, -1.0], "both", "cat")
    for path, layer in layers.items():
        wanted = 2.0 * layer.get_delta_weight("default") - layer.get_delta_weight("second")
        what = f"The update of adapters combined on `{path}`, compared with their sum,"
        fix = "Let `of_thin` invert `thin`, for the options that `of_rank` gives."
        close(layer.get_delta_weight("both"), wanted, what, fix, tolerance=1e-9, where=path)


def any_leading_shape(s: Subject) -> None:
    """Layers are called with `(batch, length, features)`, `(tokens, features)` or one vector."""
    model = s.trained(dtype=torch.float64)
    for path, layer, args in _layer_calls(s, model):
        if layer.site("default").layer.kind not in LINEAR_KINDS:
            continue
        with torch.no_grad():
            y = layer(*args)
            flat = layer(args[0].flatten(0, -2))
        fix = "Let the lowerings act on the last dimension."
        close(flat, y.flatten(0, -2), f"`{path}` on two-dimensional input", fix, tolerance=1e-9, where=path)
        if layer.site("default").layer.kind is not Kind.LINEAR:  # the layer itself takes contiguous input only
            continue
        with torch.no_grad():
            turned = layer(args[0].movedim(0, -2).contiguous().movedim(-2, 0))
        close(turned, y, f"`{path}` on non-contiguous input", fix, tolerance=1e-9, where=path)


def half_precision_bases(s: Subject) -> None:
    """Beside float16 and bfloat16 weights adapters train in float32, and in the same precision if that is asked for."""
    models = {dtype: s.trained(dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    for dtype, model in models.items():
        wrong = {p.dtype for p in slots_of(model, "default", trainable=False).values()} - {torch.float32}
        if wrong:
            raise broken(f"Beside {dtype} weights slots are {wrong}", "Leave `dtype` of a slot out.")
    expected = s.output(s.trained())
    for dtype, model in models.items():
        y = s.output(model, dtype)
        if y.dtype != dtype:
            raise broken(f"The output of a {dtype} model is {y.dtype}", "Return what the layer returns.")
        close(y.float(), expected, f"The output in {dtype}", "Compute in the slots' dtype.", tolerance=0.1)
        grown = s.grown(model, dtype)
        if not grown or not all(g.isfinite().all() for g in grown.values()):
            raise broken(f"Gradients in {dtype} are missing or not finite", "Compute in the slots' dtype.")
        with quiet():
            lean = PeftModel(s.build(dtype), s.config(), autocast_adapter_dtype=False).eval()
        if not s.output(lean, dtype).isfinite().all():
            fix = "Lift what needs precision inside the lowering."
            raise broken(f"The output with {dtype} slots is not finite", fix)


def experts_change_as_layers(s: Subject) -> None:
    """The mathematics of one linear layer is used for each expert: it must change each as if it were a layer alone."""
    model = s.trained(dtype=torch.float64)
    for path, layer in layers_of(model).items():
        part = layer.part("default")
        if not isinstance(part.tuner, PerExpert):
            continue
        changed, stacked = (
            layer.changes("default")[part.parameter],
            part.tuner.stacked(part.view.config, part.view.layer),
        )
        for index, weight in enumerate(layer.pristine()[part.parameter]):
            alone = _alone(s, part.parameter, weight)
            for label, slot in alone.part("default").view.tensors().items():
                own = part.view.tensors()[label]
                slot.detach().copy_(own[index] if label in stacked else own)
            what = f"The change of expert {index} of `{path}`, compared with that of a layer,"
            fix = "Let slots and lowerings depend on the sizes of the layer, and not on what it is in."
            close(changed[index], alone.get_delta_weight("default"), what, fix, tolerance=1e-9, where=path)


def experts_part_and_join(s: Subject) -> None:
    """Slots of experts are written for single layers, and read from them: both ways together must give the same slots."""
    for path, layer in layers_of(s.trained()).items():
        part = layer.part("default")
        config, facts, slots = part.view.config, part.view.layer, part.view.tensors()
        if not facts.experts or not (part.tuner.joins or isinstance(part.tuner, PerExpert)):
            continue
        with torch.no_grad():
            rows = part.tuner.parted(config, facts, 1, slots)
            labels = rows[0][0]
            made = {
                label: part.tuner.joined(config, facts, label, [[Former(row[0][label])] for row in rows])
                for label in labels
            }
        for label, joint in made.items():
            fix = "Let `joined` put every expert where `parted` takes it from."
            same(joint, slots[label].detach(), f"`{label}` of `{path}`, parted and joined,", fix)


def _alone(s: Subject, name: str, weight: Tensor) -> TunerLayer:
    """A linear layer of this name with a fresh adapter."""
    outs, ins = weight.shape
    linear = torch.nn.Linear(ins, outs, bias=False, dtype=weight.dtype)
    linear.weight.detach().copy_(weight)
    with quiet():
        model = PeftModel(
            torch.nn.ModuleDict({name: linear}), s.method.config(**{**s.options, "target_modules": [name]})
        )
    return layers_of(model)[name]


def compiles(s: Subject) -> None:
    """`torch.compile` must see one graph and give the same output and gradients; on one model of the method, without
    gradients too, which is a graph of its own."""
    model = s.trained()
    y, grown = s.output(model), s.grown(model)
    compiled = s.trained()
    compiled.compile(backend="aot_eager", fullgraph=True)
    try:
        for found in (s.run(compiled).detach(), *([s.output(compiled)] if s.foremost else ())):
            close(found, y, "The output of the compiled model", "Use torch operations only.", tolerance=1e-5)
        for name, gradient in s.grown(compiled).items():
            what = f"The compiled gradient of `{name}`"
            close(gradient, grown[name], what, "Use torch operations only.", tolerance=1e-4)
    finally:
        torch._dynamo.reset()


def _layer_calls(s: Subject, model: PeftModel) -> Iterator[tuple[str, TunerLayer, tuple[Tensor, ...]]]:
    """Each adapted layer with the arguments that the model calls it with."""
    layers = layers_of(model)
    calls = calls_of(layers, lambda: s.output(model, torch.float64))
    yield from ((path, layer, calls[path]) for path, layer in layers.items())


def _each_way(layer: TunerLayer, args: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    """The layer's output by each lowering that the method gives, in the forward and folded into the parameters."""
    base, backend, part = layer.get_base_layer(), layer.backend, layer.part("default")
    under = Under(base, base, backend, tuple, dict)
    for words in _WORDINGS:
        given = part.tuner.lowerings & set(words)
        if not given:
            continue
        alone = copy.copy(part.tuner)
        vars(alone)["lowerings"] = given
        parts = [Part(alone, part.view, part.path, None)]
        name = " and ".join(word for word in words if word in given)
        if has_functional_form(alone, backend):
            forward: Callable[..., Tensor] = compose(under, parts)
            yield name, forward(*args)
        if given != {"branch"}:
            yield f"{name}, folded into parameters", backend.run(base, adapted(under, parts), args, {})
