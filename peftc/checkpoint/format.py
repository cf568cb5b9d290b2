"""The safetensors file format: reading and checking a header, and writing a file one tensor at a time.

A file is an 8-byte little-endian length, a JSON header (`name -> dtype, shape, offsets`), then the bytes of the tensors
without gaps. Reading takes the header alone and needs no torch; every way a header can lie ends in a `FormatError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from peftc.graph.tensors import TensorFacts
from peftc.limits import MAX_HEADER, MAX_TENSORS, misshapen

#: Name in the file -> torch's name and bytes per element, in the order that files are sorted by (widest last).
DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
_BY_TORCH_NAME = {torch_name: code for code, (torch_name, _) in DTYPES.items()}
#: Torch's names of all dtypes that a file can hold.
STORABLE = tuple(_BY_TORCH_NAME)
_RANK = {code: rank for rank, code in enumerate(DTYPES)}


class FormatError(ValueError):
    """The file is not a whole, consistent safetensors file; the message says in what way."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: what it is and the position of its first byte in the file."""

    facts: TensorFacts
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors by name, in file order, and the free-form strings that the writer left."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def header_of(file: FileIO) -> Header:
    """The header of an open file, which is at its beginning, fully checked against the file's size.

    Raises `FormatError` for a file that is cut short, damaged or contradicts itself, and `OSError` from reading.
    """
    size = os.fstat(file.fileno()).st_size
    return _parse(_header_bytes(file, size), size)


def _header_bytes(file: FileIO, size: int) -> bytes:
    if size < 8:
        raise FormatError(f"the file has {size} bytes and not even a header length; it was cut short")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"the header is said to have {length:,} bytes, more than the format allows; this is another format"
        )
    if length > size - 8:
        raise FormatError(
            f"the header is said to have {length:,} bytes and {size - 8:,} follow; the file was cut short"
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise FormatError("the header does not begin with `{`; this is another format")
    return raw


def _parse(raw: bytes, size: int) -> Header:
    try:
        data = json.loads(raw.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError("the header is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or a number beyond all bounds
        raise FormatError(f"the header is not JSON: {error}") from None
    metadata = data.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise FormatError("`__metadata__` is not a mapping of strings")
    if len(data) > MAX_TENSORS:
        raise FormatError(f"the header lists {len(data):,} tensors, more than {MAX_TENSORS:,}")
    first = 8 + len(raw)
    entries: dict[str, Entry] = {}
    end = 0
    for begin, stop, name, facts in sorted(_entry(name, value) for name, value in data.items()):
        if begin != end:
            relation = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise FormatError(f"`{name}` starts at byte {begin:,} of the data and {relation}")
        entries[name] = Entry(facts, first + begin)
        end = stop
    missing = first + end - size
    if missing > 0:
        raise FormatError(f"the last {missing:,} of {first + end:,} bytes are missing; the file was cut short")
    if missing < 0:
        raise FormatError(f"{-missing:,} bytes follow after the last tensor")
    return Header(entries, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("a name occurs twice in the header")
    return found


def _entry(name: str, value: Any) -> tuple[int, int, str, TensorFacts]:
    """`(begin, end, name, facts)`, positions counted from the first byte of data."""
    try:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"`{name}` lacks a dtype, a shape or two offsets") from None
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))):
        raise FormatError(f"`{name}` has a shape or offsets that are not natural numbers")
    if not isinstance(code, str) or code not in DTYPES:
        raise FormatError(f"`{name}` has the unknown dtype `{code}`")
    reason = misshapen(shape)
    if reason:
        raise FormatError(f"`{name}` {reason}")
    torch_name, width = DTYPES[code]
    facts = TensorFacts(tuple(shape), torch_name)
    if end - begin != facts.numel * width:
        raise FormatError(
            f"`{name}` {tuple(shape)} of {torch_name} needs {facts.numel * width:,} bytes, not {end - begin:,}"
        )
    return begin, end, name, facts


def write_file(
    path: Path,
    tensors: Mapping[str, TensorFacts],
    content: Callable[[str], Iterable[memoryview]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file, asking `content` for the bytes of one tensor at a time, in the order they are stored.

    The bytes are those that the safetensors library writes. Raises `OSError`, and `ValueError` for a dtype that the format
    has no name for or content of the wrong length.
    """
    laid = laid_out(tensors, metadata)
    with path.open("wb") as file:
        file.write(laid.head)
        for name in laid.starts:
            for part in content(name):
                file.write(part)
        if file.tell() != laid.size:
            raise ValueError("a tensor gave another number of bytes than its shape needs")


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before its tensors are written: its first bytes, where each tensor begins, in their order, and its size."""

    head: bytes
    starts: Mapping[str, int]
    size: int


def laid_out(tensors: Mapping[str, TensorFacts], metadata: Mapping[str, str]) -> Layout:
    """Where tensors go in a file, as the safetensors library has it. Raises `ValueError` for a dtype that it has no name for."""
    unknown = sorted({facts.dtype for facts in tensors.values()} - set(_BY_TORCH_NAME))
    if unknown:
        raise ValueError(f"safetensors cannot store {', '.join(unknown)}")
    order = sorted(tensors, key=lambda name: (-_RANK[_BY_TORCH_NAME[tensors[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name in order:
        code = _BY_TORCH_NAME[tensors[name].dtype]
        begins[name], end = end, end + tensors[name].numel * DTYPES[code][1]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [begins[name], end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # tensors then start at a multiple of 8 and can be mapped
    first = 8 + len(raw)
    head = len(raw).to_bytes(8, "little") + raw
    return Layout(head, {name: first + begin for name, begin in begins.items()}, first + end)
