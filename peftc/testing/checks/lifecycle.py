"""The life of an adapter: saved, loaded, copied, beside others, taken away, and applied in vain."""

from __future__ import annotations

import copy
import gc
import pickle
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.checkpoint.load import open_adapter
from peftc.checkpoint.report import expected_tensors
from peftc.compiler.compile import compile_plan
from peftc.diagnostics import PeftcError, PeftcWarning
from peftc.graph.tensors import TensorFacts
from peftc.model.mapping import inject_adapter_in_model
from peftc.model.peft_model import PeftModel
from peftc.runtime.applying.apply import session_of
from peftc.runtime.call import BASE
from peftc.testing.compare import close, different, objects_of, same, same_names, same_tensors, state_of
from peftc.testing.models import seeded
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, layers_of, quiet, slots_of


def saving_and_loading_is_exact(s: Subject) -> None:
    """A saved adapter loaded onto a fresh base gives the same output, bit for bit, without a complaint."""
    model = s.trained()
    y = s.output(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        model.save_pretrained(folder)
        planned = {n: TensorFacts(tuple(f.shape), f.dtype) for n, f in open_adapter(folder).tensors.items()}
        fix = "Declare what is stored in `slots`, with its shape and dtype."
        same_names(planned, {*expected_tensors(model.session.plans["default"])} | {*planned}, "The file", fix)
        warnings.simplefilter("always", PeftcWarning)
        told.clear()
        loaded = PeftModel.from_pretrained(s.build(), folder).eval()
        about = [str(w.message) for w in told if isinstance(w.message, PeftcWarning) and "PC6" in str(w.message)]
        if about:
            raise broken(f"Loading what was saved warns:\n{about[0]}", fix)
        same_tensors(loaded.adapter_tensors("default"), model.adapter_tensors("default"), "the loaded adapter", fix)
    same(s.output(loaded), y, "The output of the loaded adapter", "Rebuild in `init` nothing that is not saved.")
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    if trainable:
        raise broken(f"`{trainable[0]}` of an adapter loaded for inference is trainable", fix)


def adapters_do_not_leak(s: Subject) -> None:
    """Several adapters on one model: each gives what it gives alone, trains alone, and is saved alone."""
    model = s.trained("first")
    y, saved = s.output(model), copy.deepcopy(model.adapter_tensors("first"))
    s.join(model, "second")
    fix = "Read slots through the view only."
    same(s.output(model), y, "The output after another adapter was added", fix)
    model.set_adapter("second")
    alone = s.trained("second")
    same(s.output(model), s.output(alone), "The output of the second adapter beside the first", fix)
    different(s.output(model), y, "Two adapters with different slots give the same output", fix)
    same_tensors(
        model.adapter_tensors("second"), alone.adapter_tensors("second"), "the second adapter's checkpoint", fix
    )
    same_names(s.grown(model), slots_of(model, "second"), "The set of tensors with a gradient", fix)
    same_tensors(model.adapter_tensors("first"), saved, "the first adapter's checkpoint", fix)
    model.set_adapter("first")
    same(s.output(model), y, "The output of the first adapter after the second was active", fix)


def rows_are_as_alone(s: Subject) -> None:
    """A server computes requests for several adapters in one batch: no row may depend on its neighbours."""
    model = s.trained("first", dtype=torch.float64)
    s.join(model, "second")
    alone = {"first": s.output(model, torch.float64)}
    model.set_adapter("second")
    alone["second"] = s.output(model, torch.float64)
    with model.disable_adapter():
        alone[BASE] = s.output(model, torch.float64)
    names = [list(alone)[row % 3] for row in range(len(alone[BASE]))]
    for order in (names, names[::-1], names[1:2] * len(names)):
        y = s.rows(model, order, torch.float64)
        wanted = torch.stack([alone[name][row] for row, name in enumerate(order)])
        fix = "Let the lowerings treat each row by itself."
        close(y, wanted, "The output of a batch with an adapter for each row", fix, tolerance=s.model.tolerance)


def several_active_merge_alike(s: Subject) -> None:
    """Adapters active together act one after the other, merged or not, merged at once or in turn."""
    model = s.trained("first", dtype=torch.float64)
    s.join(model, "second")
    if clash(model):
        _refuses_both(model)
        return
    model.set_adapter(["first", "second"])
    y = s.output(model, torch.float64)
    fix = "Let `params` start from the running parameters `p` as the other lowerings do."
    together, in_turn = copy.deepcopy(model), copy.deepcopy(model)
    together.merge_adapter()
    in_turn.merge_adapter(["first"])
    in_turn.merge_adapter(["second"])
    tolerance = s.model.tolerance
    close(s.output(together, torch.float64), y, "The output with both merged", fix, tolerance=tolerance)
    close(s.output(in_turn, torch.float64), y, "The output with both merged in turn", fix, tolerance=tolerance)


def clash(model: PeftModel) -> bool:
    """Whether the method says that two adapters with these options cannot act on a layer at once."""
    parts = [layer.part("first") for layer in layers_of(model, "first").values()]
    return any(part.tuner.clash(part.view.config, part.view.config) for part in parts)


def _refuses_both(model: PeftModel) -> None:
    try:
        model.set_adapter(["first", "second"])
    except PeftcError:
        if model.active_adapters == ["first"]:
            return
    raise broken("Two adapters that clash on a layer are active together", "Report this as a bug of peftc.")


def deleting_leaves_nothing(s: Subject) -> None:
    """A server that swaps adapters for days must not grow."""
    model = s.trained()
    names, y = [name for name, _ in model.named_parameters()], s.output(model)
    with _kept_young():
        s.join(model, "second")
        dead = [weakref.ref(p) for p in slots_of(model, "second").values()]
        model.set_adapter("second")
        s.output(model)
        model.set_adapter("default")
        model.delete_adapter("second")
    same_names(
        [name for name, _ in model.named_parameters()], names, "The model after deleting", "Keep tensors in slots."
    )
    if not _are_gone(dead):
        raise broken("Tensors of a deleted adapter are still in memory", "Keep no reference to slots.")
    same(s.output(model), y, "The output after another adapter was deleted", "Keep no state between adapters.")


@contextmanager
def _kept_young() -> Iterator[None]:
    """The collector is off inside: what is made there is not yet among the many objects that it seldom searches."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _are_gone(found: Sequence[weakref.ref[nn.Parameter]]) -> bool:
    """Whether nothing has them any more, at the latest after a search for cycles, among the young and then among all."""
    for search in (lambda: 0, lambda: gc.collect(0), gc.collect):
        search()
        if all(ref() is None for ref in found):
            return True
    return False


def unloading_restores(s: Subject) -> None:
    """After `unload` the base is the same objects in the same places with the same content."""
    base = s.build()
    objects, state, y = objects_of(base), state_of(base), s.output(base)
    with quiet():
        model = PeftModel(base, s.config()).eval()
    s.grown(model)
    restored = model.unload()
    if restored is not base or objects_of(base) != objects:
        raise broken("Unloading leaves other module or parameter objects", "Replace nothing in the base layer.")
    if session_of(base) is not None:
        raise broken("Unloading leaves the session on the model", "Report this as a bug of peftc.")
    same_tensors(state_of(base), state, "the unloaded model", "Change nothing of the base in place.")
    same(s.output(base), y, "The output after unloading", "Change nothing of the base in place.")


def copies_are_equal_and_apart(s: Subject) -> None:
    """Models are pickled to other processes and deep-copied for averaging."""
    model = s.trained()
    y = s.output(model)
    twins = {"deep-copied": copy.deepcopy(model)}
    if s.method.call_tuner is None:  # transformers' hooks on a model that was asked for hidden states cannot be pickled
        twins["pickled"] = pickle.loads(pickle.dumps(model))
    for how, twin in twins.items():
        fix = "Keep everything in slots and options, which are copied."
        same(s.output(twin), y, f"The output of the {how} model", fix)
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.is_floating_point():  # others are packed
                    parameter.add_(1.0)
        same(s.output(model), y, f"The output after the {how} model was changed", fix)
        different(s.output(twin), y, f"Changing the {how} model's tensors changes nothing in its output", fix)


def injected_equals_wrapped(s: Subject) -> None:
    """Libraries that keep their own model class inject adapters into it: names without the wrapper's, the same output."""
    wrapped = s.wrap()
    base = s.build()
    with quiet(), seeded(2):
        injected = inject_adapter_in_model(s.config(), base)
    root = wrapped.session.plans["default"].root
    expected = [name.removeprefix(root) for name, _ in wrapped.named_parameters()]
    same_names(
        [name for name, _ in injected.named_parameters()], expected, "The injected model", "Use the given paths."
    )
    same(s.output(injected), s.output(wrapped), "The output of the injected model", "Do not rely on a wrapper.")


def any_adapter_name(s: Subject) -> None:
    """An adapter may be called like a slot, a tail, a number or a module: names are data."""
    plain = s.trained("x")
    y = s.output(plain)
    names = [*s.method.layer_names, "weight", "0", "base_layer", "model", "default_0", "Überall"]
    for name in names:
        model = s.wrap(name)
        with torch.no_grad():
            for mine, other in zip(slots_of(model, name).values(), slots_of(plain, "x").values(), strict=True):
                mine.copy_(other)
        fix = "Do not search in names."
        same(s.output(model), y, f"The output of an adapter called `{name}`", fix)
        same_tensors(model.adapter_tensors(name), plain.adapter_tensors("x"), f"the checkpoint of `{name}`", fix)
        with tempfile.TemporaryDirectory() as folder, quiet():
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(s.build(), Path(folder, name), adapter_name=name).eval()
        same(s.output(loaded), y, f"The output of a loaded adapter called `{name}`", fix)


def failed_apply_restores(s: Subject) -> None:
    """Whatever goes wrong while an adapter is put on, at the first layer or the last: the model is as it was."""
    base = s.build()
    for p in base.parameters():
        p.requires_grad_(p.is_floating_point())
    with quiet():
        plan = compile_plan(s.model.graph, {"default": s.config()})
    asked = len(expected_tensors(plan.adapters[0]))
    for fails_at in sorted({0, asked // 2, asked - 1}):
        before = _everything(base)
        try:
            with quiet():
                PeftModel.from_plan(base, plan, {"default": _Failing(fails_at)})
        except _Injected:
            pass
        else:
            raise broken(
                f"Reading tensor {fails_at} of {asked} from the file was never tried", "Declare it in `slots`."
            )
        after = _everything(base)
        changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        if changed:
            what = f"After a failure at tensor {fails_at} of {asked}, {changed[:4]} of the model are changed"
            raise broken(what, "Change nothing but slots in `init`.")


class _Injected(RuntimeError):
    """The failure that is injected."""


class _Failing:
    """A source of tensors that fails at the given request."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, key: str) -> Tensor | None:
        if self.left == 0:
            raise _Injected(key)
        self.left -= 1
        return None


def _everything(model: nn.Module) -> dict[str, Any]:
    """Every object, flag and value of a model by name."""
    found: dict[str, Any] = dict(objects_of(model))
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found[f"{name} flags"] = (module.training, sorted(vars(module)), [list(h) for h in hooks])
    for name, p in model.named_parameters():
        found[f"{name} content"] = (p.requires_grad, p.detach().clone().view(-1).tolist())
    return found
