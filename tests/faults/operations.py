"""Operations on models, each with the state that it begins in; over all methods, as far as they have the operation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peftc import (
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peftc.config.mixins import ModulesToSaveMixin
from peftc.diagnostics import PeftcError
from peftc.model.functions.assistance import delete_adapter, take_step
from peftc.model.functions.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peftc.registry.manager import default_registry
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.runtime.prompt.encoder import PromptModule
from peftc.testing.subjects import Subject, quiet, randomise, subjects

#: All operations, for tests that are split by them.
NAMES = (
    "get_peft_model",
    "from_pretrained",
    "inject",
    "inject, over one",
    "add_adapter",
    "load_adapter, a new one",
    "load_adapter, over one",
    "load_adapter, in place of one",
    "load values",
    "set_adapter",
    "set_requires_grad",
    "delete_adapter",
    "delete_adapter, the active one",
    "delete_adapter, the last one",
    "disable",
    "enable",
    "rows",
    "unload",
    "load a table",
    "merge_adapter",
    "merge_and_unload",
    "unmerge_adapter",
    "disable, merged",
    "enable, merged",
    "unload, merged",
    "set_adapter, merged",
    "add_weighted_adapter",
    "hotswap",
    "prepare hotswap",
    "scale",
    "take_step",
)


@dataclass(frozen=True)
class Operation:
    """What is done, and on what."""

    name: str
    begin: Callable[[], Any]
    act: Callable[[Any], object]

    def __str__(self) -> str:
        return self.name


@cache
def subject(peft_type: str) -> Subject:
    """The method on its first model; of language models, on the smallest."""
    found = [s for s in subjects(default_registry().get(peft_type)) if s.first]
    first = next(s for s in found if s.foremost)
    return min(found, key=lambda s: len(s.model.graph.nodes)) if first.model.is_language_model else first


class Case:
    """A method's models for operations, with files of its adapters."""

    def __init__(self, peft_type: str) -> None:
        self.subject = s = subject(peft_type)
        self.method = s.method
        self.changes: dict[str, Any] = {}
        copied = [name for name, module in s.build().named_children() if name == "norm"]
        if issubclass(self.method.config, ModulesToSaveMixin) and copied:
            self.changes["modules_to_save"] = copied
        self._root = tempfile.TemporaryDirectory()
        self.folder = Path(self._root.name)
        with quiet():
            self.one("x").save_pretrained(self.folder)

    def config(self, **changes: Any) -> Any:
        return self.subject.config(**{**self.changes, **changes})

    def one(self, name: str = "default", **changes: Any) -> PeftModel:
        return self.subject.trained(name, **{**self.changes, **changes})

    def two(self) -> PeftModel:
        model = self.one()
        with quiet():
            model.add_adapter("other", self.config())
        randomise(model, "other")
        return model

    def without_copies(self) -> PeftModel:
        """Two adapters without modules that both train whole."""
        model = self.subject.trained()
        self.subject.join(model, "other")
        return model

    def asked(self) -> PeftModel:
        """A model whose table was asked for before: slots are where they may be."""
        model = self.one()
        table(model)
        return model

    def merged(self) -> PeftModel:
        model = self.one()
        model.merge_adapter()
        return model

    def other_shapes(self) -> Path | None:
        """An adapter that cannot be loaded into the tensors of the first one."""
        s, place = self.subject, self.folder / "shapes"
        fields, changes = self.method.config.model_fields, {}
        if "num_virtual_tokens" in fields:
            changes = {"num_virtual_tokens": s.options.get("num_virtual_tokens", 4) + 1}
        elif s.targets and len(s.targets) > 1:
            changes = {"target_modules": list(s.targets[:-1])}
        if not changes:
            return None
        if not place.is_dir():
            try:
                with quiet():
                    self.one("default", **changes).save_pretrained(place)
            except PeftcError:  # an option that others depend on
                return None
        return place

    def grown(self) -> PeftModel:
        """A model after a backward pass."""
        model = self.one()
        self.subject.grown(model)
        return model


@cache
def operations_of(peft_type: str) -> tuple[Operation, ...]:
    """Those of a method; its files are written once in a process."""
    return tuple(operations(Case(peft_type)))


def operations(case: Case) -> Iterator[Operation]:
    """Those that the method has, whether or not it refuses them."""
    s, place = case.subject, case.folder / "x"
    yield Operation("get_peft_model", s.build, lambda m: get_peft_model(m, case.config()))
    yield Operation("from_pretrained", s.build, lambda m: PeftModel.from_pretrained(m, place))
    yield Operation("inject", s.build, lambda m: inject_adapter_in_model(case.config(), m))
    yield Operation("inject, over one", case.one, lambda m: inject_adapter_in_model(case.config(), m))
    yield Operation("add_adapter", case.one, lambda m: m.add_adapter("new", case.config()))
    yield Operation("load_adapter, a new one", case.one, lambda m: m.load_adapter(place, "new"))
    yield Operation("load_adapter, over one", case.two, lambda m: m.load_adapter(place, "other"))
    shapes = case.other_shapes()
    if shapes is not None:
        yield Operation("load_adapter, in place of one", case.one, lambda m: m.load_adapter(shapes, "default"))
    yield Operation("load values", case.one, lambda m: set_peft_model_state_dict(m, values(place)))
    yield Operation("set_adapter", case.two, lambda m: m.set_adapter("other"))
    yield Operation("set_requires_grad", case.two, lambda m: m.set_requires_grad("other"))
    yield Operation("delete_adapter", case.two, lambda m: m.delete_adapter("other"))
    yield Operation("delete_adapter, the active one", case.two, lambda m: delete_adapter(m, "default"))
    yield Operation("delete_adapter, the last one", case.one, lambda m: m.delete_adapter("default"))
    yield Operation("disable", case.two, lambda m: m.session.enable(False))
    yield Operation("enable", lambda: switched_off(case.two()), lambda m: m.session.enable(True))
    yield Operation("rows", case.two, lambda m: m.session.let_rows_differ())
    yield Operation("unload", case.two, lambda m: m.unload())
    if isinstance(case.one().base_model, TunerModel):
        yield from _on_layers(case)
    if case.method.is_prompt:
        yield Operation("load a table", case.asked, lambda m: encoder(m).load_prompt_embeddings(table(m)))


def _on_layers(case: Case) -> Iterator[Operation]:
    place = case.folder / "x"
    yield Operation("merge_adapter", case.one, lambda m: m.merge_adapter(safe_merge=True))
    yield Operation("merge_and_unload", case.one, lambda m: m.merge_and_unload())
    if case.subject.merges:
        yield Operation("unmerge_adapter", case.merged, lambda m: m.unmerge_adapter())
        yield Operation("disable, merged", case.merged, lambda m: m.session.enable(False))
        yield Operation("enable, merged", lambda: switched_off(case.merged()), lambda m: m.session.enable(True))
        yield Operation("unload, merged", case.merged, lambda m: m.unload())
        yield Operation(
            "set_adapter, merged", lambda: _with_other(case.merged(), case), lambda m: m.set_adapter("other")
        )
    pair = ["default", "other"]
    weigh = lambda m: m.base_model.add_weighted_adapter(pair, [0.5, 0.5], "both")  # noqa: E731
    yield Operation("add_weighted_adapter", case.without_copies, weigh)
    yield Operation("hotswap", case.one, lambda m: hotswap_adapter(m, place, "default"))
    yield Operation("prepare hotswap", case.one, lambda m: prepare_model_for_compiled_hotswap(m, target_rank=16))
    if case.subject.targets:
        yield Operation("scale", case.one, lambda m: next(m.session.wrappers()).scale_layer(2.0))
    yield Operation("take_step", case.grown, lambda m: take_step(m, 1))


def switched_off(model: PeftModel) -> PeftModel:
    model.session.enable(False)
    return model


def _with_other(model: PeftModel, case: Case) -> PeftModel:
    with quiet():
        model.add_adapter("other", case.config())
    return model


def values(place: Path) -> dict[str, torch.Tensor]:
    return load_peft_weights(place, device="cpu")


def encoder(model: PeftModel) -> PromptModule:
    found = (model.prompt_encoder or {})["default"]
    assert isinstance(found, PromptModule)
    return found


def table(model: PeftModel) -> torch.Tensor:
    return model.get_prompt_embedding_to_save("default")
