"""Merging an adapter into a base in a folder without building the model: tensors that it changes are read, folded and written one
layer at a time, all others are copied as bytes.

Importing this file is free: torch comes in while the copying runs.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.checkpoint.atomic import replace_files
from peftc.checkpoint.patched import patching
from peftc.checkpoint.save import not_written
from peftc.checkpoint.shards import INDEX_NAME
from peftc.compiler.plan.render import size
from peftc.diagnostics import PeftcError, Where
from peftc.graph.base_ref import CONFIG_FILE, BaseRef
from peftc.graph.locate import locate
from peftc.integrations.transformers.patchable import Job

if TYPE_CHECKING:
    from peftc.integrations.transformers.folding import Merged

#: Endings of files that hold weights, in whatever form, and names of others that do not go with a merged model.
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"})
_LEFT_OUT = frozenset({"README.md", INDEX_NAME, "pytorch_model.bin.index.json"})
#: What comes along is small: a tokenizer of the largest vocabulary has some tens of megabytes.
_MOST_BESIDE = 1 << 28


def merge(job: Job, folder: Path, told: Callable[[int], None], any_base: bool = False) -> Merged:
    """Write the merged model to `folder`, which is new or empty: whole or not at all.

    `told` hears how many bytes of the weights are done. Raises `PeftcError`: the adapter cannot be merged, comes to NaN, is of
    another base (unless `any_base`), would part tied embeddings, no room; and `NeedsModel`, with nothing written.
    """
    _require_room(job, folder)
    made: list[Merged] = []

    def write(stage: Path) -> None:
        made.clear()
        with patching({stage / name: patch for name, patch in job.patches.items()}, told) as out:
            with _not_collecting():  # here: torch comes in while the copying runs
                from peftc.integrations.transformers.folding import Folding

            folding = Folding(job, out, any_base)
            made.append(folding.run())
        _write_beside(job, stage, folding.parted)

    try:
        replace_files(folder, write, commit=CONFIG_FILE)
    except PeftcError:  # may be an `OSError` itself
        raise
    except OSError as error:
        raise PeftcError(not_written(folder, error, "model")) from error
    return made[-1]


@contextmanager
def _not_collecting() -> Iterator[None]:
    """Without the garbage collector, which takes an eighth of the time that torch needs to come in, and finds nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _require_room(job: Job, folder: Path) -> None:
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free, beside = shutil.disk_usage(place).free, sum(file.stat().st_size for file in _beside(job.shards.folder))
    if free < job.nbytes + beside:
        what = f"The merged model takes {size(job.nbytes + beside)}, and `{place}` has room for {size(free)}"
        fix = "Free some space on that disk, or save to another one."
        raise PeftcError(rules.SAVE_FAILED(what, fix=fix, where=Where(file=str(folder))))


def _beside(folder: Path) -> Iterator[Path]:
    """Files that come along: the tokenizer, configs, templates, a licence."""
    for file in sorted(folder.iterdir()):
        is_ours = file.name.startswith((".", "adapter_", "peftc_")) or file.name in _LEFT_OUT
        if not is_ours and file.suffix not in _WEIGHTS and file.is_file() and file.stat().st_size <= _MOST_BESIDE:
            yield file


def _write_beside(job: Job, stage: Path, parted: bool) -> None:
    for file in _beside(job.shards.folder):
        shutil.copyfile(file, stage / file.name)
    changes: dict[str, Any] = {"tie_word_embeddings": False} if parted or job.untie else {}
    if job.dtype is not None:
        changes["dtype"] = job.dtype
    if changes:
        config = {**(locate(BaseRef(path=str(job.shards.folder))).config or {}), **changes}
        if "dtype" in changes:
            config.pop("torch_dtype", None)
        (stage / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if job.shards.index is not None:
        homes = {key: name for name, patch in job.patches.items() for key in (*patch.source.tensors, *patch.places)}
        said = job.shards.index.get("metadata")
        facts = {**job.shards.tensors, **job.given}
        about = {**(said if isinstance(said, dict) else {}), "total_size": sum(one.nbytes for one in facts.values())}
        index = {**job.shards.index, "metadata": about, "weight_map": dict(sorted(homes.items()))}
        (stage / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
