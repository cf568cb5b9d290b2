"""The file format: the same bytes as the safetensors library writes, and no header that lies gets through."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftc import rules
from peftc.checkpoint.format import DTYPES, FormatError, Header, header_of, write_file
from peftc.checkpoint.load import AdapterFile
from peftc.checkpoint.save import write_tensors
from peftc.diagnostics import PeftcError
from peftc.graph.tensors import TensorFacts


def read_header(path: Path) -> Header:
    with FileIO(path) as file:
        return header_of(file)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=8))
def test_the_same_bytes_as_the_library_and_back(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    tensors = {
        name: torch.randint(0, 2, shape).to(getattr(torch, DTYPES[code][0])) for name, (code, shape) in kinds.items()
    }
    write_tensors(folder / "ours", tensors)
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    found = dict(AdapterFile.of(folder / "ours").items())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes(found[name].reshape(-1).view(torch.uint8).tolist()) == bytes(
            tensor.reshape(-1).view(torch.uint8).tolist()
        )


def test_shared_and_strided_tensors_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"all": base, "view": base[1], "turned": base.t(), "parameter": torch.nn.Parameter(base)}
    write_tensors(tmp_path / "file", tensors)
    for name, tensor in load_file(tmp_path / "file").items():
        assert torch.equal(tensor, tensors[name])


def test_a_tensor_of_the_file_is_writable_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.zeros(4), "b": torch.zeros(4)})
    file = AdapterFile.of(tmp_path / "file")
    one = file.tensor("a")
    one += 1
    assert file.tensor("b").sum() == 0
    assert load_file(tmp_path / "file")["a"].sum() == 0
    assert one.untyped_storage().nbytes() == 16  # not the whole file: it can be pickled and shared


@pytest.mark.parametrize("dtype", sorted(name for name, _ in DTYPES.values()))
@pytest.mark.parametrize("odd", range(0, 72, 8))
def test_what_was_read_stays_when_the_file_is_written_in_place_or_cut_short(
    tmp_path: Path, dtype: str, odd: int
) -> None:
    """Wherever the tensors start: `cp new old` and a full disk write in place, and no memory is the file's."""
    path = tmp_path / "file"
    tensor = torch.arange(64).remainder(2).to(getattr(torch, dtype))
    write_tensors(path, {"a" + "b" * odd: tensor})
    held = dict(AdapterFile.of(path).items())
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)) for found in held.values())
    path.write_bytes(b"")
    assert all(torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)) for found in held.values())


def test_header_and_tensors_are_of_one_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.ones(4)})
    write_tensors(tmp_path / "other", {"b": torch.zeros(2), "a": torch.zeros(4)})
    file = AdapterFile.of(tmp_path / "file")
    (tmp_path / "other").rename(tmp_path / "file")
    assert torch.equal(file.tensor("a"), torch.ones(4))


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.ones(40), "b": torch.ones(40)})
    file = AdapterFile.of(tmp_path / "file")
    os.truncate(tmp_path / "file", 300)
    with pytest.raises(PeftcError, match=rules.CHECKPOINT_DAMAGED.code):
        dict(file.items())
    with pytest.raises(PeftcError, match=rules.CHECKPOINT_DAMAGED.code):
        file.equal("a", "b")


def test_a_header_that_was_not_padded(tmp_path: Path) -> None:
    """Early writers left tensors at odd positions, where they cannot be used in place."""
    tensor = torch.arange(5.0)
    header = json.dumps({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}})
    while (8 + len(header)) % 4 == 0:
        header += " "
    raw = len(header).to_bytes(8, "little") + header.encode() + tensor.numpy().tobytes()
    (tmp_path / "file").write_bytes(raw)
    assert torch.equal(AdapterFile.of(tmp_path / "file").tensor("a"), tensor)


def file_with(tmp_path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tmp_path / "file"


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES: dict[str, tuple[object, str]] = {
    "not json": (b"{'a': 1}", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', "not JSON"),
    "a list": (b"[1, 2]", "does not begin with"),
    "too deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "twice": (b'{"a": 1, "a": 2}', "occurs twice"),
    "entry not a mapping": ({"a": [1]}, "lacks a dtype"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "lacks a dtype"),
    "three offsets": ({"a": entry(offsets=(0, 8, 16))}, "lacks a dtype"),
    "offsets not a list": ({"a": entry(offsets=16)}, "lacks a dtype"),
    "shape not a list": ({"a": entry(shape="4")}, "natural numbers"),
    "negative size": ({"a": entry(shape=(-4,))}, "natural numbers"),
    "fraction": ({"a": entry(shape=(4.0,))}, "natural numbers"),
    "true": ({"a": entry(shape=(True, 4))}, "natural numbers"),
    "negative offset": ({"a": entry(offsets=(-16, 0))}, "natural numbers"),
    "unknown dtype": ({"a": entry(dtype="F33")}, "unknown dtype"),
    "dtype not a text": ({"a": entry(dtype=["F32"])}, "unknown dtype"),
    "size against shape": ({"a": entry(shape=(5,))}, "needs 20 bytes, not 16"),
    "end before begin": ({"a": entry(offsets=(16, 0))}, "needs 16 bytes, not -16"),
    "overlap": ({"a": entry(), "b": entry(offsets=(0, 16))}, "overlaps"),
    "gap": ({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(2,), offsets=(8, 16))}, "leaves a gap"),
    "gap at the start": ({"a": entry(shape=(3,), offsets=(4, 16))}, "leaves a gap"),
    "cut short": ({"a": entry(shape=(8,), offsets=(0, 32))}, "the last 16 of"),
    "longer": ({"a": entry(shape=(2,), offsets=(0, 8))}, "8 bytes follow"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "mapping of strings"),
    "metadata a list": ({"__metadata__": ["a"]}, "mapping of strings"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_found_out(tmp_path: Path, lie: str) -> None:
    header, told = LIES[lie]
    with pytest.raises(FormatError, match=told):
        read_header(file_with(tmp_path, header))


def test_a_header_that_does_not_lie_is_read(tmp_path: Path) -> None:
    header = read_header(file_with(tmp_path, {"__metadata__": {"format": "pt"}, "a": entry()}))
    assert header.metadata == {"format": "pt"}
    assert header.entries["a"].facts == TensorFacts((4,), "float32")


@pytest.mark.parametrize("length", [0, 4, 7])
def test_a_file_without_a_header(tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(b"\1" * length)
    with pytest.raises(FormatError, match="not even a header length"):
        read_header(tmp_path / "file")


@pytest.mark.parametrize(("length", "told"), [(2**63, "another format"), (10_000, "cut short")])
def test_an_absurd_header_length_is_not_believed(tmp_path: Path, length: int, told: str) -> None:
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match=told):
        read_header(tmp_path / "file")


@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    write_tensors(path, {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()})
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FormatError):
        read_header(path)


@given(st.data())
def test_a_damaged_file_is_refused_or_gives_tensors_but_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    write_tensors(path, {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()})
    raw = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[position] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = AdapterFile.of(path)
    except FormatError:
        return
    for _, tensor in file.items():
        tensor.sum()


def test_a_dtype_without_a_name_and_content_of_the_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot store complex128"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="number of bytes"):
        write_file(tmp_path / "file", {"a": TensorFacts((2,), "float32")}, lambda name: [memoryview(b"abc")], {})
