"""What a method declares: its record, its config, and slots whose names others rely on."""

from __future__ import annotations

import copy
import pickle
import tempfile

from peftc.compiler.compile import compile_plan
from peftc.compiler.passes.sites import FOUND_OUT
from peftc.config.files import read_config, write_config
from peftc.model.peft_model import PeftModel
from peftc.runtime.session.session import Session
from peftc.testing.compare import same_names
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, quiet
from peftc.tuner.maps import MapTuner
from peftc.tuner.modules import ModuleTuner

#: Options that planning itself settles by the model, for every method: how long lists of targets are spelled, and how layers
#: store their weights.
_SETTLED = FOUND_OUT | {"target_modules"}


def record_names_its_slots(s: Subject) -> None:
    """Other libraries find a layer's tensors by `adapter_layer_names`, which come from the record."""
    declared = {*s.method.layer_names, *(n for variant in s.method.variants for n in variant.layer_names)}
    for site in s.wrap().session.plans["default"].sites:
        stray = sorted({slot.name for slot in site.slots if slot.trainable} - declared)
        if stray:
            what = f"The slots {stray} are not among the record's `layer_names`"
            raise broken(what, "Add them to the record.", site.path)


def config_survives_files(s: Subject) -> None:
    """A config is written into the adapter's folder and read back by other programs."""
    config = s.config()
    if type(config)(**config.to_dict()) != config:
        raise broken("The config made again from its `to_dict()` is another one", "Correct the config's validators.")
    with tempfile.TemporaryDirectory() as folder:
        read = read_config(write_config(config, folder).parent)
    changed = [n for n in type(config).model_fields if getattr(read, n) != getattr(config, n)]
    changed = [name for name in changed if name != "peft_version"]  # written with the file
    if type(read) is not type(config) or changed:
        raise broken(f"The config read back from JSON differs in {changed}", "Give the options types that JSON has.")
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        if copied != config:
            raise broken("A copy of the config is another one", "Keep all state in the options.")


def compiling_leaves_the_config_alone(s: Subject) -> None:
    """One config object is often used for several models."""
    config = s.config()
    before = config.to_dict()
    first = compile_plan(s.model.graph, {"default": config})
    if config.to_dict() != before:
        raise broken("Planning changed the config that it was given", "Work on values, not on the config.")
    planned = first.adapters[0].config.to_dict()
    given = {name: value for name, value in before.items() if value is not None and name not in _SETTLED}
    changed = [name for name, value in given.items() if planned[name] != value]
    if changed:
        raise broken(f"The plan is for other options {changed} than were given", "Only read the config.")
    second = compile_plan(s.model.graph, {"default": config})
    if first != second:
        raise broken("Planning twice gives two plans", "Let `slots` depend on its arguments only.")


def method_is_stateless(s: Subject) -> None:
    """One tuner object serves all adapters of all models: what it kept of one would leak into the others."""
    tuners = {id(t): t for t in _tuners(s)}.values()
    before = [_state(t) for t in tuners]
    model = s.trained()
    s.grown(model)
    s.output(model)
    changed = [type(t).__name__ for t, state in zip(tuners, before, strict=True) if _state(t) != state]
    if changed:
        raise broken(
            f"Using {', '.join(changed)} changed its attributes", "Keep what belongs to an adapter in its slots."
        )


def _tuners(s: Subject) -> list[object]:
    if not s.method.adapts_layers:
        return [s.method.tuner]
    with quiet():
        config = s.config()
    sites = s.wrap().session.plans["default"].maps
    return [site.tuner(s.method, config, s.model.graph) for site in sites]


def _state(tuner: object) -> dict[str, int]:
    """Names and identities of attributes, of the object and of its classes."""
    found = {name: id(value) for name, value in vars(tuner).items()}
    for cls in type(tuner).__mro__[:-1]:
        if cls not in (MapTuner, ModuleTuner):
            found |= {f"{cls.__name__}.{name}": id(value) for name, value in vars(cls).items()}
    return found


def keys_follow_the_rule(s: Subject) -> None:
    """Names in memory and in files are how other programs find an adapter's tensors."""
    name = "its_name"
    base = s.build()
    old = {id(p) for p in base.parameters()}
    with quiet():
        model = PeftModel(base, s.config(), name)
    session: Session = model.session
    plan = session.plans[name]
    memory = {site.key(slot, name).memory(plan.root) for site, slot in plan.slots() if not slot.derived}
    disk = {site.key(slot, name).disk() for site in plan.sites for slot in site.slots if slot.saved}
    if plan.call is not None:
        disk |= {plan.call.disk(slot.dotted) for slot in plan.call.slots if slot.saved}
        weighed = [session.plans[other] for other in plan.call.needs]
        memory |= {p.name for other in (plan, *weighed) for p in other.parameters()}
    if plan.prompt is not None:
        disk |= set(plan.prompt.stored)
    else:
        new = {n for n, p in model.named_parameters() if id(p) not in old}
        same_names(new, memory, "The applied model", "Declare in `slots` what is stored, under the names it has.")
    same_names(
        model.adapter_tensors(name),
        disk | {*plan.copies(), *plan.mirrors()} | _base_keys(model, name),
        "The checkpoint",
        "Save the declared slots.",
    )
    named = [key for key in model.adapter_tensors(name) if name in key]
    if named:
        raise broken(
            f"The adapter's name is in the checkpoint's key `{named[0]}`", "Leave it to the core to make keys."
        )


def _base_keys(model: object, name: str) -> set[str]:
    """Keys of base weights that are saved along, as the reference does with adapted embeddings."""
    session: Session = model.session  # type: ignore[attr-defined]
    stored = session.plans[name].stored(session.graph.model)
    return {key for key, _ in stored if key.endswith(".base_layer.weight")}
