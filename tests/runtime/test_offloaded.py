"""Models whose weights accelerate keeps in main memory or on the disk: every operation does what it does on those that have theirs.

The table is ways to offload, before the adapter is put on and after, by operations, over all methods.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from peftc import PeftModel, get_peft_model, get_peft_model_state_dict, rules, set_peft_model_state_dict
from peftc.diagnostics import PeftcError
from peftc.runtime.bases import places
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.testing.models import seeded
from peftc.testing.subjects import Subject, quiet, randomise
from tests.defects import put_defect
from tests.runtime.examples import examples, name_of, rows

FOUND = examples(lambda s: s.first and (not s.model.is_language_model or s.foremost))


def in_memory(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, folder / "weights", torch.device("cpu"))


def by_map(model: nn.Module, folder: Path) -> None:
    """Every second module of the highest level that has several is on the disk."""
    top = model
    while len(list(top.children())) == 1:
        top = next(iter(top.children()))
    prefix = next(name for name, module in model.named_modules() if module is top)
    tops = [f"{prefix}.{name}" if prefix else name for name, _ in top.named_children()]
    inside = tuple(f"{name}." for name in tops)
    rest = [n for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(inside)]
    places = {name: ("disk" if i % 2 == 0 else "cpu") for i, name in enumerate(tops)} | dict.fromkeys(rest, "cpu")
    dispatch_model(model, places, offload_dir=str(folder / "weights"))


WAYS = [in_memory, on_disk, by_map]
Way = Callable[[nn.Module, Path], None]


def _param(subject: Subject, *rest: object) -> object:
    shown = [getattr(value, "__name__", "") or ("before" if value else "after") for value in rest]
    return pytest.param(subject, *rest, id="-".join([name_of(subject), *shown]))


#: each method on one model in every way; on others in the two that differ most
CASES = [
    (subject, way, first)
    for subject in FOUND
    for way in WAYS
    for first in (True, False)
    if subject.foremost or (way, first) in ((in_memory, False), (on_disk, True))
]
COMPUTING = [_param(*case) for case in CASES]
TRAINING = [_param(*case[:2]) for case in CASES if case[2]]
MERGING = [_param(*case) for case in CASES if case[0].merges]
ONE_EACH = rows(s for s in FOUND if s.foremost and s.merges)


def both(subject: Subject, way: Way, first: bool, folder: Path, training: bool = False) -> tuple[PeftModel, PeftModel]:
    """The same adapted model as it is, and offloaded: the base before the adapter comes, or all after it came."""
    plain = subject.trained().train(training)
    with quiet(), seeded(2):
        base = subject.build()
        if first:
            way(base, folder)
        model = get_peft_model(base, subject.config()).train(training)
    assert all(not p.is_meta for name, p in model.named_parameters() if p.requires_grad)
    randomise(model, "default")
    if not first:
        way(model, folder)
    assert any(p.is_meta for p in model.parameters())
    return plain, model


def near(subject: Subject, one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("subject", "way", "first"), COMPUTING)
def test_it_computes_loads_saves_and_switches_as_if_nothing_were_offloaded(
    subject: Subject, way: Way, first: bool, tmp_path: Path
) -> None:
    plain, model = both(subject, way, first, tmp_path)
    near(subject, subject.output(model), subject.output(plain))
    with model.disable_adapter(), plain.disable_adapter():
        near(subject, subject.output(model), subject.output(plain))
    with quiet():
        model.save_pretrained(tmp_path / "saved")
        for each in (model, plain):
            each.load_adapter(tmp_path / "saved", "second")
            each.set_adapter("second")
    near(subject, subject.output(model), subject.output(plain))
    states = [get_peft_model_state_dict(each, adapter_name="default") for each in (plain, model)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    moved = {key: tensor * 0.5 if tensor.is_floating_point() else tensor for key, tensor in states[0].items()}
    with quiet():
        for name in ("second", "default"):
            assert given(model, moved, name) == given(plain, moved, name)
    near(subject, subject.output(model), subject.output(plain))
    for each in (plain, model):
        each.set_adapter("default")
        each.delete_adapter("second")
    near(subject, subject.output(model), subject.output(plain))


@pytest.mark.parametrize(("subject", "way"), TRAINING)
def test_it_trains_as_if_the_base_were_not_offloaded(subject: Subject, way: Way, tmp_path: Path) -> None:
    models = both(subject, way, True, tmp_path, training=True)
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(2):
            with seeded(step):
                y = subject.run(model)
                (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    near(subject, subject.output(models[1].eval()), subject.output(models[0].eval()))


@pytest.mark.parametrize(("subject", "way", "first"), MERGING)
def test_it_merges_as_if_nothing_were_offloaded(subject: Subject, way: Way, first: bool, tmp_path: Path) -> None:
    plain, model = both(subject, way, first, tmp_path)
    with plain.disable_adapter():
        base = subject.output(plain)
    wanted = subject.output(plain)
    assert not torch.allclose(base, wanted, atol=1e-3)
    model.merge_adapter()
    near(subject, subject.output(model), wanted)
    model.unmerge_adapter()
    near(subject, subject.output(model), wanted)
    with model.disable_adapter():
        assert torch.equal(subject.output(model), base)
    merged = model.merge_and_unload()
    near(subject, subject.run(merged).detach(), wanted)
    remove_hook_from_submodules(merged)
    near(subject, subject.run(merged).detach(), wanted)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("subject", ONE_EACH)
def test_what_is_merged_before_can_be_taken_out_after(subject: Subject, way: Way, tmp_path: Path) -> None:
    plain, model = subject.trained(), subject.trained()
    model.merge_adapter()
    way(model, tmp_path)
    near(subject, subject.output(model), subject.output(plain))
    model.unmerge_adapter()
    with model.disable_adapter(), plain.disable_adapter():
        near(subject, subject.output(model), subject.output(plain))


@pytest.mark.parametrize("way", [in_memory, on_disk])
@pytest.mark.parametrize("subject", ONE_EACH)
def test_merged_and_disabled_the_base_computes(subject: Subject, way: Way, tmp_path: Path) -> None:
    _, model = both(subject, way, True, tmp_path)
    adapted = subject.output(model)
    with model.disable_adapter():
        base = subject.output(model)
    model.merge_adapter()
    merged = subject.output(model)
    near(subject, merged, adapted)
    with model.disable_adapter():
        torch.testing.assert_close(subject.output(model), base, rtol=0, atol=0)
    torch.testing.assert_close(subject.output(model), merged, rtol=0, atol=0)
    with model.disable_adapter():
        model.unmerge_adapter()
    near(subject, subject.output(model), adapted)
    with model.disable_adapter():
        torch.testing.assert_close(subject.output(model), base, rtol=0, atol=0)


@pytest.mark.parametrize("subject", ONE_EACH)
def test_a_merge_that_fails_leaves_offloaded_weights_as_they_were(subject: Subject, tmp_path: Path) -> None:
    _, model = both(subject, on_disk, True, tmp_path)
    adapted, layers = subject.output(model), list(model.session.layers.values())
    own = TunerLayer.merged_parameters

    def failing(layer: TunerLayer, *args: Any, **kwargs: Any) -> Any:
        if layer is layers[-1]:
            raise MemoryError
        return own(layer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunerLayer, "merged_parameters", failing)
        with pytest.raises(MemoryError):
            model.merge_adapter()
    assert not model.session.merged
    torch.testing.assert_close(subject.output(model), adapted, rtol=0, atol=0)


@pytest.mark.parametrize("subject", ONE_EACH)
def test_a_gradient_that_would_be_lost_is_refused(subject: Subject, tmp_path: Path) -> None:
    _, model = both(subject, in_memory, False, tmp_path, training=True)
    with pytest.raises(PeftcError) as caught:
        subject.run(model).sum().backward()
    assert [problem.code for problem in caught.value.diagnostics] == [rules.WEIGHT_ELSEWHERE.code]


@pytest.mark.parametrize("subject", ONE_EACH)
def test_rows_of_an_offloaded_model(subject: Subject, tmp_path: Path) -> None:
    models = both(subject, on_disk, True, tmp_path)
    given = next(iter(subject.model.arguments().values()))
    names = ["default", "__base__", *["other"] * given.shape[0]][: given.shape[0]]
    with quiet():
        for model in models:
            subject.join(model, "other")
    near(subject, subject.rows(models[1], names), subject.rows(models[0], names))


@pytest.mark.parametrize("subject", ONE_EACH)
def test_nothing_is_merged_into_a_weight_that_nothing_brings(subject: Subject) -> None:
    model = subject.trained()
    layer = next(iter(model.session.layers.values())).get_base_layer()
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            layer._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    assert refused(model) == [rules.WEIGHT_ELSEWHERE.code]
    assert not model.session.merged
    with pytest.MonkeyPatch.context() as patch:
        put_defect(
            patch,
            places,
            '    if absent:\n        what = f"`{absent[0]}`',
            '    if False:\n        what = f"`{absent[0]}`',
        )
        assert rules.WEIGHT_ELSEWHERE.code not in refused(model)  # whether or not torch takes tensors of two devices


def given(model: PeftModel, state: dict[str, Tensor], name: str) -> list[str]:
    """Give an adapter a state dict; the codes of what is said of one that it cannot hold, as of a table that it computes."""
    try:
        set_peft_model_state_dict(model, state, name)
    except PeftcError as error:
        return [problem.code for problem in error.diagnostics]
    return []


def refused(model: PeftModel) -> list[str]:
    """Codes of what merging says."""
    try:
        model.merge_adapter()
    except PeftcError as error:
        return [problem.code for problem in error.diagnostics]
    except RuntimeError as error:
        return [type(error).__name__]
    return []
