"""Classes of optimisers that cannot be preconditioned are refused before the model is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftc import PeftcError, preconditioned_optimizer, rules
from peftc.model.functions import optimizers
from tests.defects import put_defect


def test_a_class_has_to_be_an_optimiser_that_needs_no_closure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)

    def refused() -> None:
        for cls in (torch.optim.LBFGS, nn.Linear):
            with pytest.raises(PeftcError, match=rules.OPTIMIZER_UNFIT.code):
                preconditioned_optimizer(model, cls, lr=1e-2)  # type: ignore[arg-type]

    refused()
    put_defect(monkeypatch, optimizers, "if not (isinstance(optimizer_cls, type) and", "if not (True or")
    with pytest.raises((pytest.fail.Exception, PeftcError, AssertionError, AttributeError, KeyError)):
        refused()
