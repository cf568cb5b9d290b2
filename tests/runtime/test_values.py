"""Values that methods read of a call: found by the rows that a layer gets, wherever and whenever it gets them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftc import PeftModel, get_peft_model, inject_adapter_in_model
from peftc.helpers import row_values
from peftc.runtime.call import Call
from tests.runtime.methods import LANGUAGE_MODEL, Net, adapted, narrow, tint, x

COLOURS = [2, 0, 1, 0, 2]


def tinted(**names: object) -> PeftModel:
    torch.manual_seed(0)
    return adapted(tint(), **names).eval()


def by_hand(model: PeftModel, adapter: str = "default", colours: list[int] = COLOURS) -> Tensor:
    """Each row by itself, with the tints added to the layers' biases."""
    net, out = model.get_base_model(), []
    for row, colour in zip(x(), colours, strict=True):
        first = net.first.base_layer(row) + net.first.tint_t[adapter][colour]
        out.append(net.head.base_layer(net.second(first.relu()).relu()) + net.head.tint_t[adapter][colour])
    return torch.stack(out)


def test_each_row_has_its_own_value() -> None:
    model = tinted()
    torch.testing.assert_close(model(x(), colours=COLOURS), by_hand(model))
    torch.testing.assert_close(model(x(), colours=torch.tensor(COLOURS)), by_hand(model))
    torch.testing.assert_close(model.base_model(x(), colours=COLOURS), by_hand(model))


def test_a_method_knows_whether_it_trains() -> None:
    model = tinted()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0 if p.requires_grad else 1.0)
    doubled = model(x(), colours=COLOURS)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(2.0 if p.requires_grad else 1.0)
    torch.testing.assert_close(model.train()(x(), colours=COLOURS), doubled)


def test_values_are_no_concern_of_adapters_that_do_not_act() -> None:
    model = tinted()
    with model.disable_adapter():
        base = model(x())
        torch.testing.assert_close(model(x(), colours=COLOURS), base)
    model.delete_adapter("default")
    torch.testing.assert_close(model.get_base_model()(x()), base)


def test_rows_of_an_adapter_find_their_own_values() -> None:
    model = tinted(other=tint())
    names = ["other", "__base__", "default", "default", "other"]
    y = model(x(), adapter_names=names, colours=COLOURS)
    with model.disable_adapter():
        base = model(x())
    alone = {"default": by_hand(model), "other": by_hand(model, "other"), "__base__": base}
    torch.testing.assert_close(y, torch.stack([alone[name][row] for row, name in enumerate(names)]))


def test_several_adapters_read_the_same_call() -> None:
    model = tinted(other=tint())
    model.set_adapter(["default", "other"])
    one = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (one.get_base_model().first, one.get_base_model().head):
            layer.tint_t["default"].add_(layer.tint_t["other"])
    torch.testing.assert_close(model(x(), colours=COLOURS), by_hand(one))


def test_beside_another_method() -> None:
    model = get_peft_model(Net(), tint(), mixed=True).eval()
    model.add_adapter("other", narrow())
    model.set_adapter(["default", "other"])
    assert model(x(), colours=COLOURS).isfinite().all()
    model.set_adapter(["other"])
    assert model(x()).isfinite().all()


def test_a_model_adapted_in_place_is_told_by_a_context() -> None:
    torch.manual_seed(0)
    wrapped = get_peft_model(Net(), tint()).eval()
    torch.manual_seed(0)
    injected = inject_adapter_in_model(tint(), Net()).eval()
    with row_values(injected, colours=COLOURS):
        y = injected(x())
    torch.testing.assert_close(y, wrapped(x(), colours=COLOURS))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_a_call_with_its_values(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(super().forward, x, use_reentrant=reentrant)
            return y

    found = {}
    for kind in (Net, Checkpointed):
        torch.manual_seed(0)
        model = get_peft_model(kind(), tint())
        inputs = x().requires_grad_()
        first = model(inputs, colours=COLOURS)
        second = model(inputs, colours=COLOURS[::-1])  # before the first is repeated
        (first.square().sum() + second.sum()).backward()
        found[kind] = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found[Net]) == 2
    for mine, wanted in zip(found[Checkpointed], found[Net], strict=True):
        torch.testing.assert_close(mine, wanted)


def test_generation_repeats_rows_with_their_values() -> None:
    base = LANGUAGE_MODEL.build()
    target = next(name for name, m in base.named_modules() if isinstance(m, nn.Linear) and "head" in name)
    model = get_peft_model(base, tint(target_modules=[target], task_type="CAUSAL_LM")).eval()
    ids = LANGUAGE_MODEL.arguments()["input_ids"][:2]
    alone = [
        model.generate(ids[:1].clone(), colours=[c], num_beams=2, max_new_tokens=4, do_sample=False) for c in (0, 2)
    ]
    both = model.generate(ids[:1].expand(2, -1).clone(), colours=[0, 2], num_beams=2, max_new_tokens=4, do_sample=False)
    for row, one in enumerate(alone):
        assert both[row, : one.shape[1]].tolist() == one[0].tolist()


def test_threads_have_calls_of_their_own() -> None:
    model, found = tinted(), {}
    orders = [COLOURS, COLOURS[::-1]] * 4

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = model(x(), colours=orders[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, order in enumerate(orders):
        torch.testing.assert_close(found[number], by_hand(model, colours=order).detach())


def test_a_graph_is_traced_with_its_values() -> None:
    model = tinted()
    expected = [model(x(), colours=torch.tensor(order)) for order in (COLOURS, COLOURS[::-1])]
    model.compile(backend="eager", fullgraph=True)
    try:
        for order, wanted in zip((COLOURS, COLOURS[::-1]), expected, strict=True):
            torch.testing.assert_close(model(x(), colours=torch.tensor(order)), wanted)
    finally:
        torch._dynamo.reset()


def test_an_adapter_that_is_gone_reads_nothing() -> None:
    model = tinted(other=tint())
    model.delete_adapter("other")
    assert list(model.session.readers) == ["default"]
    session = model.session
    model.unload()
    assert not session.readers


def test_values_of_repeated_rows() -> None:
    call = Call(expand=3, values={"colours": torch.tensor([4, 5])})
    assert call.value("colours", 6, torch.device("cpu")).tolist() == [4, 4, 4, 5, 5, 5]
    assert call.value("colours", 2, torch.device("cpu")).tolist() == [4, 5]
    assert call.value("hues", 2, torch.device("cpu")) is None
    assert call.only(torch.tensor([0, 5]), 6).value("colours", 2, torch.device("cpu")).tolist() == [4, 5]
