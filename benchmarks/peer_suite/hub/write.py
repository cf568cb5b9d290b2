"""Writes the stand-in into a folder, once for each state of these files and of the libraries that make the models."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from benchmarks.peer_suite.hub.repos import REPOS, home, snapshot

DATASETS = "datasets"
_MAKERS = ("transformers", "diffusers", "tokenizers", "torch")


def hub_in(folder: Path) -> Path:
    """The stand-in below `folder`, written if it is not there yet; those of other states are removed."""
    hub = folder / f"hub-{_state()}"
    if not hub.is_dir():
        for old in folder.glob("hub-*"):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            staged = Path(scratch, "hub")
            _write(staged)
            staged.rename(hub)
    return hub


def _state() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts = [*(file.read_text(encoding="utf-8") for file in sources), *map(metadata.version, _MAKERS)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _write(hub: Path) -> None:
    import transformers

    from benchmarks.peer_suite.hub import adapters, datasets, models, pipelines

    _ = adapters, models, pipelines  # importing them fills the table
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for (name, revision), build in REPOS.items():
        folder = snapshot(hub, name, revision)
        folder.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries think of such small models
            build(folder, hub)
        refs = home(hub, name) / "refs"
        refs.mkdir(exist_ok=True)
        (refs / revision).write_text(folder.name, encoding="utf-8")
    datasets.write(hub / DATASETS)
