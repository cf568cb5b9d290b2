"""An adapter's files: which folder each adapter has, which tensors go into it, and how they come back into a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peftc import rules
from peftc.checkpoint.keys import assign, listed
from peftc.checkpoint.report import LoadReport
from peftc.checkpoint.save import Saved, save_adapters
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.config.base import PeftConfig
from peftc.config.hub import CARD
from peftc.diagnostics import PeftcError
from peftc.graph.tensors import TensorFacts
from peftc.host import parallel
from peftc.model.parts import identity
from peftc.model.parts.adapted import DEFAULT, AdaptedModel
from peftc.model.parts.card import facts_of, new_card
from peftc.model.parts.embeddings import AUTO, embeddings_to_save
from peftc.model.parts.loading import BESIDE, Loadable, LoadOptions, loadable, opened
from peftc.model.parts.starts import Beginning, kept_beside, take_kept, turned
from peftc.registry.manager import default_registry
from peftc.runtime.bases.places import entire, fill
from peftc.runtime.bases.shards import refuse_distributed, refuse_parts
from peftc.runtime.journal import note, whole
from peftc.runtime.prompt.encoder import Exporter
from peftc.runtime.session.session import Session
from peftc.runtime.session.steps import patch
from peftc.runtime.session.stored import (
    can_take,
    differing,
    exported,
    fitted,
    in_base_formats,
    restored,
    without_padding,
)

# saving ---------------------------------------------------------------------------------------------------------------


def save(
    model: AdaptedModel,
    folder: str | PathLike[str],
    names: Sequence[str],
    save_embedding_layers: str | bool = AUTO,
    state_dict: Mapping[str, Tensor] | None = None,
    pickled: bool = False,
    beginning: Beginning = None,
) -> None:
    """Save adapters and the model card below a folder, turned to the original base by what they began with, if that is given.

    It is one step where the file system can exchange folders, else one for each adapter. Raises `PeftcError`, with what would
    have been a step as it was.
    """
    root = Path(folder)
    of_base = identity.print_of(model.session)
    saved: dict[str, Saved] = {}
    for name in names:
        place = "" if name == DEFAULT else name
        tensors = adapter_tensors(model, name, save_embedding_layers, state_dict)
        refuse_distributed(tensors)
        config, needed = _with_needed(model.session, name, root / place, _with_mapping(model, model.peft_config[name]))
        saved |= {str(Path(place, path)): replace(other, pickled=pickled) for path, other in needed.items()}
        if beginning:
            config, tensors = turned(model.session, name, config, tensors, beginning)
            saved[place] = Saved(tensors, config, None, of_base, pickled)
            continue
        plan = _saved_as(_plan_of(model, name), tensors)
        kept = kept_beside(model.session, name, config)
        saved[place] = Saved(tensors, config, plan, of_base, pickled, kept)
    card = new_card(facts_of(model, DEFAULT), root)
    save_adapters(root, saved, {CARD: card} if card is not None else None)


def _with_needed(session: Session, name: str, place: Path, config: PeftConfig) -> tuple[PeftConfig, dict[str, Saved]]:
    """The adapters that one weighs, to be saved beside it, if they were trained along; its config then names these."""
    plan, tuner = session.plans[name], default_registry().method_of(config).call_tuner
    needed = () if plan.call is None else tuple(session.plans[other] for other in plan.call.needs)
    if tuner is None or not any(slot.trainable for other in needed for site in other.maps for slot in site.slots):
        return config, {}
    saved = {}
    for key, other in zip(tuner.needs(config), needed, strict=True):
        tensors = {k: t.detach() for k, t in session.tensors(other.name).items()}
        saved[f"{BESIDE}/{key}"] = Saved(exported(session, other.name, tensors), other.config)
    folders = {key: str(place / BESIDE / key) for key in tuner.needs(config)}
    return config.model_copy(update={tuner.option: folders}), saved


def adapter_tensors(
    model: AdaptedModel,
    name: str,
    save_embedding_layers: str | bool = AUTO,
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What a checkpoint of the adapter holds: key on disk -> tensor, detached.

    `state_dict` is the wrapped model's, as a sharded run gathers it: tensors are then taken from it by their names in the
    model. Raises `PeftcError` if it lacks some that are trained; frozen ones may be left out.
    """
    tensors = tensors_of(model, model.session, name, save_embedding_layers, state_dict)
    return in_base_formats(model.session, name, tensors)


def tensors_of(
    model: nn.Module,
    session: Session,
    name: str,
    save_embedding_layers: str | bool = AUTO,
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`adapter_tensors` of any model with adapters; keys are those of a wrapped one."""
    return exported(session, name, _live_tensors(model, session, name, save_embedding_layers, state_dict))


def _live_tensors(
    model: nn.Module,
    session: Session,
    name: str,
    save_embedding_layers: str | bool,
    state_dict: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The same as they are in memory."""
    plan = session.plans[name]
    embeddings = embeddings_to_save(session, plan, save_embedding_layers)
    root = plan.root if model is session.model else ""  # adapted in place, it has no wrapper
    names = {disk: own.removeprefix(root) for disk, own in live_names(plan).items()}
    tensors = (
        {}
        if state_dict is None
        else _gathered({**names, **{key: key.removeprefix(root) for key in embeddings}}, state_dict)
    )
    if not names.keys() <= tensors.keys():
        attached = session.tensors(name)
        if parallel.sharded_by(session.ways_to([plan], model)) is not None:
            lacking = {key: tensor for key, tensor in attached.items() if key not in tensors}
            refuse_parts(plan, lacking, "it cannot be saved as it is here")
        if state_dict is not None:
            _refuse_incomplete([key for key, t in attached.items() if key not in tensors and t.requires_grad])
        tensors = {disk: tensor.detach() for disk, tensor in entire(model, attached).items()} | tensors
    tensors = {disk: tensor.detach() for disk, tensor in entire(model, embeddings).items()} | tensors
    encoders = model._modules.get("prompt_encoder")
    if plan.prompt is not None and isinstance(encoders, nn.ModuleDict):
        tensors |= _prompt(encoders[name], f"prompt_encoder.{name}.", state_dict)
    return without_padding(plan, tensors)


def live_names(plan: AdapterPlan) -> dict[str, str]:
    """Checkpoint key -> name in the wrapped model, for an adapter's tensors of its own."""
    names = {p.disk: p.name for p in (*plan.parameters(), *plan.buffers()) if p.disk is not None}
    for save in plan.saves:
        for tail, _ in save.buffers:
            names[f"{plan.root}{save.path}.{tail}"] = save.key(tail, plan.name).memory(plan.root)
    return names


def _gathered(names: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by checkpoint key as a state dict has them, by their names in the model."""
    found = assign(set(names.values()), state_dict, "")
    return {disk: state_dict[found[name]].detach() for disk, name in names.items() if name in found}


def _refuse_incomplete(lacking: Sequence[str]) -> None:
    """Raise `PeftcError` if a state dict lacks tensors that are trained."""
    if lacking:
        what = f"`state_dict` has nothing for {listed(lacking)}"
        fix = "Give the state dict of the whole wrapped model, or leave it out."
        raise PeftcError(rules.SAVE_INCOMPLETE(what, fix=fix))


def _prompt(encoder: nn.Module, root: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is saved of virtual tokens: what their encoder computes, of its own tensors or those of the state dict."""
    own = dict(encoder.named_parameters())
    found = assign([root + name for name in own], state_dict or (), "")
    given = {f"encoder.{n}": state_dict[found[root + n]] for n in own if root + n in found} if state_dict else {}
    tensors: dict[str, Tensor] = functional_call(Exporter(encoder), given, ())
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _plan_of(model: AdaptedModel, name: str) -> InjectionPlan:
    session = model.session
    graph = session.graph
    return InjectionPlan(graph.model, (session.plans[name],), (name,), graph.numel, graph=graph)


def _saved_as(plan: InjectionPlan, tensors: Mapping[str, Tensor]) -> InjectionPlan:
    """The plan of one adapter with the shapes that are saved of it."""
    (adapter,) = plan.adapters
    assert plan.graph is not None
    facts = {key: TensorFacts.of(tensor) for key, tensor in tensors.items()}
    return replace(plan, adapters=(fitted(adapter, plan.graph, facts),))


def _with_mapping(model: AdaptedModel, config: PeftConfig) -> PeftConfig:
    """Without a task type, a file names the base model's class, for information."""
    if config.task_type is not None or config.auto_mapping is not None:
        return config
    cls = type(model.get_base_model())
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return config.model_copy(update={"auto_mapping": mapping})


# loading --------------------------------------------------------------------------------------------------------------


@whole
def load(model: AdaptedModel, model_id: str | PathLike[str], name: str, options: LoadOptions) -> LoadReport:
    """Load a further adapter; one of that name is overwritten, in place if it has the same tensors.

    An adapter that is overwritten stays as trainable as it was: a trainer loads its best checkpoint in this way.
    Raises `PeftcError`, with nothing changed, if a tensor does not fit, nothing would be loaded, or it is merged.
    """
    session = model.session
    session.refuse_merged(name)
    config, file = opened(model_id, None, options)
    model._refuse_type(config)
    found = loadable(model.get_base_model(), name, config, file, options, model.mixes)
    is_new = name not in session.plans
    same = not is_new and (session.plans[name].is_like(found.adapter) or can_take(session, name, found.unfitted))
    if same:
        _overwrite(model, found)
    elif not is_new:
        _exchange(model, name, found)
    else:
        model._attach(found.plan, found.source)
    if options.is_trainable and (
        is_new or name in session.active
    ):  # a new one although it is not active, as the reference
        model.set_requires_grad(name)
    if not options.is_trainable and model.training:
        evaluate(model)
    return found.report


def _exchange(model: AdaptedModel, name: str, found: Loadable) -> None:
    """Replace an adapter by one with other tensors. It is active again, and trainable, if it was; others stay as they are."""
    active = model.session.active
    trained = any(tensor.requires_grad for tensor in _own(model, name))
    model._drop(name)
    model._attach(found.plan, found.source)
    model.session.activate(active)
    model.set_requires_grad(name, trained)


def _own(model: AdaptedModel, name: str) -> list[Tensor]:
    """An adapter's tensors in memory."""
    encoder = [] if model.prompt_encoder is None else list(model.prompt_encoder[name].parameters())
    return [*model.session.tensors(name).values(), *encoder]


def _overwrite(model: AdaptedModel, found: Loadable) -> None:
    """Load into the parameters that there are: an optimiser may hold them."""
    session, plan = model.session, found.adapter
    with torch.no_grad():
        own = session.tensors(plan.name)
        values = restored(session, plan, {key: found.source(key) for key in own})
        blocks = {site.key(slot, plan.name).disk(): slot.blocks for site, slot in plan.slots()}
        filled = [(tensor, values[key], blocks.get(key, 1)) for key, tensor in own.items()]
        if model.prompt_encoder is not None:
            filled += [(*pair, 1) for pair in model._encoders()[plan.name].restored(found.source)]
        for tensor, stored, parts in filled:
            if stored is not None:
                fill(model, tensor, stored, parts)
        session.base.carry(plan, found.source)
        take_kept(session, plan, found.source)
        patch(session, plan.name, differing(session, plan))


def evaluate(model: nn.Module) -> None:
    """Switch a model to evaluation, as `eval` does."""
    for module in model.modules():
        if module.training:
            note(setattr, module, "training", True)
    model.eval()
