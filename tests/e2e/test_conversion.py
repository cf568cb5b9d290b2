"""Adapters of any method become thin ones: as the reference converts them, and with a true error where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc import PeftcError, PeftcWarning, PeftModel, convert_adapter
from peftc.ops import factors
from peftc.ops.factors import of_dense, of_thin
from peftc.testing.models import seeded
from tests.e2e.pairs import TINY, Pair, moved, pair

TARGETS = {"mlp": ["lin0", "lin1"], "gpt2": None}


def updates(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """What the adapter adds to each layer's weight."""
    session = model.session
    return {layer.site(adapter).path: layer.get_delta_weight(adapter) for layer in session.layers_of(adapter)}


def ours(model: str, config: str, **options: Any) -> Pair:
    """A pair of which only ours is made."""
    tiny = TINY[model]
    made = peftc.get_peft_model(tiny.build(), getattr(peftc, config)(**options)).eval()
    moved(made, "default", 1)
    return Pair(tiny, None, made)


def through_a_file(both: Pair, rank: int | float, folder: Path) -> PeftModel:
    peftc.save_as_lora(folder, both.ours, rank)
    return PeftModel.from_pretrained(both.tiny.build(), folder).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [2, 0.6, 1.0], ids=str)
@pytest.mark.parametrize("model", TARGETS)
def test_the_result_is_the_reference_s(model: str, rank: int | float) -> None:
    both = pair(model, "LoraConfig", r=4, lora_alpha=7, target_modules=TARGETS[model])
    (theirs, wanted), (config, found) = (
        lib.convert_to_lora(m, rank) for lib, m in ((peft, both.theirs), (peftc, both.ours))
    )
    assert found.keys() == wanted.keys()
    for key in (key for key in wanted if "lora_A" in key):
        A, B = key, key.replace("lora_A", "lora_B")
        torch.testing.assert_close(found[B] @ found[A], wanted[B] @ wanted[A], rtol=1e-4, atol=1e-5)
    for path, layer in both.ours.session.layers.items():
        key = f"base_model.model.{path}.lora_A.weight"
        assert found[key].shape == wanted[key].shape, layer
    if isinstance(rank, int):
        assert (config.r, config.lora_alpha) == (theirs.r, theirs.lora_alpha)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {"target_modules": "lin[01]"}),
        ("mlp", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
        ("mlp", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}),
        ("conv2d", {"target_modules": ["conv1", "head"]}),
        ("embedding", {"target_modules": ["emb", "lin0"]}),
        ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin2"]}),
        ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_a_thin_adapter_is_converted_exactly(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    both = ours(model, "LoraConfig", r=4, lora_alpha=7, **options)
    loaded = through_a_file(both, 4, tmp_path)
    assert updates(loaded).keys() == updates(both.ours).keys()
    torch.testing.assert_close(both.output(loaded), both.output(both.ours), rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "of_dense", None)
        assert convert_adapter(both.ours, "LORA", 4).error == 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [1, 3, 0.5, 0.99], ids=str)
def test_a_rotation_is_converted_with_a_true_error(rank: int | float, tmp_path: Path) -> None:
    both = ours("mlp", "HRAConfig", r=4, init_weights=False, target_modules=["lin0", "lin1"])
    before, y = updates(both.ours), both.output(both.ours)
    made = convert_adapter(both.ours, "LORA", rank)
    torch.testing.assert_close(both.output(both.ours), y, rtol=0, atol=0)
    after = updates(through_a_file(both, rank, tmp_path))
    lost = {path: (before[path] - after[path]).norm() for path in before}
    for path, error in made.errors.items():
        assert error == pytest.approx(float(lost[path] / before[path].norm()), rel=1e-3, abs=1e-5)
        if isinstance(rank, float):
            assert error**2 <= 1 - rank + 1e-6
    whole = torch.stack([*lost.values()]).norm() / torch.stack([b.norm() for b in before.values()]).norm()
    assert made.error == pytest.approx(float(whole), rel=1e-3, abs=1e-5)


def test_a_rotation_of_few_reflections_is_thin_and_converted_exactly(tmp_path: Path) -> None:
    both = ours("mlp", "HRAConfig", r=4, init_weights=False, target_modules=["lin0", "lin1"])
    loaded = through_a_file(both, 4, tmp_path)
    torch.testing.assert_close(both.output(loaded), both.output(both.ours), rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(both.tiny.build(), tmp_path).eval()
    torch.testing.assert_close(both.output(theirs), both.output(both.ours), rtol=1e-4, atol=1e-5)


def test_thin_and_dense_factors_are_the_same() -> None:
    with seeded(0):
        A, B = torch.randn(5, 9), torch.randn(7, 5)
    for rank in (1, 3, 0.4, 0.9):
        thin, dense = of_thin(A, B, rank), of_dense(B @ A, rank)
        assert thin.rank == dense.rank
        assert thin.error == pytest.approx(dense.error, rel=1e-4)
        torch.testing.assert_close(thin.B @ thin.A, dense.B @ dense.A, rtol=1e-4, atol=1e-5)
    assert of_thin(A, B, 5).norm == pytest.approx(float((B @ A).norm()), rel=1e-5)
    assert of_dense(torch.zeros(3, 4), 0.5).error == 0.0


def test_the_error_is_warned_of() -> None:
    both = ours("mlp", "LoraConfig", r=4, target_modules=["lin0", "lin1"])
    with pytest.warns(PeftcWarning, match=r"PC544.*lin[01]"):
        peftc.convert_to_lora(both.ours, 1)
    with pytest.warns(PeftcWarning, match="PC646.*compile_kwargs"):
        peftc.convert_to_lora(both.ours, 4, compile_kwargs={})


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    peftc.convert_to_lora(ours("mlp", "LoraConfig", r=2, target_modules=["lin0", "lin1"]).ours, 2, progressbar=True)
    assert "layer 2 of 2" in capsys.readouterr().err


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(4, 4)


def merged() -> Any:
    model = ours("mlp", "LoraConfig", r=2, target_modules=["lin0"]).ours
    model.merge_adapter()
    return model


def rescaled() -> Any:
    model = peftc.get_peft_model(Biased(), peftc.IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    moved(model, "default", 1)
    return model


def test_a_changed_bias_is_not_lost() -> None:
    with pytest.raises(PeftcError, match=r"PC543.*bias of `lin0`"):
        convert_adapter(rescaled(), "LORA", 2)


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("PC102", lambda: ours("mlp", "LoraConfig", target_modules=["lin0"]).ours, {"rank": 0}, "rank"),
    ("PC102", lambda: ours("mlp", "LoraConfig", target_modules=["lin0"]).ours, {"rank": 1.5}, "rank"),
    ("PC502", lambda: ours("mlp", "LoraConfig", target_modules=["lin0"]).ours, {"adapter_name": "gone"}, "gone"),
    ("PC509", merged, {}, "unmerge"),
    ("PC543", lambda: ours("mlp", "LoraConfig", target_modules=["lin0"], bias="all").ours, {}, "lin0.bias"),
    ("PC543", lambda: ours("llama", "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=2).ours, {}, "weights"),
    ("PC543", lambda: ours("mlp", "LoraConfig", target_modules=["lin0"]).ours, {"to": "HRA"}, "Convert to .*LORA"),
    ("PC507", Biased, {}, "no adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "make", "changes", "says"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_converted_is_told(code: str, make: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PeftcError, match=says) as found:
        convert_adapter(**{"model": make(), "to": "LORA", "rank": 2, **changes})
    assert code in {problem.code for problem in found.value.diagnostics}
