"""LN tuning: copies of a layer's parameters in its place, on every kind of layer, and adapters exchanged with the reference."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from peftc import LNTuningConfig, PeftcError, PeftModel, get_peft_model
from peftc.testing.models import MODELS
from tests.methods.exchange import move

LLAMA = next(model for model in MODELS if model.name == "llama")


class Net(nn.Module):
    """A layer of every kind that has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 2)
        self.batch = nn.BatchNorm1d(6)
        self.lin = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, ids: Tensor) -> Tensor:
        """`(N, L)` ids -> `(N, L - 1, 5)`."""
        return self.norm(self.lin(self.batch(self.conv(self.embed(ids).mT)).mT))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LAYERS = ["embed", "conv", "batch", "lin", "norm"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def tuned(*targets: str) -> PeftModel:
    return get_peft_model(net(), LNTuningConfig(target_modules=set(targets or LAYERS)))


@pytest.mark.parametrize("target", LAYERS)
def test_it_starts_as_the_base_and_then_takes_its_place(target: str) -> None:
    model = tuned(target)
    torch.testing.assert_close(model(IDS), net()(IDS))  # other addresses, other roundings in the last bit
    move(model)
    own = {key.rpartition(".")[2]: tensor for key, tensor in model.adapter_tensors("default").items()}
    expected = net()
    expected.load_state_dict({f"{target}.{name}": tensor.detach() for name, tensor in own.items()}, strict=False)
    torch.testing.assert_close(model(IDS), expected(IDS))
    merged = model.merge_and_unload()
    assert {n: t.tolist() for n, t in merged.state_dict().items()} == {
        n: t.tolist() for n, t in expected.state_dict().items()
    }


def test_two_are_not_active_on_one_layer() -> None:
    """The reference refuses the call; here it is told when they are to be activated, and nothing has changed."""
    model = tuned()
    move(model)
    model.add_adapter("second", LNTuningConfig(target_modules=set(LAYERS)))
    y = model(IDS)
    with pytest.raises(PeftcError, match="`default` and `second` cannot act together"):
        model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=0)


def test_a_layer_of_packed_numbers_is_refused() -> None:
    base = nn.Sequential(nn.Linear(2, 2))
    base[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(PeftcError, match=r"`weight` \(uint8\) holds numbers that no gradient can move"):
        get_peft_model(base, LNTuningConfig(target_modules=["0"]))


def test_a_norm_in_half_precision_trains_in_full_and_computes_as_merged() -> None:
    model = get_peft_model(LLAMA.build(torch.bfloat16), LNTuningConfig(task_type="CAUSAL_LM"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    move(model)
    y = model(**LLAMA.arguments()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**LLAMA.arguments()).logits, y, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("targets", [None, ["norm", "lm_head", "q_proj"]])
def test_the_reference_loads_what_is_saved_here(targets: list[str] | None, tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(), LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets))
    move(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    names = {name for name, _ in theirs.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(theirs(**LLAMA.arguments()).logits, model(**LLAMA.arguments()).logits)


def test_what_the_reference_saved_is_loaded_here(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(LLAMA.build(), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    move(theirs)
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    torch.testing.assert_close(model(**LLAMA.arguments()).logits, theirs(**LLAMA.arguments()).logits)
    theirs.merge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(model(**LLAMA.arguments()).logits, theirs(**LLAMA.arguments()).logits)
