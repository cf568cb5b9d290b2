"""What a live model refuses, or warns of: each case leaves every tensor, flag and module object as it was.

Prompts have a table of their own beside this. Every case has a mutation, a small defect put into peftc, under which it fails: so the case can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import (
    PeftModel,
    compile_plan,
    convert_adapter,
    get_base_model_state_dict,
    get_peft_model,
    hotswap_adapter_from_state_dict,
    inject_adapter_in_model,
    prepare_model_for_compiled_hotswap,
    rules,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peftc.compiler import compile as compiling
from peftc.compiler.passes import calls as compiler_calls
from peftc.compiler.passes import select
from peftc.diagnostics import Rule
from peftc.model import injected, mixed
from peftc.model import peft_model as runtime_model
from peftc.model.functions import assistance, base_state, hotswap, state
from peftc.model.functions import conversion as converting
from peftc.model.functions.assistance import row_values
from peftc.model.parts import adapted as adapted_model
from peftc.model.parts import files, rows
from peftc.runtime import call
from peftc.runtime.applying import apply, conversion, planning, weighted
from peftc.runtime.applying.apply import apply_plan
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.around import calls
from peftc.runtime.bases import splits
from peftc.runtime.call import Call
from peftc.runtime.layer import merged as merged_weights
from peftc.runtime.layer import merging
from peftc.runtime.layer import wrapper as layer
from peftc.runtime.session import applied, drift, session, starts, succession, together, values
from peftc.runtime.slots import views
from tests.defects import put_defect
from tests.runtime.methods import LANGUAGE_MODEL, Net, adapted, mix, narrow, preface, prompted, stretch, tint, x
from tests.runtime.refused import Case, failure, told


def merged() -> PeftModel:
    model = adapted(other=narrow())
    model.set_adapter(["default", "other"])
    model.merge_adapter()
    return model


def nested() -> PeftModel:
    """A stretch round a narrow update, both active."""
    model = get_peft_model(Net(), narrow(), mixed=True)
    model.add_adapter("other", stretch())
    model.set_adapter(["default", "other"])
    return model


def two_colours_of_a_layer(model: PeftModel) -> Tensor:
    with model.session.shared.opened(Call(values={"colours": torch.tensor([0, 1])})):
        return model.get_base_model()(x())


def two_rows_of_a_layer(model: PeftModel) -> Tensor:
    model.session.let_rows_differ()
    with model.session.shared.opened(Call(("default", "default"))):
        return model(x())


def unloaded() -> PeftModel:
    model = adapted()
    model.unload()
    return model


def infinite() -> PeftModel:
    model = adapted()
    with torch.no_grad():
        model.get_base_model().second.narrow_A["default"].weight.fill_(torch.inf)
    return model


def plan_of(base: nn.Module, config: Any) -> Any:
    return compile_plan(snapshot(base), {"another": config})


def swap(model: PeftModel, state: dict[str, Tensor]) -> None:
    hotswap_adapter_from_state_dict(model, state, "default", narrow())


def split() -> nn.Module:
    model = LANGUAGE_MODEL.build()
    model._tp_size = 2
    return model


CASES = {
    "a name that is taken": Case(
        rules.ADAPTER_EXISTS, adapted, lambda m: m.add_adapter("default", narrow()),
        (apply, "if adapter.name in session.plans:", "if False:"), "Adapter with name 'default' already exists",
    ),
    "activating what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m.set_adapter("defualt"),
        (applied, "missing = [name for name in names if name not in self.plans]", "missing = []"), "Did you mean `default`?",
    ),
    "activating one of two that is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m.set_adapter(["default", "nobody"]),
        (applied, "missing = [name for name in names if name not in self.plans]", "missing = []"), "nobody does not exist",
    ),
    "deleting what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m.delete_adapter("nobody"),
        (succession, "    session.require(gone)\n", "    gone = []\n"), "nobody does not exist",
    ),
    "merging what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m.merge_adapter(["default", "nobody"]),
        (session, "        self.require(names)\n        if not names", "        if not names"), "nobody does not exist",
    ),
    "saving what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m.save_pretrained("nowhere", selected_adapters=["nobody"]),
        (runtime_model, "self.session.require(names)", "pass"), "nobody does not exist",
    ),
    "wrapping twice": Case(
        rules.MIXED_TYPES, adapted, lambda m: get_peft_model(m.get_base_model(), narrow(), "another"),
        (adapted_model, "if session_of(model) is not None:", "if False:"), "wrapping it again would nest them",
    ),
    "a second method": Case(
        rules.MIXED_TYPES, adapted, lambda m: apply_plan(m.get_base_model(), plan_of(Net(), stretch())),
        (apply, "if types - {adapter.peft_type} and not mixed:", "if False:"), "is adapted by NARROW; `STRETCH` cannot join",
    ),
    "a plan for wider layers": Case(
        rules.MODEL_DRIFTED, lambda: Net(7), lambda m: apply_plan(m, plan_of(Net(), narrow())),
        (drift, "if own is not None and own.shape != planned.shape and whole_shape(own) != planned.shape:", "if False:"), "`second.weight` is (6, 7)",
    ),
    "a plan for layers that are not there": Case(
        rules.MODEL_DRIFTED, lambda: nn.ModuleDict({"frist": nn.Linear(8, 8)}),
        lambda m: apply_plan(m, plan_of(Net(), narrow())),
        (session, "if problems:\n", "if not problems:\n"), "There is no module `second`",
    ),
    "converting to a method without thin factors": Case(
        rules.CANNOT_CONVERT, adapted, lambda m: convert_adapter(m, "STRETCH", 2),
        (conversion, "CANNOT_CONVERT(what, fix=f\"Convert", "WHILE_MERGED(what, fix=f\"Convert"), "STRETCH does not make adapters of thin factors",
    ),
    "converting to a rank that is too low": Case(
        rules.CONVERSION_LOSES, adapted, lambda m: convert_adapter(m, "NARROW", 1),
        (converting, "if made.error > _ROUNDING:", "if False:"), "The changes differ by",
    ),
    "merging twice": Case(
        rules.ALREADY_MERGED, merged, lambda m: m.merge_adapter(), (session, "if again:", "if False:"), "already merged, nothing to do: `default`, `other`",
    ),
    "unmerging what is not merged": Case(
        rules.NOT_MERGED, adapted, lambda m: m.unmerge_adapter(),
        (runtime_model, "if not self.session.merged:", "if False:"), "No adapter is merged",
    ),
    "the arguments the wrong way round": Case(
        rules.NOT_A_MODEL, adapted, lambda m: get_peft_model(narrow(), narrow()),
        (planning, "if not isinstance(model, nn.Module):", "if model is None:"), "is not a `torch.nn.Module`",
    ),
    "a merge that is not finite": Case(
        rules.MERGE_NOT_FINITE, infinite, lambda m: m.merge_adapter(safe_merge=True),
        (merged_weights, "logical(\"weight\", made)), check)", "logical(\"weight\", made)), False)"), "The adapter default seems to be broken",
    ),
    "a start without its data": Case(
        rules.START_DATA, adapted, lambda m: m.add_adapter("other", narrow(begin="told")),
        (starts, "    if lacking:", "    if False:"), "nothing was gathered for `first`",
    ),
    "a merge that fails half-way": Case(
        rules.MERGE_NOT_FINITE, infinite, lambda m: m.merge_and_unload(safe_merge=True),
        (merging, "keep_entries(self.merged_adapters, self._pristine, base._parameters, base._buffers)", "pass"), "The adapter default seems to be broken",
    ),
    "a model that was unloaded": Case(
        rules.NOT_ADAPTED, unloaded, lambda m: m.merge_adapter(),
        (adapted_model, "if session is None or (not session.plans", "if session is None or (False"), "has no adapter any more",
    ),
    "merging a prompt": Case(
        rules.CANNOT_MERGE, prompted, lambda m: m.merge_adapter(),
        (together, 'raise PeftcError(rules.CANNOT_MERGE("A prompt', 'repr(rules.CANNOT_MERGE("A prompt'), "A prompt changes the input",
    ),
    "unloading a merged prompt": Case(
        rules.CANNOT_MERGE, prompted, lambda m: m.merge_and_unload(),
        (together, 'raise PeftcError(rules.CANNOT_MERGE("A prompt', 'repr(rules.CANNOT_MERGE("A prompt'), "A prompt changes the input",
    ),
    "deleting what is merged": Case(
        rules.WHILE_MERGED, merged, lambda m: m.delete_adapter("default"),
        (succession, "if merged:", "if False:"), "Cannot delete adapter(s) ['default'] while they are merged",
    ),
    "loading over what is merged": Case(
        rules.WHILE_MERGED, merged, lambda m: m.load_adapter("nowhere", "other"),
        (files, "session.refuse_merged(name)", "pass"), "`other` is merged into the base weights",
    ),
    "deleting what is merged from one layer": Case(
        rules.WHILE_MERGED, merged, lambda m: m.get_base_model().first.delete_adapter("default"),
        (layer, "if adapter_name in self.merged_adapters:", "if False:"), "Call `unmerge_adapter()` first.",
    ),
    "a name with a dot": Case(
        rules.ADAPTER_NAME, Net, lambda m: get_peft_model(m, narrow(), "v1.2"),
        (apply, "if not is_usable(adapter.name):", "if False:"), "cannot be called `v1.2`",
    ),
    "a name that is a folder": Case(
        rules.ADAPTER_NAME, adapted, lambda m: m.add_adapter("../other", narrow()),
        (apply, "if not is_usable(adapter.name):", "if False:"), "cannot be called `../other`",
    ),
    "no name": Case(
        rules.ADAPTER_NAME, Net, lambda m: inject_adapter_in_model(narrow(), m, ""),
        (apply, "if not is_usable(adapter.name):", "if False:"), "cannot be called ``",
    ),
    "a name with a NUL": Case(
        rules.ADAPTER_NAME, Net, lambda m: get_peft_model(m, narrow(), "a\0b"),
        (apply, "not name.isprintable() or ", ""), r"cannot be called `a\x00b`",
    ),
    "half of a character as a name": Case(
        rules.ADAPTER_NAME, adapted, lambda m: m.add_adapter("\ud800", narrow()),
        (apply, "not name.isprintable() or ", ""), r"cannot be called `\ud800`",
    ),
    "a name that no folder can have": Case(
        rules.ADAPTER_NAME, adapted, lambda m: m.add_adapter("é" * 101, narrow()),
        (apply, "<= MAX_NAME", "<= 9999"), "Use up to 200 bytes",
    ),
    "a prompt of no usable name": Case(
        rules.ADAPTER_NAME, LANGUAGE_MODEL.build, lambda m: get_peft_model(m, preface(), "a\nb"),
        (apply, "if not is_usable(adapter.name):", "if False:"), r"cannot be called `a\nb`",
    ),
    "a base that is split by tensors": Case(
        rules.SPLIT_BASE, split, lambda m: inject_adapter_in_model(narrow(), m),
        (splits, "    if parts > 1 and not is_split(model):", "    if False:"), "are split between 2 processes",
    ),
    "combining what says no way": Case(
        rules.CANNOT_COMBINE, lambda: adapted(stretch(), other=stretch()),
        lambda m: m.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both"),
        (weighted, "elif not tuner.is_rankable and not tuner.is_combinable:", "elif False:"), "`STRETCH` says no way",
    ),
    "adding factors of other ranks": Case(
        rules.CANNOT_COMBINE, lambda: adapted(other=narrow(r=3)),
        lambda m: m.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "linear"),
        (weighted, "if len(set(ranks.values())) > 1:", "if False:"), "the ranks differ: `default` 2, `other` 3",
    ),
    "combining two trained copies": Case(
        rules.CANNOT_COMBINE, lambda: adapted(narrow(modules_to_save=["head"]), other=narrow(modules_to_save=["head"])),
        lambda m: m.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both"),
        (weighted, "if saved.count(path) > 1", "if False"), "`head` is trained whole",
    ),
    "a weight for nobody": Case(
        rules.CANNOT_COMBINE, adapted, lambda m: m.add_weighted_adapter(["default"], [1.0, 2.0], "both"),
        (weighted, "len(adapters) != len(weights)", "False"), "1 adapters and 2 weights",
    ),
    "combining under a name that is taken": Case(
        rules.ADAPTER_EXISTS, adapted, lambda m: m.add_weighted_adapter(["default"], [1.0], "default"),
        (apply, "Adapter with name '{name}' already exists", "There is one"), "Adapter with name 'default' already exists",
    ),
    "combining what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m.add_weighted_adapter(["defualt"], [1.0], "both"),
        (weighted, "session.require(adapters)", "pass"), "Did you mean `default`?",
    ),
    "swapping in modules that are not adapted": Case(
        rules.CANNOT_SWAP, adapted, lambda m: swap(m, {"head.narrow_A.weight": torch.ones(2, 6)}),
        (hotswap, "if strange:", "if False:"), "on modules that the adapter has not: `base_model.model.head.narrow_A.weight`",
    ),
    "swapping in half a layer": Case(
        rules.CANNOT_SWAP, adapted, lambda m: swap(m, {"first.narrow_A.weight": torch.ones(2, 8)}),
        (hotswap, "if lacking and (", "if False and ("), "`first` gets nothing for `base_model.model.first.narrow_B.weight`",
    ),
    "swapping in another rank than the config's": Case(
        rules.CANNOT_SWAP, adapted,
        lambda m: swap(m, {"first.narrow_A.weight": torch.ones(1, 8), "first.narrow_B.weight": torch.ones(8, 1)}),
        (hotswap, "if key in given and tuple(given[key].shape) != slot.shape:", "if False:"), "is (1, 8), by the config (2, 8)",
    ),
    "swapping where it is merged": Case(
        rules.WHILE_MERGED, merged, lambda m: swap(m, {}),
        (hotswap, "session.refuse_merged(adapter_name)", "pass"), "`default` is merged",
    ),
    "swapping what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: hotswap_adapter_from_state_dict(m, {}, "nobody", narrow()),
        (hotswap, "session.require([adapter_name])\n    session.refuse", "session.refuse"), "nobody does not exist",
    ),
    "preparing a compiled model": Case(
        rules.COMPILED_ALREADY, lambda: torch.compile(adapted(), backend="eager"), prepare_model_for_compiled_hotswap,
        (hotswap, 'if check == "error":', "if False:"), "is compiled already",
    ),
    "preparing for too small a rank": Case(
        rules.CANNOT_SWAP, adapted, lambda m: prepare_model_for_compiled_hotswap(m, target_rank=1),
        (hotswap, "if old > new]", "if False]"), "target rank 1, but the original rank is larger",
    ),
    "a state dict of other modules than the config's": Case(
        rules.GIVEN_TARGETS, Net, lambda m: inject_adapter_in_model(narrow(), Net(), state_dict={"first.narrow_A.weight": x()}),
        (select, "if found and (only_config or only_given):", "if False:"), "only the config has `second`",
    ),
    "a state dict of another model": Case(
        rules.NO_MATCH, Net, lambda m: inject_adapter_in_model(narrow(), m, state_dict={"frist.narrow_A.weight": x()}),
        (select, "Severity.WARNING if found else Severity.ERROR", "Severity.WARNING"), "Did you mean `first`?",
    ),
    "loading into a model without adapters": Case(
        rules.NOT_ADAPTED, Net, lambda m: set_peft_model_state_dict(m, {}),
        (injected, "if session is None:\n        what", "if False:\n        what"), "This Net has no adapter",
    ),
    "loading into what is merged": Case(
        rules.WHILE_MERGED, merged, lambda m: set_peft_model_state_dict(m, {}),
        (state, "session.refuse_merged(adapter_name)", "pass"), "`default` is merged",
    ),
    "loading into what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: set_peft_model_state_dict(m, {}, "nobody"),
        (state, "    session.require([adapter_name])\n    session.refuse", "    session.refuse"), "nobody does not exist",
    ),
    "other base weights under what is merged": Case(
        rules.WHILE_MERGED, merged, lambda m: set_base_model_state_dict(m, get_base_model_state_dict(m)),
        (base_state, "session.refuse_merged(adapter)", "pass"), "`default` is merged",
    ),
    "a merge that would change the order": Case(
        rules.MERGE_ORDER, nested, lambda m: m.merge_adapter(["other"]),
        (merging, "if not below or all(", "if True or all("), "Merging `other` alone would change places with `default`",
    ),
    "fewer names than rows": Case(
        rules.ROWS_DIFFER, adapted, lambda m: m(x(), adapter_names=["default"]),
        (rows, "if rows is not None and rows != len(names):", "if False:"), "1 adapter names, but the batch has 5 rows",
    ),
    "fewer names than rows, as a layer sees it": Case(
        rules.ROWS_DIFFER, adapted, two_rows_of_a_layer,
        (call, "if times not in (1, self.expand) or times * len(self.adapters) != count:", "if False:"), "2 adapter names, but a layer gets 5 rows",
    ),
    "a value by row that is missing": Case(
        rules.ROW_VALUES, lambda: adapted(tint()), lambda m: m(x()),
        (views, "if default is None:", "if False:"), "`default` reads `colours`, which the call does not give",
    ),
    "fewer values than rows": Case(
        rules.ROW_VALUES, lambda: adapted(tint()), lambda m: m(x(), colours=[0, 1]),
        (values, "if rows is not None and value.shape[0] != rows:", "if False:"), "`colours` has 2 values, but the batch has 5 rows",
    ),
    "fewer values than rows, as a layer sees it": Case(
        rules.ROW_VALUES, lambda: adapted(tint()), two_colours_of_a_layer,
        (call, "if times not in (1, self.expand) or times * given.shape[0] != count:", "if False:"), "`colours` has 2 values, but a layer gets 5 rows",
    ),
    "values that are no whole numbers": Case(
        rules.ROW_VALUES, lambda: adapted(tint()), lambda m: m(x(), colours=[0.5] * 5),
        (values, "found.is_floating_point()", "False"), "`colours` is not a list of whole numbers",
    ),
    "a value that the method refuses": Case(
        rules.ROW_VALUES, lambda: adapted(tint()), lambda m: m(x(), colours=[0, 1, 2, 3, 0]),
        (values, "if tuner is not None:", "if False:"), "There is no such colour",
    ),
    "a value that nothing reads": Case(
        rules.ROW_VALUES, lambda: adapted(tint()), lambda m: row_values(m, hues=[0] * 5).__enter__(),
        (assistance, "if given:", "if False:"), "No adapter of the model reads `hues`",
    ),
    "a call that goes on from a cache": Case(
        rules.CALL_AROUND, lambda: adapted(mix(narrow())), lambda m: m(x(), past_key_values=[1]),
        (calls, "if caches.of_call(kwargs) is not None:", "if False:"), "The call has a cache",
    ),
    "an adapter that cannot be weighed": Case(
        rules.CANNOT_GATE, Net, lambda m: get_peft_model(m, mix(narrow(), stretch())),
        (compiler_calls, 'if not given & {"thin", "rescaled", "branch"} or', "if"), "cannot be weighed by token",
    ),
    "names that are none": Case(
        rules.ROWS_DIFFER, adapted, lambda m: m(x(), adapter_names="defau"),
        (rows, "if isinstance(names, str) or not all(", "if not all("), "not a list of names",
    ),
    "a row for what is not there": Case(
        rules.ADAPTER_UNKNOWN, adapted, lambda m: m(x(), adapter_names=["defualt", "default", "__base__", "default", "default"]),
        (rows, "for name in dict.fromkeys(names) if name != BASE)", "for name in ())"), "Did you mean `default`?",
    ),
    "rows while merged": Case(
        rules.WHILE_MERGED, merged, lambda m: m(x(), adapter_names=["other"] * 5),
        (rows, "if session.merged and", "if False and"), "Merged adapters act on every row: `default`, `other`",
    ),
    "rows beside trained biases": Case(
        rules.CALL_NOT_POSSIBLE, lambda: adapted(narrow(bias="all")), lambda m: m(x(), adapter_names=["default", *["__base__"] * 4]),
        (rows, "if plan.trains and set", "if False and set"), "`default` trains biases of the base model",
    ),
    "rows with a prompt": Case(
        rules.CALL_NOT_POSSIBLE, prompted, lambda m: m(**LANGUAGE_MODEL.arguments(), adapter_names=["default"] * 2),
        (rows, "if acts and not plan.nests:", "if False:"), "adapts the whole call",
    ),
    "a prompt that is to be mixed": Case(
        rules.CANNOT_MIX, nested, lambda m: get_peft_model(LANGUAGE_MODEL.build(), preface(), mixed=True),
        (mixed, "if not adapter.nests]", "if False]"), "`PREFACE` adapts more than single layers",
    ),
    "a prompt that is to join": Case(
        rules.CANNOT_MIX, lambda: get_peft_model(LANGUAGE_MODEL.build(), narrow(target_modules="all-linear"), mixed=True),
        lambda m: m.add_adapter("other", preface()),
        (compiling, "for plan in plans if not plan.nests]", "for plan in ()]"), "`PREFACE` adapts more than single layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_and_nothing_changes(case: Case) -> None:
    assert failure(case) == ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_case_fails_under_a_defect(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, *case.defect)
    assert failure(case) != ""


def test_every_rule_of_the_runtime_is_here_or_beside() -> None:
    folders = (Path(__file__).parent, Path(__file__).parent.parent / "e2e")
    files = (
        path.read_text(encoding="utf-8")
        for folder in folders
        for path in folder.glob("test_*.py")
        if path.name != Path(__file__).name
    )
    beside = "".join(text for text in files if "put_defect(" in text)
    known = {n: rule for n, rule in vars(rules).items() if isinstance(rule, Rule) and rule.code.startswith("PC5")}
    here = {case.rule.code for case in CASES.values()}
    assert [n for n, rule in known.items() if rule.code not in here and f"rules.{n}" not in beside] == []


def test_a_model_goes_on_working_after_refusals() -> None:
    model = adapted(other=narrow())
    before = model(x())
    for ask in (
        lambda: model.set_adapter("nobody"),
        lambda: model.add_adapter("other", narrow()),
        lambda: model.add_adapter("third", stretch()),
    ):
        assert told(ask)
    assert torch.equal(model(x()), before)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
