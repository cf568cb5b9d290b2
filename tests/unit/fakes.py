"""A method of no use, for tests of documents and of the registry that must not depend on a real one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

from peftc.plugin import (
    LINEAR_KINDS,
    ConfigModel,
    Diagnostic,
    Field,
    LayerFacts,
    MapTuner,
    PeftConfig,
    PeftType,
    RankMixin,
    Slot,
    TargetsMixin,
    TunerMethod,
    View,
    hookimpl,
    parameter_slot,
    rules,
)
from peftc.registry.manager import Claim, Registry, default_registry


class Inner(ConfigModel):
    """A nested section."""

    depth: int = Field(default=1, ge=1)
    """How deep."""


class FakeConfig(TargetsMixin, RankMixin, PeftConfig):
    """Options of every form."""

    peft_type: PeftType | None = PeftType("FAKE")
    mode: Literal["one", "two"] = "one"
    """One of two."""
    rate: float = Field(default=0.0, ge=0, lt=1)
    """A share."""
    pattern: dict[str, int] = Field(default_factory=dict)
    """A map."""
    inner: Inner | None = None
    """A section."""
    runtime: Any = Field(default=None, exclude=True)
    """In Python only."""


class FakeTuner(MapTuner[FakeConfig]):
    """One vector that does nothing."""

    supports = LINEAR_KINDS

    def slots(self, c: FakeConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("fake_v", (layer.in_features,))

    def init(self, c: FakeConfig, layer: LayerFacts, slots: Mapping[str, Any], init: Any) -> None:
        init.ones(slots["fake_v"])

    def input(self, a: View, x: Any) -> Any:
        return x * a.fake_v


def check(c: FakeConfig) -> Iterable[Diagnostic]:
    """A combination that the method refuses, and one that makes its code fail."""
    if c.mode == "two" and c.rate:
        yield rules.CONTRADICTION("`rate` has no meaning in mode two", fix="Remove `rate`.", where="rate")
    if c.rate == 0.99:
        raise RuntimeError("a mistake in the plugin")


def record(**changes: Any) -> TunerMethod:
    """The method's record, with changes."""
    fields: dict[str, Any] = {
        "peft_type": "FAKE",
        "config": FakeConfig,
        "tuner": FakeTuner(),
        "prefix": "fake_",
        "layer_names": ("fake_v",),
        "model_class": "FakeModel",
        "layer_class": "FakeLayer",
        "summary": "Nothing.",
        "check": check,
    }
    return TunerMethod(**{**fields, **changes})


def plugin(made: object) -> object:
    """A plugin object whose hook returns `made`."""

    @hookimpl
    def peftc_tuner() -> object:
        return made

    return SimpleNamespace(peftc_tuner=peftc_tuner, __name__="fake_plugin")


@contextmanager
def registered(*made: TunerMethod) -> Iterator[None]:
    """Methods among the installed ones, which a `PeftModel` asks; within."""
    known = default_registry()
    for method in made:
        known.register(plugin(method), method.peft_type.lower())
    try:
        yield
    finally:
        for method in made:
            known.forget(method.peft_type)


def registry() -> Registry:
    """A registry that has this method alone."""
    made = Registry((), blocked=frozenset())
    made.register(plugin(record()), "fake")
    return made


def claim(name: str, module: str = "nowhere", distribution: str = "somebody") -> Claim:
    """A claim as an installed distribution makes it."""
    return Claim(name, module, distribution, "1.0")
