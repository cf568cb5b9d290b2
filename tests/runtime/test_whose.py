"""Whose an error is, at every seam between the core and a plugin: what a method's function raises is the plugin's, told with
its function and line; what peftc raises while it works for the function is not.

The seams are read off the source, so that a new one is held too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peftc import PeftcError, PeftModel, convert_adapter, get_peft_config, get_peft_model, rules
from peftc.checkpoint.former import Joint, Share
from peftc.checkpoint.former_layout import _Writer
from peftc.config.base import ConfigModel
from peftc.config.sections import TrainSection
from peftc.diagnostics import Diagnostic
from peftc.graph.files import graph_from_text
from peftc.graph.former import FormerLayers
from peftc.integrations.transformers.data import Encoded
from peftc.integrations.transformers.jobs import _prepared
from peftc.integrations.transformers.optimizing import optimizing
from peftc.plugin import (
    TunerMethod,
    derived_slot,
    model_validator,
    register_plugin,
    register_storage,
    unregister_plugin,
    unregister_storage,
)
from peftc.registry import boundary
from peftc.registry.boundary import guarded
from peftc.registry.optimizers import ChosenOptimizer
from peftc.runtime.applying.planning import plan_for
from peftc.runtime.session.steps import schedule_problems
from peftc.runtime.session.stored import restored
from peftc.tuner.maps import LOWERINGS, SEAMS
from peftc.tuner.optimizer import NamedOptimizer
from tests.architecture.tree import sources
from tests.defects import put_defect
from tests.mutation.sound import SOUND_AROUND
from tests.runtime import methods
from tests.runtime.methods import (
    LANGUAGE_MODEL,
    METHODS,
    MixTuner,
    NarrowConfig,
    NarrowTuner,
    Net,
    SharedTuner,
    StretchTuner,
    TintTuner,
    adapted,
    mix,
    narrow,
    prompted,
    stretch,
    tint,
    x,
)
from tests.runtime.storages import RoundedStorage, packed

Patch = pytest.MonkeyPatch
HERE = Path(__file__).name


@dataclass(frozen=True)
class Seam:
    """A function of a class or record that is replaced, and what is done so that the core calls it: in two steps, as the
    model may have to be made before it fails."""

    name: str
    owner: Any
    act: Callable[[Any], object]
    given: Callable[[], Any] = lambda: None
    #: what else has to be so that the core calls it
    also: Callable[[Patch], object] = lambda patch: None

    def __str__(self) -> str:
        owner = self.owner if isinstance(self.owner, type) else type(self.owner)
        return f"{owner.__name__}.{self.name}"


RECORD = next(method for method in METHODS if method.peft_type == "NARROW")


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(Net(), folder)


def lacking_one(folder: Path) -> Path:
    """A folder of an adapter whose file lacks a tensor."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def ids() -> dict[str, Any]:
    return {"input_ids": torch.arange(6).view(2, 3)}


def stepped(model: PeftModel) -> object:
    model(x()).sum().backward()
    return model.base_model.take_step(1)


class Scored(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(loss=super().forward(x).sum())


def restore_larger(model: PeftModel) -> object:
    """Values of a file whose slots are larger than the model's."""
    source = plan_for(Net(), {"default": narrow(r=3)}).adapters[0]
    keys = [site.key(slot, "default").disk() for site, slot in source.slots()]
    return restored(model.session, source, dict.fromkeys(keys, torch.zeros(1)))


def joined(given: object) -> object:
    site = plan_for(Net(), {"default": narrow()}).adapters[0].maps[0]
    return Joint(site, NarrowTuner(), ((Share("was", {"narrow_A": "key"}, 1.0),),)).made("narrow_A", {"key": x()})


def parted(given: object) -> object:
    plan = plan_for(Net(), {"default": narrow()})
    site = replace(plan.adapters[0].maps[0], parameter="weight")
    tensors = {site.key(slot, "default").disk(): x() for slot in site.slots}
    graph = adapted().session.graph
    return _Writer(plan.adapters[0], graph).take(site, tensors)


def has_lowering(name: str) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(NarrowTuner, "lowerings", frozenset({name}))


def has_seam(name: str) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(NarrowTuner, "seams", frozenset({name}))


def has_derived(patch: Patch) -> None:
    own = NarrowTuner.slots
    patch.setattr(NarrowTuner, "slots", lambda *given: [*own(*given), derived_slot("narrow_d", (2,))])


def was_former(patch: Patch) -> None:
    patch.setattr(_Writer, "_former", lambda *given: FormerLayers("first", "weight", ("a.0.b",)))
    patch.setattr(TunerMethod, "chosen_for", lambda method, *given: method.tuner)


def on_layers(name: str, act: Callable[[Any], object] | None = None, **options: Any) -> Seam:
    return Seam(name, NarrowTuner, act or (lambda given: adapted(narrow())), **options)


def of_prompts(name: str, act: Callable[[Any], object] | None = None, **options: Any) -> Seam:
    owner = options.pop("owner", methods.PrefaceTuner)
    return Seam(name, owner, act or (lambda given: prompted()), **options)


def called(model: PeftModel) -> object:
    return model(**ids())


LAYERS = (
    *(on_layers(name) for name in ("slots", "declare", "check", "scaling", "dropout", "init", "settle")),
    on_layers("derive", also=has_derived),
    *(on_layers(name, lambda given: adapted()(x()), also=has_lowering(name)) for name in LOWERINGS),
    on_layers("of_rank", lambda m: convert_adapter(m, "NARROW", 1), given=adapted),
    on_layers("of_thin", lambda m: convert_adapter(m, "NARROW", 1), given=adapted),
    Seam(
        "combine",
        StretchTuner,
        lambda m: m.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", "linear"),
        lambda: adapted(stretch(), b=stretch()),
    ),
    on_layers("begins", lambda given: adapted()(x()), also=has_seam("begins")),
    on_layers("on_step", lambda given: stepped(adapted()), also=has_seam("on_step")),
    on_layers("schedule", lambda given: list(schedule_problems(adapted().session, 3)), also=has_seam("on_step")),
    on_layers("loss", lambda given: get_peft_model(Scored(), narrow()).train()(x()), also=has_seam("loss")),
    on_layers("export", lambda given: adapted().adapter_tensors("default"), also=has_seam("export")),
    on_layers("restore", lambda given: restore_larger(adapted()), also=has_seam("restore")),
    on_layers("clash", lambda m: m.base_model.set_adapter(["default", "b"]), given=lambda: adapted(b=narrow())),
    on_layers("joined", joined),
    on_layers("parted", parted, also=was_former),
    Seam("check_call", TintTuner, lambda m: m(x(), colours=[0] * 5), lambda: adapted(tint())),
)
MODULES = tuple(
    Seam(name, type(SOUND_AROUND.tuner), lambda given: get_peft_model(LANGUAGE_MODEL.build(), SOUND_AROUND.config()))
    for name in ("resolve", "sites", "slots", "init")
)
PROMPTS = (
    *(of_prompts(name) for name in ("slots", "extra", "init")),
    of_prompts("encoded", lambda given: prompted(inference_mode=True)),
    *(of_prompts(name, called, given=prompted) for name in ("embeds", "constrain", "tasks")),
    of_prompts(
        "of_tasks", lambda m: m(**ids(), task_ids=[0, 1]), given=lambda: prompted(kind="SHARED"), owner=SharedTuner
    ),
    *(of_prompts(name, lambda m: m(**ids(), labels=ids()["input_ids"]), given=prompted) for name in ("labels", "loss")),
    of_prompts("export", lambda m: m.adapter_tensors("default"), given=prompted),
    of_prompts(
        "restore",
        lambda m: m.prompt_encoder["default"].load_prompt_embeddings(torch.zeros(3, m.active_peft_config.token_dim)),
        given=prompted,
    ),
)
CALLS = tuple(
    Seam(name, MixTuner, lambda config: get_peft_model(Net(), config), lambda: mix(narrow()))
    for name in ("resolve", "check", "needs", "trains_needed", "slots", "init")
)


def failing(name: str, how: Callable[[], object]) -> Callable[..., Any]:
    def fail(*given: object, **named: object) -> Any:
        how()

    fail.__name__ = name
    return fail


def of_the_method() -> object:
    raise ZeroDivisionError("on purpose")


def of_the_core() -> object:
    return graph_from_text(None)  # type: ignore[arg-type]


def told(act: Callable[[], object]) -> Diagnostic:
    with pytest.raises(PeftcError) as caught:
        act()
    (problem, *_) = caught.value.diagnostics
    return problem


def around(seam: Seam, patch: Patch, how: Callable[[], object]) -> Diagnostic:
    if seam.owner is type(SOUND_AROUND.tuner):
        register_plugin(SOUND_AROUND)
    try:
        given = seam.given()
        seam.also(patch)
        patch.setattr(seam.owner, seam.name, failing(seam.name, how))
        return told(lambda: seam.act(given))
    finally:
        if seam.owner is type(SOUND_AROUND.tuner):
            unregister_plugin(SOUND_AROUND)


def assert_of_plugin(problem: Diagnostic, name: str) -> None:
    assert problem.code == rules.PLUGIN_RAISED.code, str(problem)
    assert f"`{name}` of " in problem.what and "raised ZeroDivisionError: on purpose" in problem.what
    assert f'{HERE}:{of_the_method.__code__.co_firstlineno + 1}: raise ZeroDivisionError("on purpose")' in problem.fix


def assert_of_core(problem: Diagnostic, name: str) -> None:
    assert problem.code == rules.CORE_RAISED.code, str(problem)
    assert f"Around `{name}` of " in problem.what
    assert "files.py:" in problem.fix and f"called from {Path(__file__)}" in problem.fix
    assert "plugin's authors" not in problem.fix


STARTS = (
    *(
        Seam(name, owner, lambda given: adapted(narrow(begin="late")))
        for name, owner in (
            ("factors", methods.Late),
            ("changed", methods.Late),
            ("check", methods.Late),
            ("check_layer", methods.Late),
            ("before_start", NarrowTuner),
        )
    ),
    Seam("prepare", methods.Told, lambda given: prepared(narrow(begin="told"))),
    Seam(
        "of_twice",
        NarrowTuner,
        lambda m: m.save_pretrained("nowhere", path_initial_model_for_weight_conversion=True),
        lambda: adapted(narrow(begin="late")),
    ),
)


def prepared(config: NarrowConfig) -> object:
    rows = [Encoded((1, 2), (1, 2))]
    return _prepared(SimpleNamespace(model=LANGUAGE_MODEL.build(), pad=0), config, rows, 1)  # type: ignore[arg-type]


EACH = pytest.mark.parametrize("seam", (*LAYERS, *MODULES, *PROMPTS, *CALLS, *STARTS), ids=str)


@EACH
def test_what_a_method_raises_is_told_with_its_function_and_line(seam: Seam, monkeypatch: Patch) -> None:
    assert_of_plugin(around(seam, monkeypatch, of_the_method), seam.name)


@EACH
def test_what_peftc_raises_for_a_method_is_not_the_methods(seam: Seam, monkeypatch: Patch) -> None:
    assert_of_core(around(seam, monkeypatch, of_the_core), seam.name)


# what is not a tuner's ---------------------------------------------------------------------------------------------------


class PickyConfig(NarrowConfig):
    """Options that fail while they are checked."""

    @model_validator(mode="after")
    def _fails(self) -> Any:
        HOW["how"]()
        return self


HOW: dict[str, Callable[[], object]] = {"how": lambda: None}


def changed(how: Callable[[], object], *names: str) -> TunerMethod:
    """The record with functions that fail."""
    return replace(RECORD, **{name: failing(name, how) for name in names})


def of_record(name: str, how: Callable[[], object]) -> Diagnostic:
    register_plugin(changed(how, "tuner" if name == "tuner_for" else name))
    return told(adapted)


def of_start(folder: Path, how: Callable[[], object]) -> Diagnostic:
    lacking_one(saved(adapted(), folder))
    register_plugin(changed(how, "check_start"))
    return told(lambda: loaded(folder))


def of_fitted(folder: Path, how: Callable[[], object], patch: Patch) -> Diagnostic:
    saved(adapted(), folder)
    has_seam("fitted")(patch)
    patch.setattr(NarrowTuner, "fitted", failing("fitted", how))
    return told(lambda: loaded(folder))


def of_restore(folder: Path, how: Callable[[], object], patch: Patch) -> Diagnostic:
    saved(prompted(), folder)
    patch.setattr(methods.PrefaceTuner, "restore", failing("restore", how))
    return told(lambda: PeftModel.from_pretrained(LANGUAGE_MODEL.build(), folder))


def of_options(how: Callable[[], object], patch: Patch) -> Diagnostic:
    register_plugin(replace(RECORD, config=PickyConfig))
    patch.setitem(HOW, "how", how)
    return told(lambda: get_peft_config({"peft_type": "NARROW"}))


def of_optimizer(how: Callable[[], object]) -> Diagnostic:
    record = NamedOptimizer("theirs", "Theirs", ConfigModel, make=failing("make", how))
    return told(lambda: optimizing(ChosenOptimizer(record, ConfigModel()), adapted(), TrainSection(data="rows.jsonl")))


def others(folder: Path, patch: Patch) -> dict[str, Callable[[Callable[[], object]], Diagnostic]]:
    return {
        **{name: lambda how, name=name: of_record(name, how) for name in ("check", "resolve", "tuner_for")},
        "check_start": lambda how: of_start(folder, how),
        "fitted": lambda how: of_fitted(folder, how, patch),
        "restore": lambda how: of_restore(folder, how, patch),
        "options": lambda how: of_options(how, patch),
        "make": of_optimizer,
    }


OTHERS = ("check", "resolve", "tuner_for", "check_start", "fitted", "restore", "options", "make")
EACH_OTHER = pytest.mark.parametrize("name", OTHERS)


@EACH_OTHER
def test_so_is_what_the_record_the_options_and_reading_a_file_raise(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    assert_of_plugin(others(tmp_path, monkeypatch)[name](of_the_method), name)


@EACH_OTHER
def test_and_what_peftc_raises_for_those_is_not_theirs(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    assert_of_core(others(tmp_path, monkeypatch)[name](of_the_core), name)


def seams_in_source() -> set[str]:
    """Names of the functions that the core calls by a boundary; those that are made up are not among them."""
    found: set[str] = set()
    for source in sources("peftc"):
        if source.module.startswith(("peftc.testing", "peftc.cli")) or source.module == "peftc.registry.boundary":
            continue
        for node in ast.walk(source.ast):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            if node.func.id == "boundary" and isinstance(node.args[1], ast.Constant):
                found.add(str(node.args[1].value))
            elif node.func.id in ("guarded", "call") and isinstance(node.args[0], ast.Attribute):
                found.add(node.args[0].attr)
    return found


def test_every_seam_is_held() -> None:
    held = {seam.name for seam in (*LAYERS, *MODULES, *PROMPTS, *CALLS, *STARTS)} | {*OTHERS, *OF_STORAGES}
    assert seams_in_source() <= held
    assert {*LOWERINGS, *SEAMS, "combine", "encoded"} <= held


OF_STORAGES = ("facts", "settings", "open", "pack")


@pytest.mark.parametrize("name", OF_STORAGES)
def test_so_is_what_a_storage_raises(name: str, monkeypatch: Patch) -> None:
    record = RoundedStorage()
    register_storage(record)
    try:
        for how, check in ((of_the_method, assert_of_plugin), (of_the_core, assert_of_core)):
            model, base = get_peft_model(packed(Net()), narrow()), packed(Net())
            monkeypatch.setattr(RoundedStorage, name, failing(name, how))
            check(
                told(
                    model.merge_adapter
                    if name in ("open", "pack")
                    else lambda base=base: get_peft_model(base, narrow())
                ),
                name,
            )
            monkeypatch.undo()
    finally:
        unregister_storage(record)


# cases of their own ------------------------------------------------------------------------------------------------------


def test_a_slot_that_is_not_declared_is_the_methods_own_mistake(monkeypatch: Patch) -> None:
    for read in (lambda a: a.narrow_C, lambda a: a["narrow_C"]):
        monkeypatch.setattr(NarrowTuner, "thin", lambda tuner, a, read=read: read(a))
        problem = told(lambda: adapted()(x()))
        assert problem.code == rules.PLUGIN_RAISED.code
        assert "no slot `narrow_C`; there are ['narrow_A', 'narrow_B']" in problem.what
        assert HERE in problem.fix


@pytest.mark.parametrize("name", ["slots", "check", "declare"])
@pytest.mark.parametrize("how", [lambda self: None, lambda self, *given: None], ids=["arguments", "answer"])
def test_a_function_that_takes_or_gives_something_else_breaks_the_contract(
    name: str, how: Callable[..., None], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(NarrowTuner, name, how)
    problem = told(adapted)
    assert problem.code == rules.PLUGIN_INVALID.code
    assert f"`{name}` of NARROW takes other arguments, or gives something else, than it should" in problem.what


def test_a_lowering_of_other_arguments_breaks_the_contract(monkeypatch: Patch) -> None:
    monkeypatch.setattr(NarrowTuner, "thin", lambda self: None)
    assert told(lambda: adapted()(x())).code == rules.PLUGIN_INVALID.code


def test_peftc_failing_by_itself_beside_a_function_is_not_the_plugins() -> None:
    problem = told(lambda: guarded(graph_from_text, "FAKE", "layer")(None))  # type: ignore[arg-type]
    assert problem.code == rules.CORE_RAISED.code and "plugin" not in problem.fix


def test_a_library_that_a_method_calls_fails_for_the_method(monkeypatch: Patch) -> None:
    monkeypatch.setattr(NarrowTuner, "thin", lambda self, a: nn.functional.linear(a.narrow_A, torch.ones(3, 99)))
    problem = told(lambda: adapted()(x()))
    assert problem.code == rules.PLUGIN_RAISED.code and f"{HERE}:" in problem.fix


@pytest.mark.parametrize(
    ("part", "instead", "test", "seam"),
    [
        ('_Owner.CORE if package == "peftc" else', "", test_what_peftc_raises_for_a_method_is_not_the_methods, "thin"),
        ("not ours or ours[-1].owner is _Owner.PLUGIN or", "", test_what_a_method_raises_is_told_with_its_function_and_line, "slots"),
    ],
)  # fmt: skip
def test_these_tests_can_fail(
    part: str, instead: str, test: Callable[[Seam, Patch], None], seam: str, monkeypatch: Patch
) -> None:
    put_defect(monkeypatch, boundary, part, instead)
    with pytest.raises((AssertionError, IndexError)):
        test(next(one for one in LAYERS if one.name == seam), monkeypatch)
