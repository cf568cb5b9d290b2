"""What other libraries do with an adapted model afterwards: write merged weights as they lie, ask a shard's wrapper for its state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peftc import get_peft_model, get_peft_model_state_dict
from peftc.runtime.bases import backend
from peftc.testing.subjects import Subject, quiet
from tests.defects import put_defect
from tests.runtime.examples import examples, rows
from tests.runtime.methods import Net, narrow

MERGING = rows(examples(lambda s: s.merges and s.first and not s.model.is_language_model))


def layouts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("subject", MERGING)
def test_merged_weights_lie_in_memory_as_before(subject: Subject) -> None:
    with quiet():
        wanted = layouts(subject.build())
        found = layouts(subject.trained().merge_and_unload())
    assert {name: found[name] for name in wanted} == wanted


def test_some_method_gives_weights_that_lie_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, backend, "if stored.stride() != own.stride():", "if False:")
    apart = 0
    for subject in (param.values[0] for param in MERGING):
        assert isinstance(subject, Subject)
        with quiet():
            wanted, found = layouts(subject.build()), layouts(subject.trained().merge_and_unload())
        apart += any(found[name] != wanted[name] for name in wanted)
    assert apart


@pytest.fixture
def _alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_alone")
def test_the_wrapper_of_a_sharded_model_is_asked_for_its_state() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), narrow())
    wanted = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = get_peft_model_state_dict(sharded)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
