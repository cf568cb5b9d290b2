"""The passes that only warn: what is probably not meant although it is possible. They never change what is adapted.

An explicit choice is not questioned: a router named by its own name, layers filtered on purpose, a tower adapted alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftc import rules
from peftc.compiler.match import ALL_LINEAR
from peftc.compiler.passes.draft import BY_ROLE, DEFAULT, Context, Draft, listed, option
from peftc.compiler.passes.ties import is_tied
from peftc.compiler.plan.sites import MapSite
from peftc.config.mixins import LayersMixin
from peftc.graph.nodes import LINEAR_KINDS, ModuleNode, Role
from peftc.graph.replicas import own_ties
from peftc.tuner.slots import Share

#: Model types whose fused kernels take these weights past the module, as the reference's list says.
_STATE_SPACE = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_READ_BY_KERNELS = frozenset({"out_proj", "conv1d"})
#: A layer in a tower of this many numbers of parameters or more has experts as one three-dimensional parameter.
_EXPERT_DIMENSIONS = 3
_FEED_FORWARD = frozenset({Role.GATE, Role.UP, Role.DOWN, Role.EXPERT})


def check_ties(draft: Draft, context: Context) -> Draft:
    """Adapted or copied modules whose parameters another module uses as well."""
    partners = {name: group for group in own_ties(context.graph) for name in group}
    if not partners:
        return draft
    problems = []
    as_one = {
        f"{s.path}.weight" for s in draft.maps if is_tied(s, draft) or all(o.share == Share.WEIGHT for o in s.slots)
    }
    apart = {name: group for name, group in partners.items() if not as_one.issuperset(group)}
    tied = {site.path: apart[f"{site.path}.weight"] for site in draft.maps if f"{site.path}.weight" in apart}
    if tied:
        path, group = next(iter(tied.items()))
        others = listed(owner for name in group if (owner := name.rpartition(".")[0]) != path)
        more = f", as do {len(tied) - 1:,} more targets" if len(tied) > 1 else ""
        what = f"`{path}` shares its weight with {others}{more}; an adapter acts on its own module alone"
        fix = "Leave it out, or untie the model before merging."
        problems.append(rules.TIED_TARGET(what, fix=fix, where=path))
    for save in (save for save in draft.saves if not is_tied(save, draft)):
        inside = {f"{save.path}.{tail}" for tail, _ in save.tensors}
        shared = [other for name in inside for other in partners.get(name, ()) if other not in inside]
        if shared:
            owners = listed(sorted({name.rpartition(".")[0] for name in shared}))
            what = f"`{save.path}` shares its weight with {owners}; its copy is trained and saved apart"
            why = "After training the two differ, although the base model's config says that they are one."
            problems.append(
                rules.TIED_TARGET(what, why=why, fix="Leave it out, or untie the model first.", where=save.path)
            )
    return draft.told(*problems)


def check_router(draft: Draft, context: Context) -> Draft:
    """Routers reached by a shorthand or a pattern instead of by name."""
    if draft.source == "target_modules" and not isinstance(option(draft.config, "target_modules"), str):
        return draft
    nodes = context.graph.by_path
    routers = [site.path for site in draft.maps if nodes[site.path].role is Role.ROUTER]
    if not routers:
        return draft
    fix = f"Exclude them: `exclude_modules: [{_ending(routers[0])}]`, or name them in `target_modules` if you mean it."
    what = f"`{draft.maps[0].reason}` adapts routers: {listed(routers, 1)}"
    return draft.told(rules.ROUTER_ADAPTED(what, fix=fix, where=context.where("target_modules")))


def check_experts(draft: Draft, context: Context) -> Draft:
    """Feed-forward targets in a model whose routed experts are parameters, which module names do not reach."""
    if not draft.maps:
        return draft
    adapted = {site.path for site in draft.maps}
    nodes = context.graph.by_path
    missed = [n for n in context.graph.nodes if _holds_experts(n) and n.path not in adapted]
    wanted = draft.source == ALL_LINEAR or any(nodes[path].role in _FEED_FORWARD for path in adapted)
    if not missed or not wanted:
        return draft
    count = sum(node.facts.numel for node in missed)
    what = (
        f"The routed experts hold {count:,} parameters in {listed((n.path for n in missed), 1)} that no target reaches"
    )
    fix = (
        "Nothing, if attention and shared layers are what should be trained; else name them in `target_parameters`: "
        f"{listed(f'{n.path}.{name}' for n in missed[:1] for name, t in n.facts.params.items() if len(t.shape) == _EXPERT_DIMENSIONS)}."
    )
    return draft.told(rules.EXPERTS_MISSED(what, fix=fix, where=context.where("target_modules")))


def _holds_experts(node: ModuleNode) -> bool:
    return node.role is Role.EXPERT and any(len(t.shape) == _EXPERT_DIMENSIONS for t in node.facts.params.values())


def check_coverage(draft: Draft, context: Context) -> Draft:
    """Lists of layers in which names reach some layers and miss others that have linear layers too."""
    config = draft.config
    filtered = isinstance(config, LayersMixin) and config.layers_to_transform is not None
    by_name = draft.source != ALL_LINEAR and isinstance(option(config, "target_modules"), set)
    if filtered or not by_name or not draft.maps:
        return draft
    if any(any(part.isdigit() for part in entry.split(".")) for entries in draft.targets.values() for entry in entries):
        return draft  # layers were chosen by number
    adapted: dict[str, set[int]] = {}
    for site in draft.maps:
        block = _block(context.graph.by_path[site.path])
        if block is not None:
            adapted.setdefault(block[0], set()).add(block[1])
    there: dict[str, dict[int, str]] = {name: {} for name in adapted}
    for node in context.graph.nodes:
        block = _block(node)
        if block is not None and block[0] in adapted and node.facts.kind in LINEAR_KINDS:
            there[block[0]].setdefault(block[1], node.path)
    problems = []
    for name, reached in adapted.items():
        missed = sorted(there[name].keys() - reached)
        if missed and not draft.dropped:
            example = there[name][missed[0]]
            what = f"{len(missed):,} of {len(there[name]):,} layers of `{name}` are not adapted, as the one with `{example}`"
            fix = f"Add names of their layers, or use `target_modules: {ALL_LINEAR}`."
            problems.append(rules.UNEVEN_COVERAGE(what, fix=fix, where=context.where("target_modules")))
    return draft.told(*problems)


def _block(node: ModuleNode) -> tuple[str, int] | None:
    """The block that a node is inside of; a numbered module itself is in none."""
    return None if node.name.isdigit() else node.block


def check_towers(draft: Draft, context: Context) -> Draft:
    """Targets in a vision or audio tower beside those in the language model."""
    towers: list[str] = []
    for node in context.graph.nodes:
        if node.role is Role.TOWER and not (towers and node.path.startswith(towers[-1] + ".")):
            towers.append(node.path)
    if not towers or draft.source in (DEFAULT, BY_ROLE):
        return draft
    inside = [site for site in draft.maps if _within(site, towers)]
    if not inside or len(inside) == len(draft.maps) or isinstance(option(draft.config, "exclude_modules"), str):
        return draft
    hit = [tower for tower in towers if any(_within(site, [tower]) for site in inside)]
    what = f"{len(inside):,} of {len(draft.maps):,} targets are in {listed(hit)}"
    fix = f"Exclude them if they are not meant: `exclude_modules: '{hit[0]}\\..*'`."
    return draft.told(rules.TOWER_ADAPTED(what, fix=fix, where=context.where("target_modules")))


def _within(site: MapSite, roots: Iterable[str]) -> bool:
    return any(site.path == root or site.path.startswith(root + ".") for root in roots)


def check_direct_reads(draft: Draft, context: Context) -> Draft:
    """Layers of state-space models whose weights fused kernels read without calling the layer."""
    if context.graph.model.model_type not in _STATE_SPACE:
        return draft
    hit = [site.path for site in draft.maps if _ending(site.path) in _READ_BY_KERNELS]
    if not hit:
        return draft
    names = sorted({_ending(path) for path in hit})
    what = (
        f"{listed(hit, 1)}: where the fast kernels of `{context.graph.model.model_type}` run, they read these weights"
    )
    fix = f"Exclude them: `exclude_modules: [{', '.join(names)}]`."
    return draft.told(rules.READ_DIRECTLY(what, fix=fix, where=context.where("target_modules")))


def check_gradients(draft: Draft, context: Context) -> Draft:
    """Packed layers that have no derivative by their input, under an adapter that is to train."""
    if draft.config.inference_mode:
        return draft
    closed = [node for node in context.graph.nodes if node.facts.packed and not node.facts.packed.passes_gradients]
    if not closed:
        return draft
    first = closed[0]
    storage = first.facts.packed.storage if first.facts.packed else ""
    more = f", nor through {len(closed) - 1:,} more" if len(closed) > 1 else ""
    what = f"No gradient goes through `{first.path}` ({storage}) to what is before it{more}"
    fix = "Load the base with another quantisation: weights alone, not inputs; or adapt nothing before the last such layer."
    return draft.told(rules.GRADIENT_STOPS(what, fix=fix, where=first.path))


def _ending(path: str) -> str:
    return path.rpartition(".")[2]
