"""OFT by its papers and beside the reference: sizes of blocks, both Cayley transforms, the constraint, dropped blocks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peftc import OFTConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model
from tests.methods.exchange import assert_read_by_both, losses_of


def wrapped(layer: nn.Module | None = None, **options: Any) -> PeftModel:
    """A layer of 12 features with an adapter that rotates at random."""
    torch.manual_seed(0)
    base = nn.Sequential(layer or nn.Linear(12, 5)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)
        model = get_peft_model(base, OFTConfig(**{"oft_block_size": 4, "target_modules": ["0"], **options})).eval()
    nn.init.normal_(vectors(model), std=0.3)
    return model


def vectors(model: PeftModel) -> nn.Parameter:
    layer = model.get_base_model()[0]
    slots = layer.oft_embedding_R if isinstance(layer.base_layer, nn.Embedding) else layer.oft_R
    return slots["default"].weight


def skew(entries: Tensor, size: int) -> Tensor:
    Q = torch.zeros(size, size, dtype=entries.dtype)
    Q[*torch.triu_indices(size, size, 1)] = entries
    return Q - Q.T


def exactly(Q: Tensor) -> Tensor:
    eye = torch.eye(len(Q), dtype=Q.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def in_terms(terms: int) -> Callable[[Tensor], Tensor]:
    """The reference's series: the last power counts once, the others but the first twice; three terms are four."""

    def series(Q: Tensor) -> Tensor:
        last = max(terms, 4) - 1 if terms > 2 else 1
        factors = [1, 2] if terms == 2 else [1, *[2] * (last - 1), 1]
        return sum(k * torch.linalg.matrix_power(Q, i) for i, k in enumerate(factors))  # type: ignore[return-value]

    return series


def rotation(model: PeftModel, size: int, transform: Callable[[Tensor], Tensor], features: int = 12) -> Tensor:
    blocks = [transform(skew(row, size)) for row in vectors(model).detach()]
    return torch.block_diag(*(blocks * (features // size) if len(blocks) == 1 else blocks))


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 7])
def test_the_series(terms: int) -> None:
    model, x = wrapped(num_cayley_neumann_terms=terms), torch.randn(3, 12).double()
    torch.testing.assert_close(model(x), model.get_base_model()[0].base_layer(x @ rotation(model, 4, in_terms(terms))))


@pytest.mark.parametrize("shared", [False, True])
def test_the_exact_transform_keeps_singular_values(shared: bool) -> None:
    model, x = wrapped(use_cayley_neumann=False, block_share=shared), torch.randn(3, 12).double()
    base = model.get_base_model()[0].base_layer
    assert vectors(model).shape == (1 if shared else 3, 6)
    expected = base(x @ rotation(model, 4, exactly))
    torch.testing.assert_close(model(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    torch.testing.assert_close(torch.linalg.svdvals(merged[0].weight), torch.linalg.svdvals(base.weight))


def test_patches_of_a_convolution_are_rotated() -> None:
    model, x = wrapped(nn.Conv2d(3, 5, 2, padding=1), use_cayley_neumann=False), torch.randn(2, 3, 4, 4).double()
    base = model.get_base_model()[0].base_layer
    weight = (base.weight.flatten(1) @ rotation(model, 4, exactly).T).view_as(base.weight)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, weight, base.bias, padding=1))


def test_vectors_of_an_embedding_are_rotated() -> None:
    model, ids = wrapped(nn.Embedding(7, 12), use_cayley_neumann=False), torch.tensor([[0, 3], [6, 3]])
    base = model.get_base_model()[0].base_layer
    expected = base(ids) @ rotation(model, 4, exactly)
    torch.testing.assert_close(model(ids), expected)
    torch.testing.assert_close(model.merge_and_unload()(ids), expected)


def test_two_adapters_act_in_one_order_merged_or_not() -> None:
    model, x = wrapped(use_cayley_neumann=False), torch.randn(3, 12).double()
    model.add_adapter("other", OFTConfig(oft_block_size=6, target_modules=["0"], use_cayley_neumann=False))
    nn.init.normal_(model.get_base_model()[0].oft_R["other"].weight, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)


# sizes ----------------------------------------------------------------------------------------------------------------

SIZES = [
    {"oft_block_size": 4}, {"oft_block_size": 5}, {"oft_block_size": 9}, {"oft_block_size": 99},
    {"r": 3, "oft_block_size": 0}, {"r": 5, "oft_block_size": 0}, {"r": 1, "oft_block_size": 0},
]  # fmt: skip


@pytest.mark.parametrize("options", SIZES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_blocks_have_the_sizes_of_the_reference(options: dict[str, Any]) -> None:
    config = peft.OFTConfig(target_modules=["0"], **options)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 5)), config)
    assert vectors(wrapped(**options)).shape == theirs.base_model.model[0].oft_R["default"].weight.shape


@pytest.mark.parametrize(
    "options", [{"oft_block_size": 5}, {"oft_block_size": 99}, {"r": 5, "oft_block_size": 0}], ids=str
)
def test_an_adjusted_size_is_told(options: dict[str, Any]) -> None:
    with pytest.warns(PeftcWarning, match=r"PC446.*does not divide the 12 features of `0`"):
        get_peft_model(nn.Sequential(nn.Linear(12, 5)), OFTConfig(target_modules=["0"], **options))


@pytest.mark.parametrize(
    ("layer", "options", "code"),
    [
        (nn.Linear(13, 5), {"oft_block_size": 2}, "PC401"),
        (nn.Linear(12, 5), {"r": 3}, "PC118"),
        (nn.Linear(12, 5), {"oft_block_size": 0}, "PC118"),
        (nn.Linear(12, 5), {"num_cayley_neumann_terms": 1}, "PC102"),
    ],
    ids=["blocks of one", "both sizes", "no size", "a constant series"],
)
def test_what_cannot_rotate_is_refused(layer: nn.Module, options: dict[str, Any], code: str) -> None:
    with pytest.raises(PeftcError, match=code):
        get_peft_model(nn.Sequential(layer), OFTConfig(target_modules=["0"], **options))


def test_a_start_that_rotates_is_told() -> None:
    with pytest.warns(PeftcWarning, match="PC104"):
        get_peft_model(
            nn.Sequential(nn.Linear(12, 5)), OFTConfig(oft_block_size=4, target_modules=["0"], init_weights=False)
        )


def test_biases_of_adapted_layers_train_along() -> None:
    trained = {name for name, p in wrapped(bias="oft_only").named_parameters() if p.requires_grad}
    assert trained == {"base_model.model.0.base_layer.bias", "base_model.model.0.oft_R.default.weight"}


# training -------------------------------------------------------------------------------------------------------------


def test_the_constraint_holds_and_evaluation_leaves_the_slots_alone() -> None:
    model, x = wrapped(coft=True, eps=0.1), torch.randn(3, 12).double()
    before = vectors(model).detach().clone()
    inside = before * (0.1 / math.sqrt(3)) / (math.sqrt(2) * before.norm(dim=1, keepdim=True))
    y = model(x)
    assert torch.equal(vectors(model), before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(vectors(model), before)
    with torch.no_grad():
        vectors(model).copy_(inside)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False}, {"block_share": True}], ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_training_goes_as_in_the_reference(options: dict[str, Any], conv: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 4, 4) if conv else torch.randn(3, 12)
    bases = [nn.Sequential(nn.Conv2d(12, 5, 1) if conv else nn.Linear(12, 5)) for _ in range(2)]
    bases[1].load_state_dict(bases[0].state_dict())
    given = {"oft_block_size": 4, "target_modules": ["0"], **options}
    ours, theirs = get_peft_model(bases[0], OFTConfig(**given)), peft.get_peft_model(bases[1], peft.OFTConfig(**given))
    losses = []
    for model in (ours, theirs):
        slot = next(p for p in model.parameters() if p.requires_grad)
        torch.manual_seed(1)
        nn.init.normal_(slot, std=0.3)
        losses.append(losses_of(model, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_blocks_are_left_out_in_training_only() -> None:
    torch.manual_seed(0)
    model, x = wrapped(module_dropout=0.5, use_cayley_neumann=False), torch.randn(3, 12).double()
    base, R = model.get_base_model()[0].base_layer, rotation(model, 4, exactly)
    torch.testing.assert_close(model(x), base(x @ R))
    model.train()
    found = {_which(model(x), base, x, R) for _ in range(40)}
    assert len(found) == 8  # each of three blocks is there or not
    model.merge_adapter()
    torch.testing.assert_close(model(x), base(x))


def test_blocks_that_share_a_rotation_are_left_out_one_by_one() -> None:
    model, x = wrapped(module_dropout=0.5, use_cayley_neumann=False, block_share=True), torch.randn(3, 12).double()
    base, R = model.get_base_model()[0].base_layer, rotation(model, 4, exactly)
    model.train()
    assert len({_which(model(x), base, x, R) for _ in range(40)}) == 8


def _which(y: Tensor, base: nn.Module, x: Tensor, R: Tensor) -> int:
    """Which blocks of R are in effect."""
    for mask in range(8):
        kept = R.clone()
        for block in range(3):
            if not mask >> block & 1:
                rows = slice(4 * block, 4 * block + 4)
                kept[rows, rows] = torch.eye(4, dtype=R.dtype)
        if torch.allclose(y, base(x @ kept)):
            return mask
    raise AssertionError("no choice of blocks explains the output")


# the reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"use_cayley_neumann": False, "block_share": True}, {"r": 2, "oft_block_size": 0}], ids=str
)
@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 5), lambda: nn.Embedding(7, 12)], ids=["linear", "embedding"])
def test_folders_go_both_ways(make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = make()
    x = torch.tensor([[0, 3], [6, 3]]) if isinstance(layer, nn.Embedding) else torch.randn(3, 12)
    given = {"oft_block_size": 4, "init_weights": False, **options}
    assert_read_by_both("OFTConfig", layer, make, x, given, tmp_path)
