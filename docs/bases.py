"""The page `bases.md`: what each method can do on layers whose weight a library packs, as the compiler and the records say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from peftc import rules
from peftc.diagnostics import Rule
from peftc.registry.door import OWN
from peftc.registry.starts import default_starts
from peftc.registry.storages import default_storages
from peftc.testing.cells import cell_of
from peftc.testing.packed import packed_subjects
from peftc.testing.storage import ROUNDED, known
from peftc.testing.subjects import Subject
from peftc.tuner.features import features_of
from peftc.tuner.method import TunerMethod
from peftc.tuner.storage import Storage

_HEAD = """\
# Packed bases

A storage is how a library keeps the weight of a linear layer in fewer bits ([writing one](writing-a-plugin.md#a-storage)). No method
knows of any, and no storage of methods: every method runs on every storage, but for what a table here says. The conformance kit holds
each method to this on a storage made for it (`trains_as_on_plain_layers`, `merges_into_packed_layers` and those around them), and on
a library that is installed by `peftc plugins check METHOD --storage NAME`, or all methods by `peftc plugins check NAME`."""
_LETTERS = """\
- T: it trains as on plain layers with the opened weights
- M: it is merged: the changed weight is packed anew, and what rounding costs is told
- U: it is unmerged, back to the same bits
- S: it is saved, and loaded to the same output
- R: another adapter for each row of a batch
- a code: it is refused by that rule, in the plan as on the model"""
_BESIDE = "M and U: what it adds depends on the input, or is more than a change of the layers' own parameters: it stays beside them"


def bases_page(methods: Sequence[TunerMethod], cell: Callable[[str], str]) -> str:
    """The page, of what comes with peftc; `cell` is how the other pages write text in tables."""
    door = default_storages()
    storages = [door.get(claim.name) for claim in door.claims if claim.distribution == OWN]
    reasons: dict[str, list[str]] = {}
    table = list(_table(methods, storages, reasons))
    told = [f"- {', '.join(dict.fromkeys(which))}: {why}" for why, which in reasons.items()]
    changing = [
        door.get(claim.name) for door in (default_starts(),) for claim in door.claims if claim.distribution == OWN
    ]
    names = ", ".join(f"`{start.name}`" for start in changing if start.changes_base)
    starts = (
        f"Starts that change the base weight ({names}) are refused on packed layers ({rules.START_UNFIT.code}): what they take out"
        " of the weight would be lost in rounding. The others begin from the opened weight."
    )
    blocks = [_HEAD, "## Storages", "\n".join(_storages(storages, cell)), _HELD, "## Methods", _LETTERS]
    return (
        "\n\n".join([*blocks, "\n".join(table), "Where a letter is missing:", "\n".join(told), "## Starts", starts])
        + "\n"
    )


#: What the cells rest on, beside the compiler's answers and the records.
_HELD = """\
What holds it, beside the kit on the storage that is made for it: every method by the kit on bitsandbytes' layers; one method on each of 27
bases of all libraries that run on a CPU (`make test-bases`: a step of training, losses of the reference, merging, unmerging, files,
generation). AQLM, AWQ, EETQ, GPTQ and transformer-engine do not run on the machines of these tests: layers in plain torch with their
classes' names and the layouts that they document stand in for them. FP8 of transformers is opened and packed there, and not called, as
its kernels need a GPU."""


def _storages(storages: Sequence[Storage], cell: Callable[[str], str]) -> Iterator[str]:
    yield "| storage | what it is | package | another weight |"
    yield "| --- | --- | --- | --- |"
    for storage in storages:
        what = (type(storage).__doc__ or "").splitlines()[0]
        some = type(storage).cannot_pack is not Storage.cannot_pack
        packs = f"no: {storage.unwritable}" if storage.unwritable else "of some layers" if some else "yes"
        yield f"| `{storage.name}` | {cell(what)} | {cell(storage.package)} | {cell(packs)} |"


def _table(methods: Sequence[TunerMethod], storages: Sequence[Storage], reasons: dict[str, list[str]]) -> Iterator[str]:
    """A line for each method, and for those of its options that come to something else. `reasons` gets why letters are missing."""
    yield f"| method | options | {' | '.join(f'`{storage.name}`' for storage in storages)} |"
    yield f"| --- | --- |{' --- |' * len(storages)}"
    with known(ROUNDED):
        for method in methods:
            seen: set[tuple[str, ...]] = set()
            for s in packed_subjects(method):
                said = tuple(_said(s, storage, reasons) for storage in storages)
                options = ", ".join(f"{name}={value}" for name, value in s.options.items()) if seen else ""
                if said not in seen:
                    link = f"[{method.peft_type}](methods/{method.peft_type.lower()}.md)"
                    yield f"| {link} | {f'`{options}`' if options else ''}{_left(s)} | {' | '.join(said)} |"
                seen.add(said)


def _left(s: Subject) -> str:
    return "layers that are not packed" if s.part == "rest" else ""


def _said(s: Subject, storage: Storage, reasons: dict[str, list[str]]) -> str:
    found = cell_of(s)
    uses = features_of(s.method)["uses"]
    options = f" (`{', '.join(s.options)}`)" if uses["merge"] else ""
    named = f"`{s.method.peft_type}`{options}"
    if found.codes:
        for rule in (r for r in vars(rules).values() if isinstance(r, Rule) and r.code in found.codes):
            reasons.setdefault(f"{rule.title}. {rule.why}", []).append(f"[{rule.code}](diagnostics.md)")
        return ", ".join(found.codes)
    letters = "T"
    if not s.merges:
        reasons.setdefault(_BESIDE, []).append(named)
    elif storage.unwritable and s.part != "rest":
        why = f"M and U: no other weight can be stored, as {storage.unwritable} ({rules.PACKED_FOR_GOOD.code})"
        reasons.setdefault(why, []).append(f"`{storage.name}`")
    else:
        letters += "MU"
    rows = uses["rows"] and not s.rebases
    if not rows:
        reasons.setdefault("R: it is no change of layers, of which each row could have its own", []).append(named)
    return f"{letters}S{'R' if rows else ''}"
