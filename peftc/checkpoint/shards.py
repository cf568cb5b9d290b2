"""The weights of a whole model in a folder, in one file of safetensors or in several with an index: headers at once, tensors when
they are asked for.

Nothing of the model is known here but the names of its tensors. Needs no torch until a tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from peftc import rules
from peftc.checkpoint.load import AdapterFile, open_weights
from peftc.config.json_text import parse_json
from peftc.config.reader import read_text
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.graph.tensors import TensorFacts
from peftc.limits import MAX_JSON

if TYPE_CHECKING:
    from torch import Tensor

#: What transformers calls one file, and the index of several.
ONE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
#: Bytes that are compared at a time.
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Shards:
    """Files by name, each open; `index` is what the index says, None where there is one file."""

    folder: Path
    files: Mapping[str, AdapterFile]
    index: Mapping[str, object] | None

    @cached_property
    def home(self) -> Mapping[str, str]:
        """Tensor -> the file that has it."""
        return {key: name for name, file in self.files.items() for key in file.tensors}

    @cached_property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Shape and dtype by name."""
        return {key: facts for file in self.files.values() for key, facts in file.tensors.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, read now, in memory of its own. Raises `KeyError`, and `PeftcError` if it cannot be read."""
        return self.files[self.home[key]].tensor(key)

    def fill(self, key: str, buffer: memoryview, at: int = 0) -> None:
        """Read into a buffer what begins `at` a byte of a tensor; from any thread. Raises as `tensor` does."""
        self.files[self.home[key]].fill(key, buffer, at)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes; a block of each is read at a time."""
        if self.tensors[one] != self.tensors[other]:
            return False
        return all(a == b for a, b in zip(self._blocks(one), self._blocks(other), strict=True))

    def _blocks(self, key: str) -> Iterator[bytes]:
        file = self.files[self.home[key]]
        left, start = self.tensors[key].nbytes, file.header.entries[key].start
        while left:
            block = bytearray(min(left, _BLOCK))
            file.content.read_into(memoryview(block), start)
            yield bytes(block)
            left, start = left - len(block), start + len(block)


def open_shards(folder: Path) -> Shards | None:
    """The weights in a folder; None if it has none in safetensors under the names that transformers looks for.

    Raises `PeftcError`: an index of another form, a file that is missing, damaged or not readable.
    """
    if (folder / ONE_NAME).is_file():
        return Shards(folder, {ONE_NAME: open_weights(folder / ONE_NAME)}, None)
    if not (folder / INDEX_NAME).is_file():
        return None
    path = folder / INDEX_NAME
    index = parse_json(read_text(str(path), MAX_JSON), str(path)).data
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) and _is_plain(name) for name in named.values()):
        raise PeftcError(_damaged(path, "it has no `weight_map` of names of files"))
    files = {name: open_weights(folder / name) for name in sorted(set(named.values()))}
    lost = next((key for key, name in named.items() if key not in files[name].tensors), None)
    if lost is not None:
        raise PeftcError(_damaged(path, f"`{lost}` is not in `{named[lost]}`"))
    seen: dict[str, str] = {}
    for name, file in files.items():
        twice = next((key for key in file.tensors if key in seen), None)
        if twice is not None:
            raise PeftcError(_damaged(path, f"`{twice}` is in `{seen[twice]}` and in `{name}`"))
        seen |= dict.fromkeys(file.tensors, name)
    return Shards(folder, files, index)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name.endswith(".safetensors")


def _damaged(path: Path, why: str) -> Diagnostic:
    fix = "Copy or download the folder again."
    return rules.CHECKPOINT_DAMAGED(f"`{path}`: {why}", fix=fix, where=Where(file=str(path)))
