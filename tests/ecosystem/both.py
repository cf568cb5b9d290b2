"""Runs one script twice, in fresh processes at once: with the real `peft`, and with peftc under that name.

A script gets a folder of its own to work in. What it leaves there is what is compared: results by value, files by kind.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
LIMIT = 300.0  # seconds; far more than any script needs
TOLERANCE = 1e-6

#: transformers may ask for a later release than the reference has: what is compared is what they do, not that check
REAL = """
from importlib.metadata import version
import transformers.integrations.peft as asking
asking.MIN_PEFT_VERSION = version("peft")
"""
ALIAS = "import peftc.compat; peftc.compat.install()\n"
RUN = """
import runpy, sys
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
import peft
print(peft.PeftModel.__module__.split(".")[0])
"""

#: Values that say when, where or by whom, not what.
ASIDE = frozenset({"peft_version", "transformers_version", "__version__"})
#: Measured times; `train_loss` and the like stay.
TIMES = ("_runtime", "_per_second", "time", "step_time")
#: Pickles of the training state: that they are there is all that is compared.
OPAQUE = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Both:
    """The two folders."""

    real: Path
    alias: Path

    def results(self, name: str = "results.json") -> tuple[Any, Any]:
        """What the scripts found, by the real library and by ours."""
        real, alias = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (self.real, self.alias))
        return real, alias


def run_both(script: str, folder: Path, *arguments: str) -> Both:
    """Both runs, side by side. Raises `AssertionError` with the end of its output if one fails."""
    both = Both(folder / "real", folder / "alias")
    runs = [
        (start(both.real, REAL + RUN, script, arguments), "peft"),
        (start(both.alias, ALIAS + RUN, script, arguments), "peftc"),
    ]
    try:
        for run, library in runs:
            out, err = run.communicate(timeout=LIMIT)
            assert run.returncode == 0, f"{script} with {library}:\n{err[-6000:]}"
            assert out.rsplit(maxsplit=1)[-1] == library, f"{script} ran with {out[-100:]}, not with {library}"
    finally:
        for run, _ in runs:
            run.kill()
            run.wait()
    return both


def start(folder: Path, code: str, script: str, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
    """The script in a process of its own, without a network."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", code, str(SCRIPTS / script), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def environment() -> dict[str, str]:
    """What a script finds in its environment: one thread, no network, and our modules."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}
    path = [
        *filter(None, [os.environ.get("PYTHONPATH")]),
        ROOT,
        SCRIPTS,
    ]  # what is in front stays there: another release
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}


# comparing ------------------------------------------------------------------------------------------------------------


def differences(real: Any, alias: Any, at: str = "", tolerance: float = TOLERANCE) -> Iterator[str]:
    """Where two pieces of plain data differ; numbers up to the tolerance, relative to those above 1."""
    if isinstance(real, dict) and isinstance(alias, dict):
        for key in sorted({*real, *alias}, key=str):
            if str(key).rpartition(".")[2] in ASIDE or str(key).endswith(TIMES):
                continue
            if key not in alias or key not in real:
                yield f"{at}.{key}: only with {'the real one' if key in real else 'the alias'}"
            else:
                yield from differences(real[key], alias[key], f"{at}.{key}", tolerance)
    elif isinstance(real, list) and isinstance(alias, list) and len(real) == len(alias):
        for i, (one, other) in enumerate(zip(real, alias, strict=True)):
            yield from differences(one, other, f"{at}[{i}]", tolerance)
    elif isinstance(real, float) and isinstance(alias, float):
        near = math.isclose(real, alias, rel_tol=tolerance, abs_tol=tolerance)
        if not near and not (math.isnan(real) and math.isnan(alias)):
            yield f"{at}: {real!r}, with the alias {alias!r}"
    elif real != alias:
        yield f"{at}: {real!r}, with the alias {alias!r}"


def file_differences(both: Both, below: str = "", tolerance: float = TOLERANCE) -> Iterator[str]:
    """Where the files differ, apart from `peftc_plan.json`, which must be beside each of our adapters."""
    real, alias = files(both.real / below), files(both.alias / below)
    for name in sorted(real | alias):
        if name not in alias or name not in real:
            yield f"{name}: only with {'the real one' if name in real else 'the alias'}"
        else:
            one, other = (content(folder / below / name) for folder in (both.real, both.alias))
            yield from differences(one, other, name, tolerance)


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("peftc_plan.json", "peftc_base.json")
    }


def content(path: Path) -> Any:
    """A file as plain data."""
    if path.suffix == ".json":
        return _unordered(path.name, json.loads(path.read_text(encoding="utf-8")))
    if path.name == "README.md":
        return card(path)
    if path.suffix == ".safetensors":
        return tensors(path)
    return path.suffix if path.suffix in OPAQUE else path.read_bytes().decode("utf-8", "replace")


def card(path: Path) -> dict[str, Any]:
    """The front matter. The reference names a local folder, or nothing, as the base model; our cards leave that out."""
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
    base, tags = data.get("base_model") or "", set(data.get("tags", ()))
    if not base or Path(base).is_dir():
        data.pop("base_model", None)
        tags.discard(f"base_model:adapter:{base}")
    return {**data, "tags": sorted(tags)}


def tensors(path: Path) -> dict[str, Any]:
    """Header and values of a safetensors file."""
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = {key: _json(value) for key, value in (file.metadata() or {}).items()}
    values = {k: [str(t.dtype), list(t.shape), t.double().flatten().tolist()] for k, t in found.items()}
    return {"metadata": metadata, "tensors": values}


def _json(text: str) -> Any:
    try:
        return _unordered("adapter_config.json", json.loads(text))
    except json.JSONDecodeError:
        return text


def _unordered(name: str, data: Any) -> Any:
    """The reference writes sets in any order, and a local base by the path that was typed, ours by its absolute path."""
    if name != "adapter_config.json" or not isinstance(data, dict):
        return data
    if data.get("base_model_name_or_path"):
        data = {**data, "base_model_name_or_path": Path(data["base_model_name_or_path"]).name}
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in data.items()
    }
