"""Opening an adapter folder: the header at once and checked, the tensors when they are asked for, each into its own memory.

A folder without safetensors may have what `torch.save` writes: that is read as data, and nothing is unpickled (`zipped.py`). The
folder may be local or a repository of the hub; what is not there, not readable or damaged ends in a diagnostic that says what is
there instead.

Nothing is mapped: what happens to a file after a tensor was read has no effect on that, also if it is written in place or
cut short. Header and tensors are those of one file, though another may have its name meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.checkpoint.content import Content
from peftc.checkpoint.format import Entry, FormatError, Header, header_of
from peftc.checkpoint.keys import renamed
from peftc.checkpoint.names import PICKLE_NAME, WEIGHTS_NAME
from peftc.checkpoint.zipped import zipped_header_of
from peftc.config.hub import fetch, is_repository
from peftc.diagnostics import Diagnostic, PeftcError, Where, did_you_mean
from peftc.graph.tensors import TensorFacts

if TYPE_CHECKING:
    from torch import Tensor

#: Endings of files that `torch.save` wrote.
PICKLED = frozenset({".bin", ".pt", ".pth"})

#: Dtypes that numpy has as well; the bytes of others are read as such.
_OF_NUMPY = frozenset(
    ("bool", "uint8", "int8", "int16", "float16", "int32", "float32", "complex64", "float64", "int64")
)


@dataclass(frozen=True)
class AdapterFile:
    """The weights of one adapter: an open file whose header was read and checked, and whose tensors are still on the disk."""

    path: Path
    header: Header
    content: Content

    @classmethod
    def of(cls, path: Path, read: Callable[[FileIO], Header] = header_of) -> AdapterFile:
        """Open a file; `read` knows its format. Raises `FormatError` for one that is damaged, and `OSError`."""
        content = Content(path)
        return cls(path, read(content.file), content)

    @cached_property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Shape and dtype by key, in file order."""
        return {key: entry.facts for key, entry in self.header.entries.items()}

    @property
    def folder(self) -> Path:
        return self.path.parent

    def mapped(self, key_mapping: Mapping[str, str]) -> AdapterFile:
        """The same file with its tensors under other keys (`peftc.checkpoint.keys.renamed`)."""
        entries = self.header.entries
        found = {name: entries[key] for name, key in renamed(entries, key_mapping).items()}
        return AdapterFile(self.path, Header(found, self.header.metadata), self.content)

    def tensor(self, key: str) -> Tensor:
        """One tensor, read now, on the CPU and in memory of its own. Raises `KeyError`, and `PeftcError` if the file cannot be
        read or is shorter now than its header says.
        """
        import torch

        facts, start = self.header.entries[key].facts, self.header.entries[key].start
        dtype = getattr(torch, facts.dtype)
        # memory of torch, not of Python: products of tensors that start elsewhere are rounded otherwise, and an adapter must
        # give the same output after loading, bit for bit
        tensor = torch.empty(facts.shape, dtype=dtype)
        if facts.numel:
            known = tensor if facts.dtype in _OF_NUMPY else tensor.view(-1).view(torch.uint8)
            self._read(known.numpy().data, start)
        return tensor

    def fill(self, key: str, buffer: memoryview, at: int = 0) -> None:
        """Read into a buffer what begins `at` a byte of a tensor; from any thread. Raises as `tensor` does."""
        self._read(buffer, self.header.entries[key].start + at)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and bytes."""
        a, b = self.header.entries[one], self.header.entries[other]
        return a.facts == b.facts and self._bytes(a) == self._bytes(b)

    def _bytes(self, entry: Entry) -> bytearray:
        buffer = bytearray(entry.facts.nbytes)
        self._read(memoryview(buffer), entry.start)
        return buffer

    def _read(self, buffer: memoryview, start: int) -> None:
        try:
            self.content.read_into(buffer, start)
        except FormatError as error:
            raise PeftcError(_damaged(self.path, error)) from None
        except OSError as error:
            raise PeftcError(_unreadable(self.path, error)) from error

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, in file order."""
        for key in self.tensors:
            yield key, self.tensor(key)


def open_adapter(folder: str | Path, subfolder: str | None = None, **hub_options: Any) -> AdapterFile:
    """Open the adapter in a local folder or a repository of the hub, reading the header alone.

    `subfolder` is below it. `hub_options` (`revision`, `token`, `cache_dir`, `local_files_only`, `force_download`) go to the
    hub's client; others are ignored. Raises `PeftcError`: nothing there, a pickle of more than tensors, damaged, not readable,
    hub not reachable.
    """
    return open_weights(_weights_path(str(folder), subfolder, hub_options))


def open_weights(path: Path) -> AdapterFile:
    """Open a file of weights, reading the header alone: safetensors, or by its name what `torch.save` writes.

    Raises `PeftcError`: a pickle of more than tensors, damaged, not there or not readable.
    """
    pickled = path.suffix in PICKLED
    try:
        return AdapterFile.of(path, zipped_header_of if pickled else header_of)
    except FormatError as error:
        raise PeftcError(_pickled(path, error) if pickled else _damaged(path, error)) from None
    except FileNotFoundError:
        raise PeftcError(_missing(path)) from None
    except OSError as error:
        raise PeftcError(_unreadable(path, error)) from error


def load_adapter_tensors(folder: str | Path, subfolder: str | None = None, **hub_options: Any) -> dict[str, Tensor]:
    """All tensors of an adapter by their key in the file; see `open_adapter`."""
    return dict(open_adapter(folder, subfolder, **hub_options).items())


def _weights_path(source: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> Path:
    local = Path(source, subfolder) if subfolder else Path(source)
    try:
        for name in (WEIGHTS_NAME, PICKLE_NAME):
            if (local / name).is_file():
                return local / name
        if Path(source).is_dir() or not is_repository(source):
            raise PeftcError(_missing(local))
    except PeftcError:  # may be an `OSError` itself
        raise
    except OSError as error:
        raise PeftcError(_unreadable(local, error)) from error
    try:
        return fetch(source, WEIGHTS_NAME, subfolder, hub_options)
    except PeftcError:
        with suppress(PeftcError):
            return fetch(source, PICKLE_NAME, subfolder, hub_options)
        raise


def _missing(folder: Path) -> Diagnostic:
    where = Where(file=str(folder))
    if folder.is_file():
        fix = f"Give the folder `{folder.parent}`."
        return rules.CHECKPOINT_MISSING(f"`{folder}` is a file; an adapter is a folder", fix=fix, where=where)
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        fix = did_you_mean(folder.name, siblings) or "Check the path; a repository of the hub is `owner/name`."
        return rules.CHECKPOINT_MISSING(f"There is no folder `{folder}`", fix=fix, where=where)
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    there = ", ".join(f"`{name}`" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    inside = [p.parent.name for p in sorted(folder.glob(f"*/{WEIGHTS_NAME}"))]
    if inside:
        fix = f"There are adapters in its subfolders: {', '.join(f'`{folder / name}`' for name in inside)}."
    else:
        fix = did_you_mean(WEIGHTS_NAME, names) or "Give the folder that `save_pretrained` wrote."
    what = f"`{folder}` has no `{WEIGHTS_NAME}`; it has {there or 'nothing'}"
    return rules.CHECKPOINT_MISSING(what, fix=fix, where=where)


def _damaged(path: Path, error: FormatError) -> Diagnostic:
    fix = "Copy or download the file again, or go back to an earlier checkpoint."
    return rules.CHECKPOINT_DAMAGED(f"`{path}`: {error}", fix=fix, where=Where(file=str(path)))


def _pickled(path: Path, error: FormatError) -> Diagnostic:
    fix = f"Convert it, which runs none of its code: `peftc convert {path.parent} --to safetensors`."
    return rules.CHECKPOINT_PICKLED(f"`{path}` is not read as it is: {error}", fix=fix, where=Where(file=str(path)))


def _unreadable(path: Path, error: OSError) -> Diagnostic:
    reason = error.strerror or str(error)
    fix = "Have the permissions of the file and its folders changed, or copy it to where you may read it."
    return rules.CHECKPOINT_UNREADABLE(f"`{path}`: {reason}", fix=fix, where=Where(file=str(path)), also=type(error))
