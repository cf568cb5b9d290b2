"""The page of tried releases, from the records that runs of the suite leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftc.compat import pins
from peftc.installed.requirements import needs
from peftc.installed.tried import Run, runs

#: columns of the table of runs; all versions of a run stand below it
SHOWN = (
    "transformers",
    "torch",
    "accelerate",
    "diffusers",
    "trl",
    "sentence-transformers",
    "huggingface_hub",
    "pydantic",
)


def versions_page(tried: Sequence[Run] | None = None) -> str:
    """Releases that are admitted, runs, and what libraries ask of the alias."""
    return "\n\n".join([*_admitted(), *_runs(runs() if tried is None else tried), *_asked()]) + "\n"


def _admitted() -> Iterator[str]:
    yield "# Releases of other packages"
    yield (
        "What peftc works with, and on which releases its tests were run. `peftc doctor` compares an installation with"
        " this page, and is what a report of a problem should contain. A release outside the bounds is refused when peftc"
        " first needs it, with the line to install."
    )
    rows = [f"| `{n.name}` | {_cell(str(n).removeprefix(n.name))} | {_for(n.extra)} |" for n in needs()]
    yield "\n".join(["| package | releases | for |", "| --- | --- | --- |", *rows])


def _for(extra: str) -> str:
    return f"`peftc[{extra}]`" if extra else "all of peftc"


def _runs(tried: Sequence[Run]) -> Iterator[str]:
    yield "## What was tried"
    yield (
        "Each line is a run of the whole suite by `make test-newest`, `make test-oldest` or `make test-on RELEASE=…`, as"
        " it counted itself. torch is the build at hand in all of them: its own lower bound was not run."
    )
    if not tried:
        yield "No run is on record yet."
        return
    head = f"| environment | date | Python | {' | '.join(SHOWN)} | passed | failed | skipped |"
    rows = [
        f"| {run.environment} | {run.date} | {run.python} | {' | '.join(run.versions.get(n, '') for n in SHOWN)}"
        f" | {run.passed:,} | {run.failed:,} | {run.skipped:,} |"
        for run in tried
    ]
    yield "\n".join([head, "| --- " * (len(SHOWN) + 6) + "|", *rows])


def _asked() -> Iterator[str]:
    yield "## What libraries ask of the alias"
    said = ", ".join(f"`{version}`" for version in pins.data()["said"])
    yield (
        f"The alias says that it is the lowest of {said} that all libraries in the environment take. `peftc doctor` names"
        " those that do not take it."
    )
    rows = [
        f"| {p['by']} {_cell(p['releases'])} | {_cell(p['peft']) or 'any'} | {_cell(p['where'])} |"
        for p in pins.data()["asked"]
    ]
    yield "\n".join(["| library | `peft` | where it says so |", "| --- | --- | --- |", *rows])
    yield "Where a library does one thing or another by the version of `peft`:"
    seen = [c for c in pins.data()["compared"] if c["so"] != "see above"]
    rows = [f"| {c['by']} | `{_cell(c['text'])}` | {_cell(c['so'])} |" for c in seen]
    yield "\n".join(["| library | its code | what follows here |", "| --- | --- | --- |", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
