"""Keys as a live model's state dict has them, with the adapter's name in them, found by what is planned.

A checkpoint leaves the name out (`q_proj.lora_A.weight`); `model.state_dict()` does not (`q_proj.lora_A.default.weight`).
Where the name would stand is known of every planned tensor, so any name is recognised, and nothing else is taken for one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from peftc.checkpoint.keys import PARALLEL, Segments, assign, unwrapped
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import WRAPPED_ROOT

#: What stands before and after an adapter's name.
_Place = tuple[Segments, Segments]


def assign_planned(plan: AdapterPlan, wanted: Collection[str], found: Collection[str]) -> dict[str, str]:
    """Planned key -> key in the file, as `assign`; for what is not found so, keys with one adapter's name in them.

    Of several names in the file the plan's own counts; if it is not among them nobody can say which is meant, and such keys
    are left alone.
    """
    sources = assign(wanted, found, plan.root)
    if len(sources) == len(wanted):
        return sources
    missing, used = {key for key in wanted if key not in sources}, set(sources.values())
    places = {place: disk for disk, place in _places(plan) if disk in missing}
    offers = _by_name((key for key in found if key not in used), places, plan.root)
    name = next(iter(offers)) if len(offers) == 1 else plan.name
    return sources | offers.get(name, {})


def _by_name(left: Iterable[str], places: dict[_Place, str], root: str) -> dict[str, dict[str, str]]:
    """Adapter's name -> planned key -> key in the file."""
    offers: dict[str, dict[str, str]] = {}
    for key in left:
        segments = unwrapped(key, root)
        starts = (segments, segments[1:]) if segments[:1] == (PARALLEL,) else (segments,)
        for parts in starts:
            for at in range(1, len(parts)):
                disk = places.get((parts[:at], parts[at + 1 :]))
                if disk is not None:
                    offers.setdefault(parts[at], {}).setdefault(disk, key)
    return offers


def _places(plan: AdapterPlan) -> Iterator[tuple[str, _Place]]:
    """Checkpoint key -> where an adapter's name stands in the live model's name of that tensor."""
    for site in plan.sites:
        for slot in site.slots:
            key = site.key(slot, "")
            heads = {key.home, None}  # a shared tensor shows at each of its layers and where it is saved
            for home in heads:
                head = replace(key, tail="", stored_tail=None, home=home).disk(WRAPPED_ROOT)
                yield key.disk(WRAPPED_ROOT), (unwrapped(head, WRAPPED_ROOT), _split(slot.tail))
    for save in plan.saves:
        for tail, _ in (*save.tensors, *save.buffers):
            yield f"{plan.root}{save.path}.{tail}", (_split(save.key("", "").memory()), _split(tail))
    for slot in () if plan.prompt is None else plan.prompt.slots:
        disk = None if plan.prompt is None else plan.prompt.disk_of(slot)
        if disk is not None:
            yield disk, (("prompt_encoder",), _split(slot.dotted))
    if plan.call is not None:
        for slot in plan.call.slots:
            yield plan.call.disk(slot.dotted), (_split(plan.call.owner), _split(slot.dotted))


def _split(name: str) -> Segments:
    return tuple(name.split(".")) if name else ()
