"""A method that gives what the core cannot compute with is named, with the layer; the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftc import PeftcError, rules
from peftc.tuner.maps import MapTuner
from tests.runtime.methods import StretchTuner, adapted, stretch, x


def told(act: Any) -> str:
    with pytest.raises(PeftcError) as caught:
        act()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == rules.PLUGIN_INVALID.code
    assert diagnostic.where.path
    return diagnostic.what


@pytest.mark.parametrize("value", [None, 2.0, "y"])
def test_an_output_that_is_no_tensor(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StretchTuner, "output", lambda self, a, y: value)
    model = adapted(stretch())
    what = told(lambda: model(x()))
    assert what == f"`<lambda>` of STRETCH gives a `{type(value).__name__}`, not a `Tensor`"


def test_parameters_that_the_layer_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def params(self: MapTuner[Any], a: Any, p: Any, p0: Any) -> Any:
        return {**p, "bias": torch.ones(3), "gain": torch.ones(3)}

    monkeypatch.setattr(StretchTuner, "params", params)
    monkeypatch.setattr(StretchTuner, "lowerings", frozenset({"params"}))
    model = adapted(stretch())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "`params` of STRETCH gives" in told(model.merge_adapter)
    assert "`gain`" in told(model.merge_adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
