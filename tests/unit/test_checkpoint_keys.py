"""Keys as records: names round-trip whatever an adapter is called, wrappers are seen through, and lists name every key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftc.checkpoint.keys import (
    WRAPPERS,
    Nearest,
    assign,
    common_change,
    grouped,
    listed,
    one_of_each,
    renamed,
    unwrapped,
)
from peftc.checkpoint.report import expected_tensors
from peftc.compiler.plan.sites import PROMPT_ROOT, WRAPPED_ROOT
from peftc.diagnostics import PeftcError
from peftc.tuner.method import TunerMethod
from tests.unit.adapters import adapter_plan, examples

EXAMPLES = list(examples())
each_example = pytest.mark.parametrize(("method", "example"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])

#: Names that are also names of slots, containers, tails, numbers or wrappers.
AWKWARD = ("default", "weight", "base_layer", "0", "modules_to_save", "_orig_mod", "module", "up", "bias", "ünïcode")


@each_example
def test_keys_on_disk_do_not_depend_on_the_adapter_name(method: TunerMethod, example: dict[str, Any]) -> None:
    plain = adapter_plan(method, example)
    slots = [slot.name for site in plain.sites for slot in site.slots]
    for name in (*AWKWARD, *slots[:2], *method.layer_names):
        plan = adapter_plan(method, example, name)
        assert expected_tensors(plan) == expected_tensors(plain)
        memory = [parameter.name for parameter in plan.parameters()]
        assert len(set(memory)) == len(memory)
        disk = [parameter.disk for parameter in plan.parameters() if parameter.disk is not None]
        assert len(set(disk)) == len(disk)


@each_example
def test_a_key_in_memory_is_the_key_on_disk_with_the_adapter_put_in(
    method: TunerMethod, example: dict[str, Any]
) -> None:
    plan = adapter_plan(method, example, "weight")
    for site in plan.sites:
        for slot in site.slots:
            key = site.key(slot, "weight")
            memory, disk = key.memory(WRAPPED_ROOT).split("."), key.disk(WRAPPED_ROOT).split(".")
            place = len(WRAPPED_ROOT.split(".")) - 1 + len(site.path.split("."))
            assert memory[place] == slot.name
            if slot.named:
                assert memory.pop(place + 1) == "weight"
            if slot.stored_tail is not None:
                assert memory.pop() == slot.tail
                memory += [slot.stored_tail] if slot.stored_tail else []
            home = f"{WRAPPED_ROOT}{site.path}"
            if slot.home is not None:  # shared: saved once, under one of its layers or at the model's own level
                assert slot.home in ("", *(other.path for other in plan.sites))
                home = f"{WRAPPED_ROOT}{slot.home}" if slot.home else PROMPT_ROOT.removesuffix(".")
            assert disk == [*home.split("."), *memory[place:]]


segment = st.sampled_from(["model", "layers", "0", "11", "up", "weight", "module", "base_model", *WRAPPERS]) | st.text(
    "abc_", min_size=1, max_size=4
)
paths = st.lists(segment, min_size=1, max_size=5).map(".".join)


@given(st.sets(paths, min_size=1, max_size=12), st.data())
def test_what_is_found_under_its_own_name_is_never_taken_from_elsewhere(wanted: set[str], data: st.DataObject) -> None:
    keys = [f"base_model.model.{path}" for path in sorted(wanted)]
    found = [*keys, *data.draw(st.lists(paths, max_size=5))]
    assert assign(keys, found, WRAPPED_ROOT) == {key: key for key in keys}


@given(st.sets(paths, min_size=1, max_size=12), paths)
def test_no_key_of_the_file_is_used_twice(wanted: set[str], extra: str) -> None:
    keys = [f"base_model.model.{path}" for path in sorted(wanted)]
    sources = assign(keys, [*sorted(wanted), extra, f"module.{extra}"], WRAPPED_ROOT)
    assert len(set(sources.values())) == len(sources)


PATH = "model.layers.0.self_attn.q_proj.factor.weight"


@pytest.mark.parametrize(
    "stored",
    [
        PATH,
        f"_orig_mod.base_model.model.{PATH}",
        f"base_model.model._orig_mod.{PATH}",
        f"base_model._orig_mod.model.{PATH}",
        f"module.base_model.model.{PATH}",
        f"module._orig_mod.base_model.model.{PATH}",
        f"module.{PATH}",
        f"base_model.model.module.{PATH}",
        "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.factor.weight",
        "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.factor.weight",
    ],
)
def test_wrappers_are_seen_through(stored: str) -> None:
    key = WRAPPED_ROOT + PATH
    assert assign([key], [stored], WRAPPED_ROOT) == {key: stored}


def test_modules_that_are_called_like_wrappers_are_not_taken_for_them() -> None:
    inside = ["base_model.model.module.a.weight", "base_model.model.a.weight"]
    assert assign(inside, inside, WRAPPED_ROOT) == {key: key for key in inside}
    assert unwrapped("base_model.model.module.a.weight", WRAPPED_ROOT) == ("module", "a", "weight")
    deeper = ["base_model.model.b.module.a.weight"]
    assert assign(["base_model.model.b.a.weight"], deeper, WRAPPED_ROOT) == {}


def test_what_could_be_two_things_is_left_alone() -> None:
    key = "base_model.model.a.weight"
    assert assign([key], ["a.weight", "_orig_mod.a.weight"], WRAPPED_ROOT) == {}


def test_the_nearest_key_shares_most_of_its_end() -> None:
    nearest = Nearest(["m.layers.0.q.A", "m.layers.1.q.A", "m.layers.0.k.A", "other"])
    assert nearest("m.text.layers.1.q.A") == "m.layers.1.q.A"
    assert nearest("m.layers.0.q.B") is None
    assert nearest("x.A") in ("m.layers.0.q.A", "m.layers.1.q.A", "m.layers.0.k.A")
    assert nearest("m.layers.0.v.A") in ("m.layers.0.q.A", "m.layers.0.k.A")


def test_repeated_layers_are_grouped() -> None:
    keys = [f"layers.{n}.q.weight" for n in (0, 1, 2, 5)] + ["layers.0.k.weight", "norm"]
    assert grouped(keys) == {"layers.{0..2,5}.q.weight": 4, "layers.0.k.weight": 1, "norm": 1}
    assert listed(keys) == "`layers.{0..2,5}.q.weight` ×4, `layers.0.k.weight`, `norm`"
    assert listed(keys, limit=1) == "`layers.{0..2,5}.q.weight` ×4 and 2 more"
    assert one_of_each(keys) == ["layers.0.q.weight", "layers.0.k.weight", "norm"]
    assert grouped(["a.007.b", "a.7.b", "a.99999999999999999999.b"]) == {
        "a.007.b": 1,
        "a.7.b": 1,
        "a.99999999999999999999.b": 1,
    }


@given(st.lists(st.lists(segment, min_size=1, max_size=4).map(".".join), unique=True, max_size=20))
def test_groups_count_every_key(keys: list[str]) -> None:
    assert sum(grouped(keys).values()) == len(keys)


def test_a_change_that_all_keys_share() -> None:
    pairs = {f"m.layers.{n}.q": f"m.text.layers.{n}.q" for n in range(3)}
    assert common_change(pairs) == ("m", "m.text")
    assert common_change({**pairs, "a.b": "c.b"}) is None


def test_keys_are_renamed_without_their_root_and_once() -> None:
    keys = ["base_model.model.model.q.A", "base_model.k.A", "v.A"]
    mapping = {"^model": "text", "A$": "B", "text": "lost"}
    assert renamed(keys, mapping) == {"base_model.model.text.q.A": keys[0], "base_model.k.B": keys[1], "v.B": keys[2]}
    assert renamed(["base_model.model.h.3.A"], {r"h\.(\d+)": r"layers.\1.in"}).keys() == {
        "base_model.model.layers.3.in.A"
    }


def test_two_keys_may_not_become_one() -> None:
    with pytest.raises(PeftcError) as refused:
        renamed(["a.q", "b.q"], {"^[ab]": "c"})
    assert refused.value.diagnostics[0].code == "PC640"
    assert "makes `c.q` of both `a.q` and `b.q`" in str(refused.value)


def test_a_renaming_cannot_hang() -> None:
    with pytest.raises(PeftcError, match="PC405"):
        renamed(["base_model.model." + "a" * 40 + "!"], {"(a|aa)+$": "b"})
