"""Writing an adapter folder: the weights, the config, and the plan that made them, all at once or not at all.

The layout is the ecosystem's (`adapter_model.safetensors`, `adapter_config.json`); `peftc_plan.json` lies beside them and
others ignore it. Tensors are written one at a time, so nothing is copied that is already in main memory.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peftc import rules
from peftc._version import FILE_VERSION
from peftc.checkpoint.atomic import Part, replace_folders
from peftc.checkpoint.format import write_file
from peftc.checkpoint.names import BASE_NAME, PICKLE_NAME, PLAN_NAME, START_NAME, WEIGHTS_NAME
from peftc.checkpoint.values import content_problems
from peftc.compiler.plan.plan import InjectionPlan
from peftc.compiler.plan.serial import plan_to_text
from peftc.config.base import CONFIG_NAME, PeftConfig
from peftc.config.files import config_text
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Where, warn
from peftc.graph.base_ref import lasting
from peftc.graph.tensors import TensorFacts

if TYPE_CHECKING:
    from torch import Tensor


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: PeftConfig,
    plan: InjectionPlan | None = None,
    extra: Mapping[str, str] | None = None,
    base: str | None = None,
    *,
    pickled: bool = False,
) -> None:
    """Save an adapter into a folder, which is made if needed; other files in it stay.

    `tensors` are by checkpoint key, on any device, contiguous or not, shared or not. `plan` is what it was
    made by; a plan that an earlier save left is removed if there is none now. `extra` are further text files by name, e.g. a model card,
    `base` the print of the base model (`peftc.model.parts.identity`). The config is written as frozen (`inference_mode`), with a base
    model in a local folder named so that it is found from any other, and is itself not changed. With `pickled` the weights are
    in the format of `torch.save` (`adapter_model.bin`), and the safetensors file of an earlier save is
    removed, which readers would prefer.

    Raises `PeftcError` for tensors without content and for a folder that cannot be written (no room, no permission), and
    then leaves the folder as it was. Warns of NaN and infinity.
    """
    save_adapters(folder, {"": Saved(tensors, config, plan, base, pickled)}, extra)


@dataclass(frozen=True)
class Saved:
    """One adapter as it is saved: see `save_adapter`."""

    tensors: Mapping[str, Tensor]
    config: PeftConfig
    plan: InjectionPlan | None = None
    base: str | None = None
    pickled: bool = False
    #: what its start's change of the base weights follows from
    start: Mapping[str, Tensor] = field(default_factory=dict)
    texts: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.texts[CONFIG_NAME] = config_text(stored(self.config))
        if self.plan is not None:
            self.texts[PLAN_NAME] = plan_to_text(self.plan)
        if self.base is not None:
            self.texts[BASE_NAME] = self.base

    def problems(self) -> Iterator[Diagnostic]:
        """What is wrong with the tensors."""
        planned = () if self.plan is None else self.plan.parameters()
        yield from content_problems(self.tensors, {p.disk for p in planned if p.disk is not None and p.numel == 0})

    def write(self, staged: Path) -> None:
        """Write the files into an empty folder."""
        if self.pickled:
            write_pickle(staged / PICKLE_NAME, self.tensors)
        else:
            write_tensors(staged / WEIGHTS_NAME, self.tensors)
        if self.start:
            write_tensors(staged / START_NAME, self.start)
        _write_texts(staged, self.texts)

    @property
    def obsolete(self) -> tuple[str, ...]:
        """Files of an earlier save that go unless they are made anew."""
        own = (PLAN_NAME, BASE_NAME, START_NAME)
        return (*own, WEIGHTS_NAME) if self.pickled else own


def save_adapters(folder: str | Path, adapters: Mapping[str, Saved], extra: Mapping[str, str] | None = None) -> None:
    """Save adapters into a folder and folders below it, by their paths from there (`""` is the folder itself), all at once
    where the file system can exchange folders, otherwise one after the other, each all or nothing. `extra` goes into `folder`.

    Raises `PeftcError` as `save_adapter` does, with every problem, and then leaves all of them as they were, or each.
    """
    folder = Path(folder)
    problems = Collector()
    for adapter in adapters.values():
        problems.add(*adapter.problems())
    problems.raise_errors()

    def write(staged: Path) -> None:
        if "" in adapters:
            adapters[""].write(staged)
        _write_texts(staged, extra or {})

    parts = {"": Part(write, adapters[""].obsolete if "" in adapters else ())} if "" in adapters or extra else {}
    parts |= {path: Part(adapter.write, adapter.obsolete) for path, adapter in adapters.items() if path}
    for place in (folder / path for path in parts):
        if place.exists() and not place.is_dir():
            what = f"`{place}` is a file, not a folder"
            raise PeftcError(rules.SAVE_FAILED(what, fix="Save to another path.", where=Where(file=str(place))))
    try:
        replace_folders(folder, parts, commit=CONFIG_NAME)
    except OSError as error:
        raise PeftcError(not_written(folder, error)) from error
    warn(problems.warnings)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def stored(config: PeftConfig) -> PeftConfig:
    """The config as it is written: frozen, with this version named, and a local base by its absolute path."""
    base = None if config.base_model_name_or_path is None else lasting(config.base_model_name_or_path)
    named = {"base_model_name_or_path": base, "peft_version": FILE_VERSION}
    return config.model_copy(update={"inference_mode": True, **named})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as others expect it. Raises `OSError`, and `ValueError` for a dtype that it cannot hold."""
    facts = {key: TensorFacts.of(tensor) for key, tensor in tensors.items()}
    write_file(path, facts, lambda key: _content(tensors[key]), {"format": "pt"})


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what `torch.load` reads, each tensor with a storage of its own. Raises `OSError`."""
    import torch

    content = io.BytesIO()  # torch's own errors of files are not the system's
    torch.save({key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}, content)
    path.write_bytes(content.getbuffer())


def _content(tensor: Tensor) -> Iterator[memoryview]:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    yield flat.view(torch.uint8).numpy().data


def not_written(folder: Path, error: OSError, what: str = "adapter") -> Diagnostic:
    """The diagnostic for a folder that the system refused to write, with what to do about the reason."""
    fixes = {
        errno.ENOSPC: "Free some space on that disk, or save to another one.",
        errno.EDQUOT: "Your quota on that disk is used up: free some space, or save to another disk.",
        errno.EFBIG: "The process may not write files this large: raise the limit (`ulimit -f`).",
        errno.EACCES: "Save to a folder that you may write to, or have its permissions changed.",
        errno.EPERM: "Save to a folder that you may write to, or have its permissions changed.",
        errno.EROFS: "That disk is mounted read-only: save to another one.",
        errno.ENOTDIR: "A part of the path is a file: save to another path.",
        errno.ENAMETOOLONG: "Save to a shorter path.",
    }
    fix = fixes.get(error.errno or 0, "Look into what the system says, or save to another place.")
    reason = error.strerror or str(error)
    return rules.SAVE_FAILED(
        f"The {what} could not be saved to `{folder}`: {reason}", fix=fix, where=Where(file=str(folder))
    )
