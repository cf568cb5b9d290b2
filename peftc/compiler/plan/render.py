"""A plan for people: repeated layers on one line, totals, what training needs, warnings at the end.

Plain text of about 100 columns; a caller on a terminal passes a function that colours it. Counts are exact.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.cost import Cost, cost_of, file_bytes, trainable_by_role
from peftc.compiler.plan.mesh import Share
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.sites import MapSite, ModuleSite
from peftc.graph.groups import grouped
from peftc.graph.nodes import LINEAR_KINDS, LayerFacts
from peftc.registry.optimizers import ChosenOptimizer, chosen_optimizer

#: A text and styles (`bold`, `dim`, `yellow`, …) to the text to print. All text from outside goes through it.
Paint = Callable[..., str]


def plain(text: str, *styles: str) -> str:
    """The text as it is."""
    return text


def render_plan(plan: InjectionPlan, paint: Paint = plain, optimizer: ChosenOptimizer | None = None) -> str:
    """The whole plan, its warnings last; with the memory that training takes with this optimiser, AdamW if none is given."""
    parts = [_head(plan, paint)]
    parts += [_adapter(adapter, adapter.name in plan.active, paint) for adapter in plan.adapters]
    parts.append(_totals(plan, paint, optimizer or chosen_optimizer(None, None)))
    if plan.warnings:
        parts.append("\n".join(_warnings(plan, paint)))
    return "\n\n".join(parts) + "\n"


def _head(plan: InjectionPlan, paint: Paint) -> str:
    name = plan.model.name_or_path or plan.model.cls
    facts = [plan.model.cls] if plan.model.name_or_path else []
    facts += [f"{plan.base_numel:,} parameters", f"{size(plan.base_bytes)}"]
    return f"{paint('Plan for', 'dim')} {paint(name, 'bold')}  {paint(', '.join(facts), 'dim')}"


def _adapter(adapter: AdapterPlan, active: bool, paint: Paint) -> str:
    reasons = {site.reason for site in adapter.sites}
    aside = any(not slot.named for site in adapter.modules for slot in site.slots)
    facts = [adapter.peft_type, "active" if active else "not active, kept aside" if aside else "not active"]
    facts += ["frozen"] if adapter.config.inference_mode else []
    facts += [f"targets {reasons.copy().pop()}"] if len(reasons) == 1 else []
    title = f"{paint('Adapter', 'dim')} {paint(adapter.name, 'bold', 'cyan')}  {paint(', '.join(facts), 'dim')}"
    rows = [*_site_rows(adapter.sites, with_reason=len(reasons) > 1), *_other_rows(adapter)]
    heads = ("module", "", "layer", "stored", "adds", "trainable", "why")
    notes = [paint(_wrapped(note, 100), "dim") for note in adapter.notes]
    told = [_rewritten(adapter, paint)] if adapter.rewrites else []
    return "\n".join([title, *notes, _table(rows, heads, paint), *told])


def _rewritten(adapter: AdapterPlan, paint: Paint) -> str:
    """Which targets were given by names that layers had before they were fused, and what they are now."""
    told = "; ".join(str(rewrite) for rewrite in adapter.rewrites if rewrite.layers)
    told = told or "experts and routers that are parameters"
    return f"{paint('rewritten '.ljust(10), 'dim')}{paint(_wrapped(told))}"


_Row = tuple[str, str, str, str, str, str, str]


def _site_rows(sites: Sequence[MapSite | ModuleSite], with_reason: bool) -> Iterable[_Row]:
    first: dict[tuple[Any, ...], MapSite | ModuleSite] = {}
    tagged = []
    for site in sites:
        tag = (id(site.layer), id(site.slots), id(site.config), site.reason, site.dtype)
        first.setdefault(tag, site)
        tagged.append((site.path, tag))
    for group in grouped(tagged):
        site = first[group.tag]
        why = [site.reason] if with_reason else []
        why += [f"{option}={value}" for option, value in site.overrides] if isinstance(site, MapSite) else []
        layer = shape_of(site.layer) if isinstance(site, MapSite) else f"around {site.layer.cls}"
        stored = site.layer.packed.storage if site.layer.packed is not None else ""
        adds = " + ".join("×".join(map(str, slot.shape)) for slot in site.slots)
        number = group.count * sum(slot.numel for slot in site.slots if slot.trainable)
        yield group.pattern, f"×{group.count:,}", layer, stored, adds, f"{number:,}", ", ".join(why)


def _other_rows(adapter: AdapterPlan) -> Iterable[_Row]:
    copies = [(s.path, (sum(facts.numel for _, facts in s.tensors), s.reason, s.lifted)) for s in adapter.saves]
    for copy in grouped(copies):
        number, reason, lifted = copy.tag
        told = f"{copy.count * number:,}"
        yield (
            copy.pattern,
            f"×{copy.count:,}",
            "whole module",
            "",
            "a float32 copy" if lifted else "a copy",
            told,
            f"modules_to_save: {reason}",
        )
    tagged = [(f"{t.path}.{t.name}" if t.path else t.name, (t.tensor.shape, t.reason)) for t in adapter.trains]
    for bias in grouped(tagged):
        shape, reason = bias.tag
        told = f"{bias.count * math.prod(shape):,}"
        yield bias.pattern, f"×{bias.count:,}", "×".join(map(str, shape)), "", "trains itself", told, reason
    if adapter.prompt is not None:
        for slot in adapter.prompt.slots:
            rows, width = adapter.prompt.shape
            layer = f"{rows} tokens of {width}"
            number = slot.numel if slot.trainable else 0
            yield (
                "prompt",
                "×1",
                layer,
                "",
                "×".join(map(str, slot.shape)),
                f"{number:,}",
                f"before {adapter.prompt.embeddings}",
            )


def shape_of(layer: LayerFacts) -> str:
    """What the layer maps: `576→1536`, with its kind where it is not linear.

    >>> from peftc.graph.nodes import Kind
    >>> shape_of(LayerFacts(Kind.CONV2D, "Conv2d", 3, 64, kernel=(7, 7)))
    'conv2d 3→64, 7×7'
    """
    if layer.experts:
        return f"{next(iter(layer.params))} {layer.experts}×({layer.in_features}→{layer.out_features})"
    kind = "" if layer.kind in LINEAR_KINDS else f"{layer.kind.value} "
    kernel = f", {'×'.join(map(str, layer.kernel))}" if layer.kernel else ""
    return f"{kind}{layer.in_features}→{layer.out_features}{kernel}"


def render_share(share: Share, paint: Paint = plain, optimizer: ChosenOptimizer | None = None) -> str:
    """What each process of a mesh has in memory, and what was assumed about it."""
    mesh = share.mesh
    told = f"{mesh.ranks:,} processes, each with at most" if mesh.ranks > 1 else "which has"
    rows = [("memory", _memory(share.cost, optimizer or chosen_optimizer(None, None)))]
    rows += [("assumed", "; ".join(share.assumed))] if share.assumed else []
    head = f"{paint('Mesh', 'dim')} {paint(str(mesh), 'bold')}  {paint(told, 'dim')}"
    return "\n".join([head, *_labelled(rows, paint)]) + "\n"


def _labelled(rows: Iterable[tuple[str, str]], paint: Paint) -> Iterable[str]:
    return (f"{paint(label.ljust(10), 'dim')}{paint(_wrapped(text))}" for label, text in rows)


def _memory(cost: Cost, optimizer: ChosenOptimizer) -> str:
    parts = {"base": cost.base, "adapter": cost.adapters, "gradients": cost.gradients}
    parts[optimizer.record.title] = cost.optimiser
    parts |= {"original weights": cost.originals} if cost.originals else {}
    told = ", ".join(f"{name} {size(number)}" for name, number in parts.items())
    return f"{size(cost.training)} + activations: {told}"


def _totals(plan: InjectionPlan, paint: Paint, optimizer: ChosenOptimizer) -> str:
    trainable, total = plan.counts()
    rows = []
    if len(plan.adapters) > 1:
        for adapter in plan.adapters:
            number = sum(adapter.tally().trained.values())
            kind = "modules" if adapter.modules else "layers"
            rows.append((adapter.name, f"{number:,} parameters in {len(adapter.sites):,} {kind}"))
    by_role = trainable_by_role(plan)
    if by_role:
        rows.append(("by role", ", ".join(f"{role} {number:,}" for role, number in by_role.items())))
    rows.append(("trainable", f"{trainable:,} of {total:,} parameters ({percent(trainable, total)})"))
    files = [file_bytes(adapter, plan.model) for adapter in plan.adapters]
    rows.append(("on disk", f"{size(sum(files))} ({sum(files):,} bytes)"))
    rows.append(("memory", _memory(cost_of(plan, optimizer), optimizer)))
    return "\n".join(_labelled(rows, paint))


def _wrapped(text: str, width: int = 90) -> str:
    indent = " " * (100 - width)
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _warnings(plan: InjectionPlan, paint: Paint) -> Iterable[str]:
    for warning in plan.warnings:
        head, *rest = str(warning).splitlines()
        label, _, what = head.partition(": ")
        yield "\n".join([f"{paint(label, 'bold', 'yellow')}: {paint(what)}", *map(paint, rest)])


def percent(part: int, whole: int) -> str:
    """A share with four digits after the point, as the reference prints it."""
    return f"{100 * part / whole:.4f}%" if whole else "0%"


def size(number: int) -> str:
    """Bytes for people, in decimal units.

    >>> size(999), size(19_552_880), size(810_000_000_000)
    ('999 B', '19.6 MB', '810.0 GB')
    """
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def _table(rows: Sequence[_Row], heads: _Row, paint: Paint) -> str:
    """Columns two spaces apart, numbers to the right; columns without content are left out."""
    used = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in [heads, *rows]) for i in used}
    right = {1, 5}

    def line(row: _Row) -> list[str]:
        return [row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i]) for i in used]

    def styled(i: int, cell: str) -> str:
        return paint(cell, "bold") if i == 5 else paint(cell, "dim") if i in (1, 6) else paint(cell)

    laid = [paint("  ".join(line(heads)).rstrip(), "dim")]
    for row in rows:
        cells = line(row)
        cells[-1] = cells[-1].rstrip()
        laid.append("  ".join(styled(i, cell) for i, cell in zip(used, cells, strict=True)))
    return "\n".join(laid)
