"""The page `variants.md`: which variant of a method goes with which start on which kind of layer, as the compiler answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from peftc import rules
from peftc.diagnostics import Rule
from peftc.registry.door import OWN
from peftc.registry.starts import default_starts
from peftc.testing.cells import Cell, Row, rows
from peftc.testing.models import KINDS
from peftc.tuner.method import TunerMethod
from peftc.tuner.start import Reads, Start

_HEAD = """\
# Variants and starts

A variant is other mathematics over a method's options, a start is how its factors begin; both come by name, also from other
packages ([writing one](writing-a-plugin.md#a-variant-of-a-method)). The tables say which go together on which kind of layer. Every
cell is the compiler's answer to these options on such a layer; the conformance kit (`begins_as_it_says`) holds each to what
happens: what is defined begins as it says, learns in a step and merges, what is not is refused by that rule before the model is
touched. `peftc plugins check NAME` does the same with a variant or a start of yours.

- yes: it acts, and can be merged
- beside: it acts, and stays beside the weight
- plain: it acts, and the layer, or a part of it, begins as without the start, which is told (PC462)
- a code: it is refused"""
#: Kinds by the names of the models that stand for them.
_NAMED = {
    "transposed": "`Conv1D` of transformers",
    "grouped": "conv2d, groups",
    "experts": "experts, parameters",
    "attention": "`MultiheadAttention`",
}


def variants_page(methods: Sequence[TunerMethod], cell: Callable[[str], str]) -> str:
    """The page, of what comes with peftc; `cell` is how the other pages write text in tables."""
    door = default_starts()
    starts = [door.get(claim.name) for claim in door.claims if claim.distribution == OWN]
    blocks = [_HEAD, "## Starts", _starts(starts, cell)]
    used: set[str] = set()
    for method in methods:
        table = rows(method, starts)
        if table:
            blocks += [
                f"## [{method.peft_type}](methods/{method.peft_type.lower()}.md)",
                "\n".join(_table(table, used)),
            ]
    found = sorted((r for r in vars(rules).values() if isinstance(r, Rule) and r.code in used), key=lambda r: r.code)
    blocks += ["## Rules", "\n".join(f"- [{r.code}](diagnostics.md): {r.title}. {r.why}" for r in found)]
    return "\n\n".join(blocks) + "\n"


def _starts(starts: Sequence[Start], cell: Callable[[str], str]) -> str:
    lines = ["| start | what it does | the base | reads | |", "| --- | --- | --- | --- | --- |"]
    for start in starts:
        base = "changes while the adapter acts" if start.changes_base else "stays"
        reads = "" if start.reads is Reads.NOTHING else str(start.reads)
        lines.append(f"| `{start.name}` | {cell(start.summary)} | {base} | {reads} | {start.paper} |")
    return "\n".join(lines)


def _table(table: Sequence[Row], used: set[str]) -> Iterator[str]:
    """One line for all starts that come to the same with a variant. `used` gets the codes."""
    names = [_NAMED.get(model.name, model.name) for model in KINDS]
    yield f"| variant | start | {' | '.join(names)} |"
    yield f"| --- | --- |{' --- |' * len(names)}"
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in table:
        cells = [cell for _, cell in row.cells()]
        used |= {code for cell in cells for code in cell.codes}
        variant = f"`{row.variant.option}`" if row.variant is not None else ""
        lines.setdefault((variant, tuple(map(_said, cells))), []).append(_value(row))
    for (variant, said), values in lines.items():
        yield f"| {variant} | {', '.join(values)} | {' | '.join(said)} |"


def _value(row: Row) -> str:
    if row.variant is not None and row.variant.start is not None:
        return "its own"
    return f"`{row.value}`" if isinstance(row.value, str) else f"`{str(row.value).lower()}`"


def _said(cell: Cell) -> str:
    if cell.codes:
        return ", ".join(cell.codes)
    return "plain" if cell.spared else "yes" if cell.merges else "beside"
