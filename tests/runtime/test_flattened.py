"""FSDP's first kind in one process: its views take the place of parameters in calls, and every adapter acts and trains as without.

Jobs of two processes are in `tests/ecosystem/test_distributed.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peftc.runtime.bases import places
from peftc.testing.subjects import Subject
from tests.defects import put_defect
from tests.runtime.examples import examples, rows

#: but those whose calls give more than the model's inputs
FOUND = examples(lambda s: s.method.adapts_layers and not s.model.is_language_model and not s.values)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flattened(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("subject", rows(FOUND))
def test_an_adapter_acts_and_trains_as_without(subject: Subject) -> None:
    model = subject.trained()
    wanted, gradients = subject.output(model), {n: g.clone() for n, g in subject.grown(model).items()}
    model.zero_grad()
    wrapped = flattened(model)
    torch.testing.assert_close(subject.output(wrapped), wanted)
    found = {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in subject.grown(wrapped).items()}
    assert gradients and gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)


def test_with_views_over_changed_parameters_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, places, "if name in module.__dict__}", "if False}")
    lost = 0
    for subject in FOUND:
        plain, model = subject.trained(), subject.trained()
        with torch.no_grad():
            lost += not torch.equal(subject.output(plain), subject.output(flattened(model)))
        if lost:
            return
    raise AssertionError("no method computes with changed parameters")
