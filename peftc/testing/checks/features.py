"""The feature matrix is true: what a method's record comes to works, and what it does not have is refused with a diagnostic."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch import nn

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.diagnostics import PeftcError
from peftc.model.functions.conversion import convert_adapter
from peftc.model.functions.hotswap import hotswap_adapter_from_state_dict
from peftc.model.functions.state import set_peft_model_state_dict
from peftc.model.mapping import get_peft_model
from peftc.model.peft_model import PeftModel
from peftc.registry.manager import default_registry
from peftc.testing.compare import close, different, same, same_names
from peftc.testing.models import MODELS
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, layers_of, quiet
from peftc.tuner.features import features_of

_CORE = "Report this as a bug of peftc."


def what_is_not_declared_is_refused(s: Subject) -> None:
    """Someone who asks for what a method cannot do must be told, and not get something else."""
    model = s.trained("first")
    s.join(model, "second")
    asked: dict[str, Callable[[], object]] = {
        "together": lambda: model.set_adapter(["first", "second"]),
        "rows": lambda: s.rows(model, ["first", "second"] * 3),
        "mixed": lambda: get_peft_model(s.build(), s.config(), mixed=True),
        "merge": lambda: model.merge_adapter(["first"]),
        "combine": lambda: model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both"),
        "convert": lambda: convert_adapter(model, _thin_type(), 1, "first"),
        "swap": lambda: _swap(model, s.trained("first"), "first", s),
        "exclude": lambda: s.config(exclude_modules=["lin1"]),
        "layers": lambda: s.config(layers_to_transform=[0]),
        "save": lambda: s.config(modules_to_save=["norm"]),
        "bias": lambda: s.config(bias="all"),
    }
    if not s.method.adapts_layers:
        del asked["combine"]  # models without adapters on layers have no such function
    own = features_of(s.method)
    features = {**own["uses"], **own["options"]}
    for name, ask in asked.items():
        if features[name]:
            continue
        try:
            with quiet():
                ask()
        except PeftcError:
            continue
        raise broken(f"`{name}`, which the method does not have, is not refused", _CORE)


def what_experts_cannot_is_refused(s: Subject) -> None:
    """Experts see no rows of a batch, and their updates are no single matrix: what needs these is told."""
    model = s.trained("first")
    s.join(model, "second")
    asked: dict[str, Callable[[], object]] = {
        "rows": lambda: s.rows(model, [("first", "second")[row % 2] for row in range(len(s.output(model)))]),
        "combine": lambda: model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both"),
        "convert": lambda: convert_adapter(model, _thin_type(), 1, "first"),
        "mixed": lambda: get_peft_model(s.build(), s.config(), mixed=True),
    }
    for name, ask in asked.items():
        try:
            with quiet():
                ask()
        except PeftcError:
            continue
        raise broken(f"`{name}`, which adapters of single parameters have not, is not refused", _CORE)


def _thin_type() -> str:
    """A method that makes adapters of thin factors, and whose options may all be left out."""
    registry = default_registry()
    able = (method for method in map(registry.get, registry.names) if method.is_rankable)
    return next(method.peft_type for method in able if not any(method.problems(method.least())))


def other_kinds_are_refused(s: Subject) -> None:
    """A layer whose kind the method does not declare is not adapted by mistake."""
    known = s.method.supports
    for model in (model for model in MODELS if not model.is_language_model):
        strange = {node.facts.kind: node.path for node in model.graph.nodes if node.facts.kind not in known}
        for kind, path in strange.items():
            try:
                with quiet():
                    compile_plan(model.graph, {"default": s.config(target_modules=[path or "."])})
            except PeftcError:
                continue
            fix = "Add the kind to `supports`, or let no other mathematics be chosen for it."
            raise broken(f"A layer of the kind {kind}, which the method does not declare, is adapted", fix, path)


def excluded_modules_are_left_alone(s: Subject) -> None:
    """`exclude_modules` is for all methods that choose among modules."""
    if not features_of(s.method)["options"]["exclude"] or not s.targets or len(s.targets) < 2:
        return
    with quiet():
        plan = compile_plan(s.model.graph, {"default": s.config(exclude_modules=[s.targets[0]])})
    adapted = [site.path for site in plan.adapters[0].maps]
    same_names(adapted, s.targets[1:], "The set of adapted modules, of which one is excluded,", _CORE)


def biases_train_along(s: Subject) -> None:
    """The option `bias` has the same values for all methods: `none`, `all`, and `<type>_only` for those of adapted layers."""
    if not features_of(s.method)["options"]["bias"]:
        return
    own = f"{s.method.peft_type.lower()}_only"
    biased = [node.path for node in s.model.graph.nodes if node.facts.has_bias]
    for mode in ("all", own):
        with quiet():
            plan = compile_plan(s.model.graph, {"default": s.config(bias=mode)}).adapters[0]
        wanted = [path for path in biased if mode == "all" or path in {site.path for site in plan.maps}]
        fix = f"Let `bias` take `none`, `all` and `{own}`."
        same_names([train.path for train in plan.trains], wanted, f"The set of biases that `bias={mode}` trains", fix)
    _refuses(s, "bias", "some", f'Let its type be `Literal["none", "all", "{own}"]`.')


def _refuses(s: Subject, name: str, value: str, fix: str) -> None:
    try:
        with quiet():
            compile_plan(s.model.graph, {"default": s.config(**{name: value})})
    except PeftcError:
        return
    raise broken(f"`{name}` takes `{value}`, which means nothing", fix)


def patterns_reach_their_layer(s: Subject) -> None:
    """An option set by a pattern counts on the modules it means, and nowhere else."""
    if not s.targets:
        return
    for pattern, option in s.method.config.pattern_options.items():
        value = getattr(s.config(), option)
        changed = (value or 1) * 2 if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        with quiet():
            plan = compile_plan(s.model.graph, {"default": s.config(**{pattern: {s.targets[0]: changed}})})
        found = {site.path: getattr(site.config, option) for site in plan.adapters[0].maps}
        wanted = {path: changed if path == s.targets[0] else value for path in found}
        if found != wanted:
            raise broken(f"`{pattern}` gives `{option}` as {found}, not {wanted}", "Correct `pattern_options`.")


def saved_modules_ride_along(s: Subject) -> None:
    """`modules_to_save` trains a whole module beside the adapter: it is saved and loaded with it."""
    if not features_of(s.method)["options"]["save"]:
        return
    adapted = set(s.targets or ())
    free = [n.path for n in s.model.graph.nodes if n.facts.params and n.path and n.path not in adapted]
    if not free:
        return
    model = s.trained(modules_to_save=[free[-1]])
    y = s.output(model)
    if not any(f"{free[-1]}.modules_to_save.default" in name for name in s.grown(model)):
        raise broken(f"`{free[-1]}` in `modules_to_save` does not train", _CORE)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(s.build(), folder).eval()
    same(s.output(loaded), y, "The output with a module to save, saved and loaded,", _CORE)


def swapping_exchanges_values(s: Subject) -> None:
    """A server swaps an adapter's values under a compiled model: parameters stay the same objects."""
    model, other = s.trained("first"), s.trained("second")
    objects = {name: id(p) for name, p in model.named_parameters()}
    before = s.output(model)
    _swap(model, other, "second", s)
    same(s.output(model), s.output(other), "The output after another adapter was swapped in", "Keep values in slots.")
    different(s.output(model), before, "Swapping in another adapter changes nothing in the output", _CORE)
    if {name: id(p) for name, p in model.named_parameters()} != objects:
        raise broken("Swapping leaves other parameter objects", _CORE)


def _swap(model: PeftModel, other: PeftModel, name: str, s: Subject) -> None:
    with quiet():
        hotswap_adapter_from_state_dict(model, other.adapter_tensors(name), "first", s.config())


def conversion_is_exact_at_full_rank(s: Subject) -> None:
    """What changes weights has thin factors; if the bias changes too, or the layer has none, that is said."""
    if not features_of(s.method)["uses"]["convert"]:
        return
    model = s.trained(dtype=torch.float64)
    layers = layers_of(model)
    try:
        with quiet():
            made = convert_adapter(model, _thin_type(), 1.0)
            thin = get_peft_model(s.build(torch.float64), made.config.model_copy(deep=True)).eval()
            set_peft_model_state_dict(thin, made.tensors)
    except PeftcError as error:
        if {problem.code for problem in error.diagnostics} <= {rules.CANNOT_CONVERT.code, rules.BAD_TARGET.code}:
            return
        raise
    for path, layer in layers.items():
        found, wanted = layers_of(thin)[path].get_delta_weight("default"), layer.get_delta_weight("default")
        fix = "Let `params`, or the lowerings that it is derived from, say how the weight changes."
        close(found, wanted, f"The change of `{path}`, converted,", fix, tolerance=1e-6, where=path)


def additive_changes_do_not_read_the_weight(s: Subject) -> None:
    """`supports_lora_conversion` tells other programs which changes of the weight hold on any base."""
    model = s.trained()
    layers = [layer for layer in layers_of(model).values() if layer.supports_lora_conversion("default")]
    before = [layer.get_delta_weight("default") for layer in layers]
    _disturb([layer.get_base_layer() for layer in layers])
    fix = "Set `additive = False`."
    for layer, delta in zip(layers, before, strict=True):
        what = "The change of a weight that was moved, compared with before,"
        close(layer.get_delta_weight("default"), delta, what, fix, tolerance=1e-4)


def _disturb(modules: list[nn.Module]) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.mul_(-1.5)
