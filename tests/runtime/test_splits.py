"""Layers as transformers splits them by tensors, in one process that has all parts: what is refused, and by which line.

Jobs of two processes are in `tests/ecosystem/test_tensor_parallel.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftc import PeftcError, PeftModel, get_peft_model, rules
from peftc.host import tensor_parallel
from peftc.runtime.bases import places, splits
from tests.defects import put_defect
from tests.runtime.methods import LANGUAGE_MODEL, narrow, preface, stretch
from tests.runtime.refused import Image

IDS = LANGUAGE_MODEL.arguments()["input_ids"]
STYLES = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise", "lm_head": "colwise_rep"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of one process: what is passed between processes is passed to itself."""
    store = tmp_path_factory.mktemp("meeting") / "store"
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1, timeout=limit)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(mesh: Any, **styles: str) -> Any:
    """A model whose layers are split, if into one part; it says into two."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = LANGUAGE_MODEL.build().eval()
    named = {name: path for path, _ in model.named_modules() for name in STYLES if path.endswith(name)}
    paths = {path: name for path, _ in model.named_modules() if (name := path.rpartition(".")[2]) in STYLES}
    assert len(named) == len(STYLES)
    plan = {path: styles.get(name, STYLES[name]) for path, name in paths.items()}
    weights = {f"{path}.weight": style for path, style in plan.items()}
    apply_tensor_parallelism(model, mesh, weights | plan)
    model._tp_size = 2
    return model


def test_it_computes_as_a_whole_one(mesh: Any) -> None:
    models = [get_peft_model(base, stretch(target_modules=["q_proj", "o_proj"])) for base in (plain(), split(mesh))]
    for model in models:
        with torch.no_grad():
            for number, tensor in enumerate(model.session.tensors("default").values()):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    found, wanted = (model(input_ids=IDS).logits for model in models)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(model.unload()(input_ids=IDS).logits for model in models))


def plain() -> Any:
    return LANGUAGE_MODEL.build().eval()


Case = tuple[Callable[[Any], nn.Module], Any, str, tuple[ModuleType, str, str]]
CASES: dict[str, Case] = {
    "a layer split in another way": (
        lambda mesh: split(mesh, o_proj="packed_rowwise"), narrow(target_modules=["o_proj"]), "o_proj",
        (splits, "if _is_strange(at(s.path), s.parameter or s.layer.packed)", "if s.parameter"),
    ),
    "a copy of a part": (
        split, narrow(target_modules=["q_proj"], modules_to_save=["lm_head"]), "`lm_head`",
        (splits, "for save in plan.saves if _has_split(at(save.path))", "for save in ()"),
    ),
    "keys and values": (
        split, preface("STORED"), "for all heads",
        (splits, "if plan.prompt is not None and plan.prompt.place.is_cache:", "if False:"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_would_act_on_a_part_is_refused(mesh: Any, case: Case) -> None:
    start, config, named, _ = case
    model = start(mesh)
    before = Image(model)
    with pytest.raises(PeftcError) as caught:
        get_peft_model(model, config)
    (found,) = caught.value.diagnostics
    assert found.code == rules.SPLIT_BASE.code
    assert named in found.what
    assert before.is_of(Image(model))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_refusal_fails_under_a_defect(mesh: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    start, config, _, defect = case
    put_defect(monkeypatch, *defect)
    try:
        get_peft_model(start(mesh), config)
    except PeftcError as error:
        assert rules.SPLIT_BASE.code not in [found.code for found in error.diagnostics]
    except (RuntimeError, ValueError, TypeError):
        pass  # of torch


def test_all_that_is_wrong_is_told_at_once(mesh: Any) -> None:
    options = narrow(target_modules=["o_proj"], modules_to_save=["lm_head"])
    with pytest.raises(PeftcError) as caught:
        get_peft_model(split(mesh, o_proj="packed_rowwise"), options)
    assert [found.code for found in caught.value.diagnostics] == [rules.SPLIT_BASE.code] * 2


def test_weights_are_read_whole(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = split(mesh).model.layers[0].self_attn.q_proj
    assert type(places.tensor_of(layer, "weight")) is Tensor
    put_defect(monkeypatch, places, "and tensor_parallel.split_of(module) is not None", "and False")
    assert type(places.tensor_of(layer, "weight")) is not Tensor


def test_what_is_known_of_a_split_layer(mesh: Any) -> None:
    attention = split(mesh).model.layers[0].self_attn
    columns, rows = (tensor_parallel.split_of(layer) for layer in (attention.q_proj, attention.o_proj))
    assert columns is not None and (columns.of_input, columns.of_output) == (False, True)
    assert rows is not None and (rows.of_input, rows.of_output) == (True, False)
    assert tensor_parallel.split_of(plain().model.layers[0].self_attn.q_proj) is None


def test_a_split_model_without_adapters_is_the_base(mesh: Any, tmp_path: Path) -> None:
    """Where nothing acts, nothing is put together."""
    model = get_peft_model(split(mesh), narrow(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with model.disable_adapter():
        assert layer._path is layer.base_layer
    assert layer._path is not layer.base_layer
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    assert isinstance(model, PeftModel)
