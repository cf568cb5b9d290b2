"""Adapters that were saved as a pickle, as old releases of other libraries did: read without running their code, written anew."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.checkpoint.atomic import replace_files
from peftc.checkpoint.names import PICKLE_NAME, WEIGHTS_NAME
from peftc.checkpoint.save import not_written, write_tensors
from peftc.checkpoint.values import content_problems
from peftc.config.base import CONFIG_NAME
from peftc.config.hub import CARD
from peftc.diagnostics import Collector, PeftcError, Where, warn
from peftc.registry.boundary import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

#: What `torch.load` raises for files that are none, are cut short, or hold what it does not build from a file.
_REFUSED = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)


def read_pickle(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's `adapter_model.bin`, by key, on the CPU. No code in the file is run.

    Raises `PeftcError`: no such file, not readable, or anything in it but tensors by name.
    """
    import torch

    file = folder / PICKLE_NAME
    where = Where(file=str(file))
    try:
        held: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except FileNotFoundError:
        what = f"`{folder}` has no `{PICKLE_NAME}`"
        raise PeftcError(rules.CHECKPOINT_MISSING(what, fix="Check the folder.", where=where)) from None
    except OSError as error:
        fix = "Have its permissions changed, or copy it to where you may read it."
        what = f"`{file}`: {error.strerror or error}"
        raise PeftcError(rules.CHECKPOINT_UNREADABLE(what, fix=fix, where=where)) from error
    except _REFUSED as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeftcError(rules.PICKLE_CONTENT(f"`{file}` cannot be read: {reason}", fix=_FIX, where=where)) from None
    if not isinstance(held, dict):
        what = f"`{file}` holds a {type(held).__name__}, not tensors by name"
        raise PeftcError(rules.PICKLE_CONTENT(what, fix=_FIX, where=where))
    strange = {name: type(value).__name__ for name, value in held.items() if not _is_plain(name, value)}
    if strange:
        told = ", ".join(f"`{name}` is a {kind}" for name, kind in list(strange.items())[:5])
        what = f"`{file}` holds more than tensors by name: {told}"
        raise PeftcError(rules.PICKLE_CONTENT(what, fix=_FIX, where=where))
    return held


_FIX = "Get the adapter as safetensors from whoever made it, or a whole copy of the file."


def _is_plain(name: Any, value: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided


def pickle_to_safetensors(folder: Path, out: Path | None = None) -> dict[str, Tensor]:
    """Write a folder's `adapter_model.bin` as `adapter_model.safetensors` and return its tensors, same keys and values.

    It is put beside the pickle, which stays, or with config and card into the folder `out`. Raises `PeftcError`, with
    nothing written.
    """
    if out is None and (folder / WEIGHTS_NAME).exists():
        what = f"`{folder}` has a `{WEIGHTS_NAME}` already"
        fix = "Name another folder for the result."
        raise PeftcError(rules.FOLDER_TAKEN(what, fix=fix, where=Where(file=str(folder))))
    tensors = read_pickle(folder)
    problems = Collector()
    problems.add(*content_problems(tensors))
    problems.raise_errors()
    beside = [] if out is None else [name for name in (CONFIG_NAME, CARD) if (folder / name).is_file()]

    def write(staged: Path) -> None:
        write_tensors(staged / WEIGHTS_NAME, tensors)
        for name in beside:
            shutil.copyfile(folder / name, staged / name)

    try:
        replace_files(out or folder, write, commit=WEIGHTS_NAME)
    except OSError as error:
        raise PeftcError(not_written(out or folder, error)) from error
    warn(problems.warnings)
    return tensors
