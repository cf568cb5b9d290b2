"""An adapter knows the weights that it was trained on: another base of the same shapes is told from them, in every state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftModel, get_peft_model, rules
from peftc.model.parts import identity
from tests.runtime.methods import Net, narrow
from tests.runtime.refused import told

pytestmark = pytest.mark.filterwarnings("ignore::peftc.PeftcWarning")


def net(seed: int = 0, change: Callable[[Net], Any] = lambda net: None) -> Net:
    """The same net for the same seed, but for what `change` does to it."""
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        change(made)
    return made


def print_in(folder: Path) -> str:
    return (folder / "peftc_base.json").read_text()


def _merge(model: PeftModel) -> None:
    model.merge_adapter()


def _step(model: PeftModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)


STATES: dict[str, Callable[[PeftModel], Any]] = {
    "fresh": lambda model: None,
    "trained": _step,
    "merged": _merge,
    "merged twice": lambda model: (model.add_adapter("b", narrow()), model.merge_adapter(["default", "b"])),
    "unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "another active": lambda model: (model.add_adapter("b", narrow()), model.set_adapter("b")),
}


@pytest.mark.parametrize("state", STATES)
def test_the_print_is_of_the_base_whatever_state_the_adapters_are_in(state: str, tmp_path: Path) -> None:
    plain = get_peft_model(net(), narrow(modules_to_save=["head"]))
    plain.save_pretrained(tmp_path / "plain")
    model = get_peft_model(net(), narrow(modules_to_save=["head"]))
    STATES[state](model)
    model.save_pretrained(tmp_path / "saved")
    assert print_in(tmp_path / "saved") == print_in(tmp_path / "plain")


def _one_number(made: Net) -> None:
    made.second.weight[3, 2] += 1e-3


BASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "the same": (net, False),
    "another seed": (lambda: net(1), True),
    "one number": (lambda: net(0, _one_number), True),
    "bfloat16": (lambda: net().to(torch.bfloat16), False),
    "float64": (lambda: net().to(torch.float64), False),
    "another seed in bfloat16": (lambda: net(1).to(torch.bfloat16), True),
    "on meta": (lambda: net(1).to("meta"), False),
    "head of another task": (lambda: net(0, lambda made: made.head.weight.add_(1)), True),
}


@pytest.mark.parametrize("base", BASES)
def test_another_base_of_the_same_shapes_is_told(base: str, tmp_path: Path) -> None:
    get_peft_model(net(), narrow()).save_pretrained(tmp_path)
    made, differs = BASES[base]
    if base == "on meta":  # nothing can be compared, and nothing is claimed
        session = get_peft_model(made(), narrow(), low_cpu_mem_usage=True).session
        assert identity.differing(session, print_in(tmp_path)) == ([], 0)
        return
    found = told(lambda: PeftModel.from_pretrained(made(), tmp_path))
    assert (rules.OTHER_BASE.code in [d.code for d in found]) is differs
    other = get_peft_model(made(), narrow(), adapter_name="other")
    found = told(lambda: other.load_adapter(tmp_path, "default"))
    assert (rules.OTHER_BASE.code in [d.code for d in found]) is differs


def test_it_names_the_weights_and_the_base(tmp_path: Path) -> None:
    config = narrow()
    config.base_model_name_or_path = "owner/net"
    get_peft_model(net(), config).save_pretrained(tmp_path)
    (found,) = told(lambda: PeftModel.from_pretrained(net(0, _one_number), tmp_path))
    assert "1 of 3 samples differ, such as `second.weight`" in found.what
    assert "`owner/net`" in found.fix and found.where.file == str(tmp_path / "peftc_base.json")


ODD = [("load", [1]), ("float32", ["a"]), ("float32", None), ("__class__", [])]
UNREADABLE = [
    *("", "[]", "3", "{", '{"first.weight": 1}', '{"first.weight": {}}', "[" * 10**5, '{"../x": {"dtype": "float32"}}'),
    *(json.dumps({"first.weight": {"dtype": d, "shape": [8, 8], "sha256": "", "numbers": n}}) for d, n in ODD),
]


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_print_that_cannot_be_read_is_passed_over(text: str) -> None:
    session = get_peft_model(net(), narrow()).session
    names, compared = identity.differing(session, text)
    assert compared in (0, 1) and len(names) <= compared


def test_what_is_large_is_sampled() -> None:
    wide = nn.Sequential(*[nn.Linear(300, 300) for _ in range(40)])
    session = get_peft_model(wide, narrow(target_modules=["0"])).session
    text = identity.print_of(session)
    assert text is not None and len(json.loads(text)) == identity.MATRICES and len(text) < 4096


def test_a_change_beyond_the_hashed_part_is_seen_where_it_is_sampled() -> None:
    wide = nn.Sequential(nn.Linear(300, 300))
    session = get_peft_model(wide, narrow(target_modules=["0"])).session
    text = identity.print_of(session)
    assert text is not None
    weight: Tensor = wide[0].base_layer.weight  # type: ignore[union-attr, assignment]
    with torch.no_grad():
        weight += 1e-4 * (torch.arange(weight.numel()).view_as(weight) > identity.HASHED_BYTES)
    assert identity.differing(session, text) == (["0.weight"], 1)
