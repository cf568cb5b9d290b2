"""What `torch.save` writes is read as data: the same tensors, no code run, and a diagnostic for everything else."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from peftc import PeftcError, rules
from peftc.checkpoint.load import open_adapter
from peftc.checkpoint.names import PICKLE_NAME, WEIGHTS_NAME
from peftc.checkpoint.save import write_tensors
from tests.unit.test_checkpoint_pickled import HELD, MARK

WHOLE = torch.randn(10, 4)
TENSORS = {
    **{
        name: torch.ones(3, 2).to(getattr(torch, name))
        for name in ("float32", "bfloat16", "float16", "float64", "int8")
    },
    **{
        name: torch.ones(5).to(getattr(torch, name))
        for name in ("int64", "bool", "complex64", "float8_e4m3fn", "uint16")
    },
    **{"rows of another": WHOLE[2:5], "one element": torch.tensor(2.5), "none": torch.empty(0, 3)},
    **{"trained": torch.nn.Parameter(torch.randn(4)), "grown": torch.randn(1, 4).expand(1, 4)},
}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    one, other = found.detach().contiguous().reshape(-1), expected.detach().contiguous().reshape(-1)
    is_whole = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return is_whole and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_the_tensors_are_those_that_were_saved(kind: type, protocol: int, tmp_path: Path) -> None:
    torch.save(kind(TENSORS), tmp_path / PICKLE_NAME, pickle_protocol=protocol)
    file = open_adapter(tmp_path)
    assert list(file.tensors) == list(TENSORS)
    assert [name for name, tensor in TENSORS.items() if not same(file.tensor(name), tensor)] == []


def test_the_state_of_a_module_with_what_it_knows_of_itself(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    torch.save(state, tmp_path / PICKLE_NAME)
    file = open_adapter(tmp_path)
    assert all(same(file.tensor(name), tensor) for name, tensor in state.items())


def test_safetensors_come_first(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / PICKLE_NAME)
    write_tensors(tmp_path / WEIGHTS_NAME, {"b": torch.ones(1)})
    assert list(open_adapter(tmp_path).tensors) == ["b"]


OTHER = {
    **HELD,
    "columns of another": lambda place: {"a": WHOLE[:, :2]},
    "names that nest": lambda place: {"a": {"b": torch.ones(1)}},
    "a function of torch": lambda place: {"a": torch.nn.functional.relu},
}


@pytest.mark.parametrize("held", OTHER.values(), ids=OTHER)
def test_anything_else_is_refused_and_not_run(held: Any, tmp_path: Path) -> None:
    torch.save(held(tmp_path), tmp_path / PICKLE_NAME)
    with pytest.raises(PeftcError, match=rules.CHECKPOINT_PICKLED.code):
        open_adapter(tmp_path)
    assert not (tmp_path / MARK).exists()


def test_a_file_of_before_the_format_says_how_to_convert_it(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / PICKLE_NAME, _use_new_zipfile_serialization=False)
    with pytest.raises(PeftcError, match="--to safetensors"):
        open_adapter(tmp_path)


def test_a_file_that_is_cut_short_or_damaged_is_refused_or_read(tmp_path: Path) -> None:
    """Never another error, and never a tensor beyond the file."""
    file = tmp_path / PICKLE_NAME
    torch.save({name: TENSORS[name] for name in ("float32", "bfloat16", "rows of another")}, file)
    whole, rng = file.read_bytes(), random.Random(0)
    refused = 0
    for turn in range(600):
        raw = bytearray(whole)
        if turn % 3 == 0:
            del raw[rng.randrange(len(raw)) :]
        for _ in range(rng.randint(1, 4) if raw else 0):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        file.write_bytes(raw)
        try:
            found = open_adapter(tmp_path)
        except PeftcError as error:
            assert error.diagnostics[0].code == rules.CHECKPOINT_PICKLED.code
            refused += 1
            continue
        assert all(e.start + e.facts.nbytes <= len(raw) for e in found.header.entries.values())
    assert 200 < refused < 600
