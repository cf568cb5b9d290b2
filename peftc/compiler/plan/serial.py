"""A plan as JSON and back, without loss: versioned, deterministic, and compact, as layers of one kind share their facts.

The text is laid out for people: one module a line, so that two plans can be compared with any diff. A digest over the
content tells a plan that was edited by hand, which is refused: what is in a plan was checked when it was compiled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.rewrite import Rewrite
from peftc.compiler.plan.sites import CallSite, MapSite, ModuleSite, PromptSite, SaveSite, TrainSite
from peftc.config.base import PeftConfig
from peftc.config.json_text import parse_json
from peftc.config.kinds import PLAN_FORMAT as FORMAT
from peftc.config.kinds import hint_of
from peftc.config.places import json_path
from peftc.config.problems import Problem, capped, shorten
from peftc.diagnostics import Diagnostic, PeftcError, Severity, Where
from peftc.graph.base_ref import BaseRef
from peftc.graph.nodes import LayerFacts, Role, facts_from_json, facts_to_json, model_from_json
from peftc.graph.tensors import TRAINABLE, TensorFacts, shape_from_json, tensors_from_json
from peftc.registry.manager import Registry, default_registry
from peftc.schema.plan import plan_schema
from peftc.schema.structure import structure_problems
from peftc.tuner.prompt import Place
from peftc.tuner.slots import Container, Slot

VERSION = 1


def plan_to_json(plan: InjectionPlan) -> dict[str, Any]:
    """Plain data of JSON types, with a digest of itself under `digest`."""
    trainable, total = plan.counts()
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "base": None if plan.base is None else _given(asdict(plan.base)),
        "model": {**asdict(plan.model), "dims": dict(plan.model.dims)},
        "base_parameters": plan.base_numel,
        "base_bytes": plan.base_bytes,
        "graph": plan.graph_digest,
        "active": list(plan.active),
        "trainable": trainable,
        "total": total,
        "adapters": [_adapter_to_json(adapter) for adapter in plan.adapters],
        "warnings": [_given(warning.to_dict()) for warning in plan.warnings],
    }
    return {**data, "digest": _digest(data)}


def plan_digest(plan: InjectionPlan) -> str:
    """SHA-256 of the plan's content: equal for equal plans, on every machine."""
    return str(plan_to_json(plan)["digest"])


def plan_to_text(plan: InjectionPlan) -> str:
    """The plan's JSON, two spaces deep, with one short row a line."""
    return layout(plan_to_json(plan)) + "\n"


def plan_from_text(text: str, file: str = "plan", registry: Registry | None = None) -> InjectionPlan:
    """The plan in a JSON text. Raises `PeftcError` if it is not a plan, of another version, or was edited, with the lines."""
    document = parse_json(text, file)
    return _plan(document.data, lambda problem: document.where(problem.location, problem.on_key), registry)


def plan_from_json(data: object, registry: Registry | None = None) -> InjectionPlan:
    """The inverse of `plan_to_json`. Raises `PeftcError` if the data is not a plan, of another version, or was edited."""
    return _plan(data, lambda problem: Where(path=json_path(problem.location)), registry)


def _plan(data: object, where: Callable[[Problem], Where], registry: Registry | None) -> InjectionPlan:
    def refused(what: str, problem: Problem | None = None) -> Diagnostic:
        place = None if problem is None else where(problem)
        fix = "Write it again with `peftc plan SPEC --out FILE`."
        return rules.PLAN_INVALID(what, fix=fix, where=place or Where(file=where(_WHOLE).file))

    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise PeftcError(refused(f"It has no `format: {FORMAT}`{hint_of(data)}"))
    if data.get("version") != VERSION:
        what = f"It is a plan of version {shorten(data.get('version'))}; this version of peftc reads {VERSION}"
        raise PeftcError(refused(what))
    try:
        digest = _digest({key: value for key, value in data.items() if key != "digest"})
    except (RecursionError, TypeError, ValueError) as error:  # Python's own data may be anything
        raise PeftcError(refused(f"It is not data of JSON types: {error}")) from None
    if data.get("digest") != digest:
        raise PeftcError(refused("Its content does not have its digest: it was changed after it was written"))
    differs = [refused(p.diagnostic.what, p) for p in structure_problems(data, plan_schema(), exact=True)]
    if differs:
        raise PeftcError(capped(differs))
    try:
        return _from_json(data, registry or default_registry())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, PeftcError):
            raise
        raise PeftcError(refused(f"Its content is not that of a plan: {type(error).__name__}: {error}")) from error


_WHOLE = Problem((), rules.PLAN_INVALID("", fix=""))


def _from_json(data: Mapping[str, Any], registry: Registry) -> InjectionPlan:
    """The plan of data that has the right form."""
    return InjectionPlan(
        model=model_from_json(data["model"]),
        adapters=tuple(_adapter_from_json(item, registry) for item in data["adapters"]),
        active=tuple(data["active"]),
        base_numel=data["base_parameters"],
        warnings=tuple(_diagnostic(item) for item in data["warnings"]),
        stored_digest=data["graph"],
        stored_bytes=data["base_bytes"],
        base=None if data["base"] is None else BaseRef(**data["base"]),
    )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the members that are None."""
    return {
        key: _given(value) if isinstance(value, dict) else value for key, value in values.items() if value is not None
    }


# one adapter ----------------------------------------------------------------------------------------------------------


def _adapter_to_json(adapter: AdapterPlan) -> dict[str, Any]:
    table: dict[str, int] = {}  # by content, so that equal plans have equal tables whatever objects they share
    known: dict[tuple[int, int, int, str, str, Role | None], int] = {}
    rows = []
    for site in adapter.maps:
        key = (id(site.layer), id(site.slots), id(site.config), site.dtype, site.reason, site.role)
        if key not in known:
            known[key] = table.setdefault(json.dumps(_kind_to_json(site), sort_keys=True), len(table))
        rows.append([site.path, known[key], *_beside_kind(site)])
    return {
        "name": adapter.name,
        "peft_type": adapter.peft_type,
        "config": {**adapter.config.to_json(), "peft_version": None},  # which version made it decides nothing
        "kinds": [json.loads(kind) for kind in table],
        "maps": rows,
        "saves": [
            {
                "path": s.path,
                "reason": s.reason,
                "tensors": _tensors(s.tensors),
                "buffers": _tensors(s.buffers),
                **({"lifted": True} if s.lifted else {}),
                **({"tied": [list(pair) for pair in s.tied]} if s.tied else {}),
            }
            for s in adapter.saves
        ],
        "trains": [
            [t.path, t.name, list(t.tensor.shape), t.tensor.dtype, t.wrapped, t.reason, *_beside_bias(t)]
            for t in adapter.trains
        ],
        "prompt": None if adapter.prompt is None else _prompt_to_json(adapter.prompt),
        **({"modules": _modules_to_json(adapter.modules)} if adapter.modules else {}),
        **({"call": _call_to_json(adapter.call)} if adapter.call is not None else {}),
        **({"rewrites": [_rewrite_to_json(item) for item in adapter.rewrites]} if adapter.rewrites else {}),
        **({"needed_by": adapter.needed_by, "origin": adapter.origin} if adapter.needed_by else {}),
        **({"notes": list(adapter.notes)} if adapter.notes else {}),
    }


def _adapter_from_json(data: Mapping[str, Any], registry: Registry) -> AdapterPlan:
    method = registry.get(data["peft_type"])
    config = method.config(**data["config"])
    kinds = [_kind_from_json(item, config) for item in data["kinds"]]
    return AdapterPlan(
        name=data["name"],
        peft_type=data["peft_type"],
        config=config,
        maps=tuple(MapSite(path, *kinds[index], *_beside(rest)) for path, index, *rest in data["maps"]),
        saves=tuple(
            SaveSite(
                s["path"],
                tensors_from_json(s["tensors"]),
                tensors_from_json(s["buffers"]),
                s["reason"],
                s.get("lifted", False),
                tuple((tail, home) for tail, home in s.get("tied", ())),
            )
            for s in data["saves"]
        ),
        trains=tuple(_train_from_json(row) for row in data["trains"]),
        prompt=None if data["prompt"] is None else _prompt_from_json(data["prompt"]),
        modules=tuple(site for item in data.get("modules", ()) for site in _modules_from_json(item, config)),
        call=None if "call" not in data else _call_from_json(data["call"]),
        needed_by=data.get("needed_by", ""),
        origin=data.get("origin", ""),
        notes=tuple(data.get("notes", ())),
        rewrites=tuple(_rewrite_from_json(item) for item in data.get("rewrites", ())),
    )


def _beside_kind(site: MapSite) -> list[Any]:
    """What tells a site from others of its kind: nothing, for most."""
    if site.tied:
        mirrors = [list(pair) for pair in site.mirrors]
        return [site.parameter, site.outside, site.place, site.inside, site.tied, mirrors]
    if site.inside:
        return [site.parameter, site.outside, site.place, site.inside]
    if site.place:
        return [site.parameter, site.outside, site.place]
    return [site.parameter, site.outside] if site.parameter else []


def _beside_bias(train: TrainSite) -> list[Any]:
    """What only some have."""
    if train.copies:
        return [train.place, list(train.copies)]
    return [train.place] if train.place else []


def _train_from_json(row: list[Any]) -> TrainSite:
    path, name, shape, dtype, wrapped, reason, *rest = row
    place, copies = (*rest, "", [])[:2] if len(rest) < 2 else rest
    return TrainSite(path, name, TensorFacts(shape_from_json(shape), dtype), wrapped, reason, place, tuple(copies))


def _beside(row: list[Any]) -> list[Any]:
    """The way back, for the fields of a site that follow those of its kind."""
    return row if len(row) < 6 else [*row[:5], tuple((name, own) for name, own in row[5])]


def _rewrite_to_json(rewrite: Rewrite) -> dict[str, Any]:
    return {
        "entries": list(rewrite.entries),
        "layers": list(rewrite.layers),
        "parameter": rewrite.parameter,
        "options": [list(change) for change in rewrite.options],
    }


def _rewrite_from_json(data: Mapping[str, Any]) -> Rewrite:
    options = tuple((name, before, now) for name, before, now in data["options"])
    return Rewrite(tuple(data["entries"]), tuple(data["layers"]), data["parameter"], options)


_Kind = tuple[LayerFacts, PeftConfig, tuple[Slot, ...], str, str, tuple[tuple[str, Any], ...], Role | None]


def _kind_to_json(site: MapSite) -> dict[str, Any]:
    return {
        "layer": facts_to_json(site.layer),
        "slots": [_slot_to_json(slot) for slot in site.slots],
        "dtype": site.dtype,
        "reason": site.reason,
        "role": site.role and site.role.value,
        "overrides": [list(pair) for pair in site.overrides],
    }


def _kind_from_json(data: Mapping[str, Any], config: PeftConfig) -> _Kind:
    overrides = tuple((name, value) for name, value in data["overrides"])
    here = config.model_copy(update=dict(overrides)).revalidated() if overrides else config
    slots = tuple(_slot_from_json(item) for item in data["slots"])
    role = None if data["role"] is None else Role(data["role"])
    return facts_from_json(data["layer"]), here, slots, data["dtype"], data["reason"], overrides, role


def _modules_to_json(sites: tuple[ModuleSite, ...]) -> list[dict[str, Any]]:
    """Neighbours that differ in their path alone are one entry."""
    found: list[dict[str, Any]] = []
    for site in sites:
        kind = {
            "inner": site.inner,
            "layer": facts_to_json(site.layer),
            "slots": [_slot_to_json(slot) for slot in site.slots],
            "dtype": site.dtype,
            "reason": site.reason,
            "role": site.role and site.role.value,
        }
        if found and {**found[-1], "paths": []} == {**kind, "paths": []}:
            found[-1]["paths"].append(site.path)
        else:
            found.append({**kind, "paths": [site.path]})
    return found


def _modules_from_json(data: Mapping[str, Any], config: PeftConfig) -> list[ModuleSite]:
    layer, slots = facts_from_json(data["layer"]), tuple(_slot_from_json(item) for item in data["slots"])
    role = None if data["role"] is None else Role(data["role"])
    facts = (layer, config, slots, data["dtype"], data["inner"], data["reason"], role)
    return [ModuleSite(path, *facts) for path in data["paths"]]


def _call_to_json(call: CallSite) -> dict[str, Any]:
    slots = [_slot_to_json(slot) for slot in call.slots]
    return {**asdict(call), "slots": slots, "needs": list(call.needs), "layers": list(call.layers)}


def _call_from_json(data: Mapping[str, Any]) -> CallSite:
    slots = tuple(_slot_from_json(item) for item in data["slots"])
    return CallSite(data["owner"], slots, data["dtype"], tuple(data["needs"]), tuple(data["layers"]))


#: What nearly all slots have and a file leaves out.
_USUAL = {"named": True, "derived": False, "share": "", "home": None, "value": None, "blocks": 1, "stored_tail": None}


def _slot_to_json(slot: Slot) -> dict[str, Any]:
    data = {**asdict(slot), "shape": list(slot.shape), "container": slot.container.value}
    return {key: value for key, value in data.items() if key not in _USUAL or value != _USUAL[key]}


def _slot_from_json(data: Mapping[str, Any]) -> Slot:
    if data["trainable"] and data["dtype"] not in (None, *TRAINABLE):
        raise ValueError(f"`{data['name']}` is to be trained, and no gradient moves numbers of {data['dtype']}")
    return Slot(**{**data, "shape": shape_from_json(data["shape"]), "container": Container(data["container"])})


def _prompt_to_json(prompt: PromptSite) -> dict[str, Any]:
    return {
        **asdict(prompt),
        "slots": [_slot_to_json(s) for s in prompt.slots],
        "shape": list(prompt.shape),
        "place": prompt.place.value,
        "extra": [[key, list(shape)] for key, shape in prompt.extra],
    }


def _prompt_from_json(data: Mapping[str, Any]) -> PromptSite:
    read = {
        "slots": tuple(_slot_from_json(item) for item in data["slots"]),
        "shape": shape_from_json(data["shape"]),
        "place": Place(data.get("place", Place.INPUT)),  # plans of the first version say neither
        "extra": tuple((key, shape_from_json(shape)) for key, shape in data.get("extra", ())),
    }
    return PromptSite(**{**data, **read})


def _tensors(tensors: tuple[tuple[str, TensorFacts], ...]) -> list[list[Any]]:
    return [[name, list(facts.shape), facts.dtype] for name, facts in tensors]


def _diagnostic(data: Mapping[str, Any]) -> Diagnostic:
    return Diagnostic(**{**data, "severity": Severity(data["severity"]), "where": Where(**data["where"])})


# layout ---------------------------------------------------------------------------------------------------------------


def layout(value: Any, depth: int = 0, width: int = 110) -> str:
    """JSON with sorted keys, two spaces deep; what fits on a line is on one."""
    short = json.dumps(value, sort_keys=True)
    if len(short) + 2 * depth <= width or not isinstance(value, (dict, list)) or not value:
        return short
    pad = "  " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {layout(value[key], depth + 1, width)}" for key in sorted(value)]
        opening, closing = "{", "}"
    else:
        parts = [layout(item, depth + 1, width) for item in value]
        opening, closing = "[", "]"
    body = f",\n{pad}".join(parts)
    return f"{opening}\n{pad}{body}\n{'  ' * depth}{closing}"
