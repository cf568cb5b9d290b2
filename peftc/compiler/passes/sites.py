"""The passes that decide what is added where: slots on layers, modules to save, biases.

Work is done once per kind of layer: layers of equal facts and options share config, slots and problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from peftc import rules
from peftc.compiler.passes import attention, starts
from peftc.compiler.passes.draft import BY_ROLE, DEFAULT, Context, Draft, listed, option
from peftc.compiler.passes.homes import Homes
from peftc.compiler.passes.select import TASK_HEADS
from peftc.compiler.plan.sites import MapSite, SaveSite, TrainSite
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic, PeftcError, Severity, did_you_mean
from peftc.graph.nodes import OPAQUE_KINDS, Kind, LayerFacts, ModuleGraph, ModuleNode
from peftc.graph.tensors import HALF, TRAINABLE, TensorFacts
from peftc.limits import MAX_SLOTS, misshapen
from peftc.registry.boundary import boundary
from peftc.registry.starts import known_start
from peftc.tuner.experts import PerExpert, tuner_for
from peftc.tuner.maps import MapTuner
from peftc.tuner.slots import Slot

#: Options that are facts about the adapted layers, whatever is given for them.
FOUND_OUT = frozenset({"fan_in_fan_out"})
#: Containers without a call of their own, by class name.
_CONTAINERS = frozenset({"ModuleList", "ModuleDict", "ParameterList", "ParameterDict"})


def resolve_orientation(draft: Draft, context: Context) -> Draft:
    """`fan_in_fan_out` is a fact about the layers: true if one of them stores its weight as (in, out)."""
    given = option(draft.config, "fan_in_fan_out")
    if given is None or not draft.targets:
        return draft
    nodes = context.graph.by_path
    transposed = any(nodes[path].facts.kind is Kind.CONV1D_TRANSPOSED for path in draft.targets)
    if given and not transposed:
        where = context.where("fan_in_fan_out")
        what = "`fan_in_fan_out` is set, but no adapted layer is stored so; it is taken as false"
        draft = draft.told(rules.ORIENTATION(what, fix="Remove `fan_in_fan_out`; it is found out.", where=where))
    return draft.configured(fan_in_fan_out=transposed)


#: Options in force at a layer in place of the config's, with their values.
Overrides = tuple[tuple[str, Any], ...]


@dataclass
class _Kind:
    """What layers of equal facts and options share, and how many there are."""

    config: PeftConfig
    overrides: Overrides
    slots: tuple[Slot, ...]
    dtype: str
    problems: tuple[Diagnostic, ...]
    fails: bool
    tuner: MapTuner[Any]
    #: the first module of the kind
    node: ModuleNode
    shares: bool = False
    count: int = 0


def declare_slots(draft: Draft, context: Context) -> Draft:
    """A map site for every target, with the slots that the method declares for its kind of layer."""
    draft = attention.spread(draft, context)
    nodes = attention.nodes_of(draft, context)
    declarer = _Declarer(draft, context)
    reasons: dict[str, str] = {}
    maps: list[MapSite] = []
    try:
        kinds = {path: declarer.kind_of(nodes[path]) for path in draft.targets}
        single = list(_parameters(draft, context, declarer))
        declarer.declare()
        homes = Homes(context)
        for path, entries in draft.targets.items():
            node, kind = nodes[path], kinds[path]
            kind.count += 1
            if kind.fails:
                continue
            slots = homes.found(path, kind.slots) if kind.shares else kind.slots
            told = str(node.role) if draft.source == BY_ROLE else entries[0]
            reason = reasons.get(told) or reasons.setdefault(told, _reason(draft.source, told))
            maps.append(MapSite(path, node.facts, kind.config, slots, kind.dtype, reason, kind.overrides, node.role))
        for site, kind in single:
            slots = homes.found(site.owner, kind.slots) if kind.shares else kind.slots
            maps += [] if kind.fails else [replace(site, config=kind.config, slots=slots)]
    except PeftcError as error:
        return draft.failed(error)  # it would raise for every other module as well
    problems = [_counted(problem, kind) for kind in declarer.kinds for problem in kind.problems]
    if any(kind.tuner.weighs_siblings for kind in declarer.kinds if not kind.fails):
        what = f"`{context.name}` adds what other adapters of the method on these layers add, weighed; alone it cannot act."
        draft = draft.but(notes=(*draft.notes, what))
    return draft.but(maps=attention.placed(maps)).told(*problems)


def _parameters(draft: Draft, context: Context, declarer: _Declarer) -> Iterator[tuple[MapSite, _Kind]]:
    """A map site, still without slots, for every parameter that is meant; of several in one module the first is innermost."""
    known: dict[tuple[int, str], LayerFacts | None] = {}
    after = Counter(path for path, _ in draft.parameters)
    for (path, name), entry in draft.parameters.items():
        after[path] -= 1
        node = context.graph.by_path[path]
        if (id(node.facts), name) not in known:
            known[id(node.facts), name] = node.facts.of_parameter(name)
        facts = known[id(node.facts), name]
        if facts is None:
            shape = list(node.facts.params[name].shape)
            what = f"`{path}.{name}` has the shape {shape}"
            why = "What is adapted are maps: (out, in), or one for each expert."
            where = context.where("target_parameters", entry)
            raise PeftcError(rules.BAD_TARGET(what, why=why, fix=f"Remove `{entry}`.", where=where))
        kind = declarer.kind_of(node.of_parameter(name, facts))
        kind.count += 1
        meant = draft.former.get(f"{path}.{name}")
        why = entry if meant is None else ", ".join(meant.meaning.entries)
        site = MapSite(path, facts, kind.config, (), kind.dtype, why, kind.overrides, node.role, name, after[path])
        yield site, kind


def _reason(source: str, told: str) -> str:
    """Why a module is adapted: `q_proj`, `default q_proj`, `by role q`, `all-linear`."""
    return f"{source} {told}" if source in (DEFAULT, BY_ROLE) else told


def _counted(problem: Diagnostic, kind: _Kind) -> Diagnostic:
    """The problem of a kind of layer, told once."""
    if kind.count == 1:
        return problem
    return replace(problem, what=f"{problem.what}, as for {kind.count - 1:,} more layers like it")


class _Declarer:
    """Asks the method about each kind of layer once: layers of the same facts, mathematics and overrides.

    Configs with the same overrides are one object. Values are told apart by their text: they need not be hashable.
    """

    def __init__(self, draft: Draft, context: Context) -> None:
        self._draft, self._context = draft, context
        self._only = context.method.only_tuner
        self._start = known_start(context.method, draft.config)
        self._configs: dict[str, PeftConfig] = {}
        self._kinds: dict[tuple[int, int, str], _Kind] = {}

    @property
    def kinds(self) -> Iterable[_Kind]:
        return self._kinds.values()

    def kind_of(self, node: ModuleNode) -> _Kind:
        """The kind of a layer. Raises `PeftcError` if the method cannot choose its mathematics."""
        tuner = self._chosen(node) if self._only is None or node.facts.experts else self._only
        overrides = self._overrides(node.path)
        key = (id(tuner), id(node.facts), repr(overrides) if overrides else "")
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._declare(tuner, node, overrides)
        return kind

    def _chosen(self, node: ModuleNode) -> MapTuner[Any]:
        with boundary(self._context.method.peft_type, "tuner_for", node.path):
            return tuner_for(self._context.method, self._draft.config, node)

    def _overrides(self, path: str) -> Overrides:
        chosen = self._draft.overrides.get(path)
        if chosen is None:
            return ()
        config = self._draft.config
        return tuple((config.pattern_options[name], option(config, name)[key]) for name, key in chosen)

    def _declare(self, tuner: MapTuner[Any], node: ModuleNode, overrides: Overrides) -> _Kind:
        path, dtype = node.path, self._dtype(node.facts)
        kind = _Kind(self._draft.config, overrides, (), dtype, (), fails=True, tuner=tuner, node=node)
        if node.facts.kind not in tuner.supports or _is_in_the_way(tuner, node, self._context):
            kind.problems = (_unsupported(tuner, node, self._draft.config, self._context),)
            return kind
        try:
            if node.facts.kind in OPAQUE_KINDS:
                _check_params(tuner, self._context, path)
            if isinstance(tuner, PerExpert):
                _check_per_expert(tuner, self._context, path)
            kind.config = self._config(overrides)
            kind.fails = False
        except PeftcError as error:
            kind.problems = error.diagnostics
        return kind

    def declare(self) -> None:
        """Ask for the slots of all kinds that were found, and for problems of the options there.

        Raises `PeftcError` if the method cannot say what the kinds need together.
        """
        able = [kind for kind in self._kinds.values() if not kind.fails]
        for tuner in {id(kind.tuner): kind.tuner for kind in able}.values():
            own = [kind for kind in able if kind.tuner is tuner]
            for kind, declared in zip(own, self._declared(tuner, own), strict=True):
                self._finish(kind, declared)

    def _declared(self, tuner: MapTuner[Any], kinds: Sequence[_Kind]) -> Sequence[Iterable[Slot] | None]:
        if type(tuner).declare is MapTuner.declare:  # each by itself, so that a problem is that of one kind
            return [None] * len(kinds)
        with boundary(self._context.method.peft_type, "declare", kinds[0].node.path):
            declared = tuner.declare([(kind.config, kind.node.facts) for kind in kinds])
            found = [all_of(iter(slots)) for slots in islice(declared, len(kinds) + 1)]
        if len(found) != len(kinds):
            what = f"`declare` of {self._context.method.peft_type} gives {len(found)} answers for {len(kinds)} kinds of layer"
            raise PeftcError(rules.PLUGIN_INVALID(what, fix="Give one for each.", where=kinds[0].node.path))
        return found

    def _finish(self, kind: _Kind, declared: Iterable[Slot] | None) -> None:
        method, node = self._context.method.peft_type, kind.node
        try:
            with boundary(method, "slots", node.path):
                slots = kind.tuner.slots(kind.config, node.facts) if declared is None else declared
                kind.slots = all_of(iter(slots))
            check_slots(
                kind.slots, self._context, node.path, empty=0 in (node.facts.in_features, node.facts.out_features)
            )
            if self._start is not None and kind.tuner.is_startable:
                kind.slots = starts.settled(self._start, kind.tuner, kind.config, node.facts, kind.slots)
            kind.shares = any(slot.share for slot in kind.slots)
            with boundary(method, "check", node.path):
                kind.problems = tuple(kind.tuner.declared_problems(kind.config, node.facts, node.path))
                kind.problems += tuple(kind.tuner.check(kind.config, node.facts, node.path))
            if self._start is not None:
                kind.problems += tuple(
                    starts.problems(self._start, kind.tuner, kind.config, node.facts, node.path, self._context)
                )
            if node.facts.experts:
                kind.problems += tuple(_dropping(kind.tuner, kind.config, node, self._context))
        except PeftcError as error:
            kind.problems, kind.fails = error.diagnostics, True

    def _config(self, overrides: Overrides) -> PeftConfig:
        if not overrides:
            return self._draft.config
        key = repr(overrides)
        if key not in self._configs:
            changed = self._draft.config.model_copy(update=dict(overrides))
            self._configs[key] = changed.revalidated()  # a value of a pattern is checked like the option itself
        return self._configs[key]

    def _dtype(self, facts: LayerFacts) -> str:
        return slot_dtype(facts.dtype, self._context.options.autocast_adapter_dtype)


def slot_dtype(weight: str, autocast: bool) -> str:
    """The dtype of slots beside a weight: the same, half precision lifted to float32, float32 beside quantised ones.

    >>> slot_dtype("bfloat16", True), slot_dtype("bfloat16", False), slot_dtype("uint8", True)
    ('float32', 'bfloat16', 'float32')
    """
    if weight in HALF:
        return "float32" if autocast else weight
    return weight if weight in ("float32", "float64", "complex64", "complex128") else "float32"


def check_slots(slots: tuple[Slot, ...], context: Context, path: str | None, empty: bool = False) -> None:
    """Hold a method to its contract; `empty` layers, without an input or output, may have slots without content.

    Raises `PeftcError` naming what is wrong with its slots.
    """
    name, least = context.method.peft_type, 0 if empty else 1
    check_form(slots, name, path)
    wrong = [f"`{s.name}` has the shape {list(s.shape)}" for s in slots if any(size < least for size in s.shape)]
    if not context.method.is_prompt:
        named = [slot for slot in slots if slot.saved and not slot.derived]
        stray = [slot.name for slot in named if not slot.name.startswith(context.method.prefix)]
        wrong += [f"`{slot}` does not begin with `{context.method.prefix}`" for slot in stray]
    if context.method.module_tuner is None:
        wrong += [f"`{s.name}` is not named by its adapter, and is not around a module" for s in slots if not s.named]
    wrong += [f"`{s.name}` is derived and trainable" for s in slots if s.derived and s.trainable]
    wrong += [
        f"`{s.name}` is {s.dtype} and trainable" for s in slots if s.trainable and s.dtype not in (None, *TRAINABLE)
    ]
    if not context.method.adapts_layers:
        wrong += [f"`{s.name}` is shared or derived, and is not on a layer" for s in slots if s.share or s.derived]
    if len({(s.name, s.tail) for s in slots}) < len(slots):
        wrong.append("two slots have the same name")
    if not slots:
        wrong.append("there is none")
    if wrong:
        raise PeftcError(_slots_wrong(name, wrong, path))


def all_of(slots: Iterator[Slot]) -> tuple[Slot, ...]:
    """What a method declares, called inside the plugin boundary: of a declaration without an end, too many."""
    return tuple(islice(slots, MAX_SLOTS + 1))


def check_form(slots: Sequence[Slot], method: str, path: str | None = None) -> None:
    """Raise `PeftcError` if what a method declares is no list of slots, or tensors that no machine can hold."""
    if len(slots) > MAX_SLOTS:
        raise PeftcError(_slots_wrong(method, [f"more than {MAX_SLOTS:,}"], path))
    strange = [f"`{slot!r:.60}` is none" for slot in slots if not isinstance(slot, Slot)] or list(_not_sizes(slots))
    if strange:
        raise PeftcError(_slots_wrong(method, strange, path))
    large = [f"`{slot.name}` {reason}" for slot in slots if (reason := misshapen(slot.shape))]
    if large:
        fix = "Choose smaller options, such as the rank."
        raise PeftcError(rules.TENSOR_TOO_LARGE("; ".join(large), fix=fix, where=path))


def _not_sizes(slots: Iterable[Slot]) -> Iterator[str]:
    for slot in slots:
        if not isinstance(slot.name, str) or not isinstance(slot.tail, str):
            yield f"`{slot.name!r:.60}` is no name"
        elif not isinstance(slot.shape, tuple) or any(type(size) is not int for size in slot.shape):
            yield f"`{slot.name}` has the shape {slot.shape!r:.60}, which is no tuple of whole numbers"


def _slots_wrong(method: str, wrong: Iterable[str], path: str | None) -> Diagnostic:
    return rules.PLUGIN_INVALID(
        f"Slots of {method}: {'; '.join(wrong)}", fix="Correct the plugin's `slots`.", where=path
    )


def _check_params(tuner: MapTuner[Any], context: Context, path: str) -> None:
    """Raise `PeftcError` if the method cannot change parameters, all that is known of such a layer."""
    if "params" not in tuner.lowerings:
        name, kinds = context.method.peft_type, "norms and layers of no known kind"
        what = f"{name} says that it adapts {kinds}, but has no `params`"
        fix = "Give `params`, or leave these kinds out of `supports`."
        raise PeftcError(rules.PLUGIN_INVALID(what, fix=fix, where=path))


def _check_per_expert(tuner: PerExpert, context: Context, path: str) -> None:
    """Raise `PeftcError` if the method says that it adapts experts, and has what cannot be done with each by itself."""
    if tuner.obstacle:
        what = f"{context.method.peft_type} says that it adapts experts, and has {tuner.obstacle}"
        fix = "Leave these kinds out of `supports`, or keep all experts in slots of your own and set `stacks_experts`."
        raise PeftcError(rules.PLUGIN_INVALID(what, fix=fix, where=path))


def _dropping(tuner: MapTuner[Any], config: PeftConfig, node: ModuleNode, context: Context) -> Iterator[Diagnostic]:
    """Single parameters are adapted through their weights: the inputs that an adapter would drop are not seen. Adapters of
    attention are trained so elsewhere, without a word."""
    if tuner.dropout(config) > 0:
        what = f"The options drop inputs of layers; `{node.path}` is adapted through its weights, and has none"
        fix = "Set the dropout to 0, or leave such parameters out: of `target_parameters`, or by `exclude_modules`."
        of_attention = context.graph.by_path[node.path.rpartition(".")[0]].facts.kind is Kind.ATTENTION
        severity = Severity.WARNING if of_attention else Severity.ERROR
        yield rules.BAD_TARGET(what, fix=fix, where=node.path, severity=severity)


def _is_in_the_way(tuner: MapTuner[Any], node: ModuleNode, context: Context) -> str:
    """Why a module cannot be run with other parameters in place, where no more is known to be done; empty if it can."""
    if node.facts.packed is not None and Kind.OTHER in tuner.supports:
        return f"with a packed weight ({node.facts.packed.storage}), which does not train"
    opaque = node.facts.kind in OPAQUE_KINDS
    if opaque and any(n.path.startswith(node.path + ".") and n.facts.params for n in context.graph.nodes):
        return "with layers in it, which have parameters too"
    return "" if node.facts.params or not opaque else "without parameters of its own"


def _unsupported(tuner: MapTuner[Any], node: ModuleNode, config: PeftConfig, context: Context) -> Diagnostic:
    variant = context.method.variant_for(config)
    supported = (variant or context.method).supports or tuner.supports
    kinds = ", ".join(sorted(kind.value for kind in supported))
    obstacle = _is_in_the_way(tuner, node, context) if node.facts.kind in supported else ""
    note = f" {obstacle}" if obstacle else f" ({node.facts.note})" if node.facts.note else ""
    below = [n for n in context.graph.nodes if n.path.startswith(node.path + ".") and n.facts.kind in supported]
    names = list(dict.fromkeys(n.name for n in below if not n.name.isdigit()))
    fix = (
        f"Name the layers in it: {listed(names, 8)}."
        if names
        else "Leave it out, or exclude it with `exclude_modules`."
    )
    by = "" if variant is None else f" with `{variant.option}`"
    what = f"`{node.path}` is a {node.facts.cls}{note}, which {context.method.peft_type}{by} cannot adapt"
    return rules.BAD_TARGET(what, why=f"It adapts layers of the kinds {kinds}.", fix=fix, where=node.path)


def copy_modules(draft: Draft, context: Context) -> Draft:
    """A copy, trained whole, of every module that `modules_to_save` names; of nested ones the outermost.

    As in the reference a name is compared letter by letter with the end of the path: `head` also means `lm_head`.
    """
    names: tuple[str, ...] = tuple(dict.fromkeys(option(draft.config, "modules_to_save") or ()))
    if not names:
        return draft
    saves: list[SaveSite] = []
    problems: list[Diagnostic] = []
    for position, node in enumerate(context.graph.nodes):
        if not node.path.endswith(names) or (saves and node.path.startswith(saves[-1].path + ".")):
            continue
        if node.facts.cls in _CONTAINERS:
            problems.append(_container(node, context))
        packed = next((own for own in below(context.graph, position) if own.facts.packed is not None), None)
        if packed is not None:
            problems.append(_packed_copy(node, packed, context))
        name = next(name for name in names if node.path.endswith(name))
        saves.append(save_site(context.graph, position, name, context.options.autocast_adapter_dtype))
    task = draft.config.task_type
    heads = TASK_HEADS.get(task, ()) if task else ()
    if heads and not saves:
        what = f"The model has no {listed(heads)} that {task} could train"
        problems.append(
            rules.NO_HEAD(what, fix="Name the head in `modules_to_save`.", where=context.where("task_type"))
        )
    paths = [node.path for node in context.graph.nodes]
    for name in names:
        problems += _name_problems(name, [path for path in paths if path.endswith(name)], name in heads, context)
    return draft.but(saves=tuple(saves)).told(*problems)


def _name_problems(name: str, meant: list[str], optional: bool, context: Context) -> Iterator[Diagnostic]:
    """What is wrong with a module to save that means these paths; heads that a task brings are optional."""
    where = context.where("modules_to_save", name)
    if not meant and not optional:
        endings = [node.name for node in context.graph.nodes if node.path]
        top = listed(node.path for node in context.graph.nodes if node.path and "." not in node.path)
        hint = did_you_mean(name, endings) or f"At the top the model has {top}."
        yield rules.DEAD_SAVE(f"No module is called `{name}`", fix=hint, where=where, severity=context.dead)
    loose = [path for path in meant if not f".{path}".endswith(f".{name}")]
    if loose:
        what = f"`{name}` in `modules_to_save` also means {listed(loose)}"
        yield rules.LOOSE_SAVE(what, fix="Write longer names, or full paths.", where=where)


def _container(node: ModuleNode, context: Context) -> Diagnostic:
    what = f"modules_to_save cannot be applied to modules of type {node.facts.cls}, as `{node.path}` is"
    return rules.CANNOT_SAVE(what, fix="Name the modules in it.", where=context.where("modules_to_save"))


def _packed_copy(node: ModuleNode, packed: ModuleNode, context: Context) -> Diagnostic:
    assert packed.facts.packed is not None
    storage = packed.facts.packed.storage
    what = f"`{node.path}` cannot be trained whole: the weight of `{packed.path}` is packed (`{storage}`), and no gradient can move it"
    fix = "Adapt it instead (`target_modules`), or leave it out of what is quantised when the base is loaded."
    return rules.CANNOT_SAVE(what, fix=fix, where=context.where("modules_to_save"))


def save_site(graph: ModuleGraph, position: int, name: str, autocast: bool) -> SaveSite:
    """The site of the module at a position of the graph, that `name` means."""
    root = graph.nodes[position].path
    inside = list(below(graph, position))
    own = {f"{root}.{tail}" for tail, _ in _tensors(root, inside, "params")}
    # a parameter that the module itself uses twice stays one parameter in the copy
    tensors = [(t, f) for t, f in _tensors(root, inside, "params") if graph.alias_of.get(f"{root}.{t}") not in own]
    buffers = tuple(_tensors(root, inside, "buffers"))
    lifted = autocast and any(facts.dtype in HALF for _, facts in (*tensors, *buffers))
    return SaveSite(root, tuple(tensors), buffers, name, lifted)


def below(graph: ModuleGraph, position: int) -> Iterator[ModuleNode]:
    """The node at a position of the graph and all that are in it."""
    root = graph.nodes[position].path
    yield graph.nodes[position]
    for node in graph.nodes[position + 1 :]:  # depth first: what is below follows at once
        if not node.path.startswith(root + "."):
            return
        yield node


def _tensors(root: str, nodes: list[ModuleNode], which: str) -> Iterator[tuple[str, TensorFacts]]:
    for node in nodes:
        inner = node.path[len(root) + 1 :]
        for name, facts in (node.facts.params if which == "params" else node.facts.buffers).items():
            yield (f"{inner}.{name}" if inner else name), facts


def train_biases(draft: Draft, context: Context) -> Draft:
    """Base parameters that train along: every `bias` (`all`), or those of adapted layers (`…_only`)."""
    mode = option(draft.config, "bias")
    if not isinstance(mode, str) or mode == "none":
        return draft
    adapted, wrappers = {site.path for site in draft.maps}, attention.wrappers_of(draft.maps)
    rows = {site.path for site in draft.rows}
    copied = tuple(f"{save.path}." for save in draft.saves)
    aliases = context.graph.alias_of
    trains: dict[str, TrainSite] = {}
    for node in context.graph.nodes:
        if not node.facts.has_bias or f"{node.path}.".startswith(copied):
            continue
        if mode != "all" and node.path not in adapted:
            continue
        place = attention.place_of(node.path, wrappers)
        if node.path in adapted and node.path in rows:
            place = f"{place or node.path}.base_layer"  # there are two wrappers
        wrapped, name = node.path in adapted or node.path in rows, f"{node.path}.bias"
        site = TrainSite(node.path, "bias", node.facts.params["bias"], wrapped, f"bias: {mode}", place)
        main = trains.get(aliases.get(name, ""))
        if main is not None:
            trains[aliases[name]] = replace(main, copies=(*main.copies, site.base_name))
        elif name not in aliases:
            trains[name] = site
    if not trains:
        owner = "no layer of the model" if mode == "all" else "no adapted layer"
        what = f"`bias: {mode}` trains nothing: {owner} has a bias"
        draft = draft.told(rules.NO_BIAS(what, fix="Set `bias: none`.", where=context.where("bias")))
    return draft.but(trains=tuple(trains.values()))
