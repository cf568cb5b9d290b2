"""One side of the sweep, in a process of its own: what a library trains on each model, as JSON lines.

`python -m benchmarks.sweep.side LIBRARY OUT [GIVEN]` reads model types from standard input, one a line. `GIVEN` is the file
of the other side: where this one refuses a default, it is asked again with the targets that the other found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import library
from benchmarks.row import OURS
from benchmarks.sweep.models import NotBuilt, small_model

#: A pattern as recipes for language models have it.
PROJECTIONS = r".*\.(q|k|v|o|gate|up|down)_proj"

#: What models are adapted with: label -> config class and options.
TARGETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "all-linear": ("LoraConfig", {"target_modules": "all-linear"}),
    "default": ("LoraConfig", {}),
    "names": ("LoraConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "pattern": ("LoraConfig", {"target_modules": PROJECTIONS}),
    "one layer": ("LoraConfig", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "IA3 default": ("IA3Config", {}),
}
#: Those that name no target.
DEFAULTS = tuple(label for label, (_, options) in TARGETS.items() if not options)
#: Options that defaults resolve to.
RESOLVED = ("target_modules", "feedforward_modules")

#: What came of one label: `trained` by name, or `refused` with the message.
Outcome = dict[str, Any]


def rows(name: str, types: Iterator[str], given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each type: `built` is the class or None, `error` what transformers says, `outcomes` are by label.

    `noted` are convolutions and modules that only look like a kind of layer, by path; only our graphs know them.
    """
    lib = library(name)
    for model_type in types:
        begun = time.perf_counter()
        row: dict[str, Any] = {"type": model_type, "built": None, "outcomes": {}}
        try:
            model = small_model(model_type)
        except NotBuilt as error:
            row["error"] = str(error)
            model = None
        if model is not None:
            row["built"] = type(model).__name__
            row["noted"] = _noted(model) if name == OURS else {}
            for label in TARGETS:
                outcome, model = _asked(lib, model, label, model_type)
                resolved = given.get(model_type, {}).get("outcomes", {}).get(label, {}).get("resolved")
                if "refused" in outcome and resolved and model is not None:
                    outcome["given"], model = _asked(lib, model, label, model_type, resolved)
                row["outcomes"][label] = outcome
                if model is None:
                    break
        yield {**row, "seconds": round(time.perf_counter() - begun, 2)}


def _asked(
    lib: Any, model: Any, label: str, model_type: str, resolved: Mapping[str, Any] | None = None
) -> tuple[Outcome, Any]:
    """What is trained with these targets, and the model as it was; a new one if it could not be restored."""
    config, options = TARGETS[label]
    try:
        adapted = lib.get_peft_model(model, getattr(lib, config)(**{**options, **(resolved or {})}))
        outcome: Outcome = {
            "trained": {name: list(p.shape) for name, p in adapted.named_parameters() if p.requires_grad}
        }
        if label in DEFAULTS:
            outcome["resolved"] = _resolved(adapted.peft_config["default"])
            outcome["by_role"] = lib.__name__ == OURS and bool(adapted.session.plans["default"].notes)
        return outcome, adapted.unload()
    except Exception as error:  # whatever a library raises is its answer
        said = {"refused": f"{type(error).__name__}: {error}"[:400]}
        return said, small_model(model_type)


def _noted(model: Any) -> dict[str, str]:
    from peftc.graph.nodes import CONV_KINDS
    from peftc.runtime.applying.snapshot import snapshot

    nodes = snapshot(model).nodes
    kinds = {node.path: node.facts.kind.value for node in nodes if node.facts.kind in CONV_KINDS}
    return kinds | {node.path: node.facts.note for node in nodes if node.facts.note}


def _resolved(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in RESOLVED}
    return {name: sorted(v) if isinstance(v, set) else v for name, v in found.items() if v is not None}


def main(name: str, out: str, given: str = "") -> None:
    """Write the rows."""
    import transformers

    transformers.logging.set_verbosity_error()
    other = read(Path(given)) if given else {}
    with open(out, "w", encoding="utf-8") as file:
        for row in rows(name, (line.strip() for line in sys.stdin), other):
            file.write(json.dumps(row) + "\n")
            file.flush()


def read(path: Path) -> dict[str, Any]:
    """Rows of a file by model type."""
    found = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["type"]: row for row in found}


if __name__ == "__main__":
    main(*sys.argv[1:])
