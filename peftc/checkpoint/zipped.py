"""The format of `torch.save`, read as data: where in the file each tensor lies, without unpickling anything.

A file is a zip archive without compression. `data.pkl` in it describes the tensors, and the bytes of each storage are an entry of
their own. The description is a program for pickle's stack machine. Here its steps are followed with records in the place of
objects: a class or function that it names is a pair of words, which is compared with the few that describe a tensor and never
looked up. Whatever else a file asks for ends in a `FormatError`.
"""

from __future__ import annotations

import errno
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from typing import Any

from peftc.checkpoint.format import DTYPES, STORABLE, Entry, FormatError, Header
from peftc.graph.tensors import TensorFacts
from peftc.limits import MAX_DIMENSIONS, MAX_HEADER

_SIZES = dict(DTYPES.values())
#: Names of the classes that stand for the dtype of a storage.
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64"},
    "UntypedStorage": "uint8",
}
#: What the standard library raises for files that are no archive, or a damaged one.
_NO_ARCHIVE = (zipfile.BadZipFile, EOFError, ValueError, OverflowError, RuntimeError, struct.error, zlib.error)
_MARK = object()


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that the file names, as words."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def zipped_header_of(file: FileIO) -> Header:
    """Tensors of a file that `torch.save` wrote from a mapping of tensors, in its order, and where their bytes begin.

    Raises `FormatError` for a file of another format, one that is cut short, one that holds anything but whole tensors by
    name, and one with a tensor whose elements do not lie one after the other; `OSError` from reading.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickled = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise FormatError("it is not the format that `torch.save` writes today")
            root = pickled[0].removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise FormatError("its numbers are in another order of bytes")
            if entries[pickled[0]].file_size > MAX_HEADER:
                raise FormatError("the description of its tensors is too large")
            held = _described(archive.read(pickled[0]))
            return Header({name: _entry(name, found, entries, root, file) for name, found in held.items()})
    except FormatError:
        raise
    except _NO_ARCHIVE as error:
        raise FormatError(f"it is not the format that `torch.save` writes today: {error}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise FormatError("the file is damaged: it points to before its beginning") from None


def _entry(name: Any, found: Any, entries: Mapping[str, zipfile.ZipInfo], root: str, file: FileIO) -> Entry:
    if not isinstance(found, _Tensor):
        raise FormatError(f"it holds more than tensors by name: `{name[:80]}`")
    facts = TensorFacts(found.shape, found.dtype)
    expected = 1
    for size, step in zip(reversed(found.shape), reversed(found.stride), strict=True):
        if size > 1 and step != expected and facts.numel:
            raise FormatError(f"the elements of `{name}` do not lie one after the other")
        expected *= size
    info = entries.get(f"{root}data/{found.storage.key}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise FormatError(f"the bytes of `{name}` are not in it")
    begin = found.offset * _SIZES[found.dtype]
    if begin + facts.nbytes > info.file_size:
        raise FormatError(f"`{name}` ends after its storage")
    return Entry(facts, _start(file, info) + begin)


def _start(file: FileIO, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after its own header, which has two parts of any length."""
    file.seek(info.header_offset)
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise FormatError("the file is damaged")
    start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if file.seek(0, 2) < start + info.file_size:
        raise FormatError("the file was cut short")
    return start


# The description ------------------------------------------------------------------------------------------------------


def _described(program: bytes) -> dict[str, Any]:
    """The mapping that the description stands for, with records of tensors."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            machine.step(opcode.name, argument)
        (held,) = machine.stack
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the description of its tensors cannot be followed: {error}") from None
    if not isinstance(held, dict):
        raise FormatError("it does not hold tensors by name")
    return held


_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    **{"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list},
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK},
}
_LITERALS = frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
)
_NOTHING = frozenset({"PROTO", "FRAME", "STOP"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Pickle's stack, on which only plain values and records are put."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One step of the description."""
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            word, module = stack.pop(), stack.pop()
            stack.append(_Name(_text(module), _text(word)))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name not in _NOTHING:
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Steps that make something of what is on the stack."""
        stack = self.stack
        if name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_called(called, arguments))
        elif name == "BUILD":  # what a mapping of torch's knows of itself beside its tensors
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise FormatError("it holds more than tensors by name")
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1].update({_text(key): value})
        elif name == "SETITEMS":
            pairs = self._since_mark()
            stack[-1].update(zip(map(_text, pairs[::2]), pairs[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            stack[-1].extend(self._since_mark() if name == "APPENDS" else [stack.pop()])
        else:
            raise FormatError(f"it holds more than tensors by name ({name})")

    def _since_mark(self) -> list[Any]:
        at = next(place for place in reversed(range(len(self.stack))) if self.stack[place] is _MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormatError("it holds more than tensors by name")
    return value


def _storage(persistent: Any) -> _Storage:
    kind, cls, key, _, _ = persistent
    if kind != "storage" or not isinstance(cls, _Name) or cls.name not in _STORAGES or not isinstance(key, str):
        raise FormatError("it holds more than tensors by name")
    return _Storage(key, _STORAGES[cls.name])


def _called(called: Any, arguments: Any) -> Any:
    """What a call in the description stands for; only those that describe a tensor or a mapping of tensors are known."""
    if called == _Name("collections", "OrderedDict") and arguments == ():
        return {}
    if called == _Name("torch._utils", "_rebuild_tensor_v2"):
        return _tensor(arguments)
    if called == _Name("torch._utils", "_rebuild_tensor_v3"):
        return _tensor(arguments, arguments[6])
    if called == _Name("torch._utils", "_rebuild_parameter") and isinstance(arguments[0], _Tensor):
        return arguments[0]
    named = f"`{called.module}.{called.name}`" if isinstance(called, _Name) else "something"
    raise FormatError(f"it asks for {named}, which is no part of a tensor")


def _tensor(described: Any, dtype: Any = None) -> _Tensor:
    storage, offset, shape, stride = described[:4]
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
        raise FormatError("a tensor in it is not whole")
    named = storage.dtype if dtype is None else dtype.name
    if named not in STORABLE or not len(shape) == len(stride) <= MAX_DIMENSIONS or prod(shape) >= 2**63:
        raise FormatError("a tensor in it is of a kind that is not known")
    return _Tensor(storage, named, offset, tuple(shape), tuple(stride))
