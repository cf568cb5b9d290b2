"""The reference beside us, for one adapter: the same parameters, files read both ways, the same draws in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftc
from peftc.testing.models import seeded
from tests.e2e.pairs import trainable
from tests.e2e.test_interop import Case, config_in, shapes


def assert_exchanged(case: Case, folder: Path) -> None:
    """What either library saves, the other reads and saves again alike, and merges alike."""
    assert shapes(case.made_by("peftc")) == shapes(case.made_by("peft"))
    for writer, reader in (("peft", "peftc"), ("peftc", "peft")):
        first, again = folder / writer, folder / f"{writer} again"
        made = case.made_by(writer)
        made.save_pretrained(str(first))
        y = case.output(made)
        loaded = case.loaded_by(reader, first, is_trainable=True)
        torch.testing.assert_close(case.output(loaded), y, rtol=1e-4, atol=1e-5)
        assert loaded.get_nb_trainable_parameters() == made.get_nb_trainable_parameters()
        loaded.save_pretrained(str(again))
        before, after = (load_file(place / "adapter_model.safetensors") for place in (first, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert config_in(again) == config_in(first)
        torch.testing.assert_close(case.output(loaded.merge_and_unload()), y, rtol=1e-4, atol=1e-5)


def trained_alike(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of both libraries after one forward in training from the same seed, theirs first."""
    found = []
    theirs, ours = case.made_by("peft"), case.made_by("peftc")
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs.train(), ours.train()):
        with seeded(7):
            out = model(**case.tiny.arguments())
        out = out if isinstance(out, Tensor) else out.logits
        out.square().sum().backward()
        found.append({name: p.grad for name, p in trainable(model) if p.grad is not None})
    return found[0], found[1]


def assert_read_by_both(
    config: str, layer: nn.Module, make: Callable[[], nn.Module], x: Tensor, options: Mapping[str, Any], folder: Path
) -> None:
    """An adapter of one layer that the reference saved acts alike here, and what is saved of it here, there."""

    def base() -> nn.Module:
        fresh = nn.Sequential(make())
        fresh[0].load_state_dict(layer.state_dict())
        return fresh

    theirs = peft.get_peft_model(base(), getattr(peft, config)(target_modules=["0"], **options)).eval()
    theirs.save_pretrained(folder / "theirs")
    ours = peftc.PeftModel.from_pretrained(base(), folder / "theirs").eval()
    torch.testing.assert_close(ours(x), theirs(x))
    ours.save_pretrained(folder / "ours")
    again = peft.PeftModel.from_pretrained(base(), folder / "ours").eval()
    torch.testing.assert_close(again(x), theirs(x))


def move(model: nn.Module, seed: int = 1) -> None:
    """Move every tensor that trains, at random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def losses_of(model: nn.Module, x: Tensor) -> list[float]:
    """Losses of four steps of a training that makes the output small."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(x).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def largest_kept(model: nn.Module, x: Tensor) -> int:
    """Numbers in the largest tensor that a forward keeps for backward, other than parameters."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return max(tensor.numel() for tensor in kept if tensor.data_ptr() not in own)
