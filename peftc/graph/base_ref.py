"""Which base model is meant: a name for it, without looking for it. A spec's `base` section becomes a `BaseRef`.

Exactly one of the sources is given; `peftc.graph.locate` finds its files, and the transformers integration builds or loads
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a folder has if it holds a model.
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class BaseRef:
    """A base model and how it is wanted.

    Sources, one of: `model`, a hub id; `path`, a folder that transformers saved; `gguf`, a GGUF file; `distribution` and
    `file`, a GGUF file inside an installed Python distribution (`file` as a path below the distribution's root, or its
    name alone); `config`, a transformers config alone, as plain data or the path of a JSON file, which gives a randomly
    initialised model.

    `dtype` is a name such as `"bfloat16"`; None is the config's, or float32 where it says nothing. `task_type` is one of
    `peftc.config.types.TaskType` and decides the model class; None is the class that the config names. `quantization` says how
    the weights are packed while they are loaded, as transformers' `quantization_config`; None is as they are in the files.
    """

    model: str | None = None
    path: str | None = None
    gguf: str | None = None
    distribution: str | None = None
    file: str | None = None
    config: Mapping[str, Any] | str | None = None
    revision: str | None = None
    task_type: str | None = None
    dtype: str | None = None
    quantization: Mapping[str, Any] | None = None

    @property
    def name(self) -> str | None:
        """What the base is called in files that are saved. For a distribution it is portable and names no local path:
        `distribution:NAME/FILE`, which a spec's `base` and `--base` understand again."""
        if self.distribution is not None:
            return f"distribution:{self.distribution}/{self.file}"
        source = self.model or self.path or self.gguf
        return source if source is not None else self.config if isinstance(self.config, str) else None

    @property
    def lasting_name(self) -> str | None:
        """The same, with a path that is found from any folder: what an adapter calls its base."""
        local = self.path or self.gguf or (self.config if isinstance(self.config, str) else None)
        return self.name if local is None else str(Path(local).expanduser().resolve())


def lasting(name: str) -> str:
    """A base model's name, as an absolute path where it is that of a local folder or file: `../llama` means another one from
    another folder. What is not here under that name, such as a model of the hub, keeps it."""
    path = Path(name)
    local = (path / CONFIG_FILE).is_file() or (path.suffix == ".gguf" and path.is_file())
    return str(path.resolve()) if local else name
