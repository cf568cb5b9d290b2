"""The kit's table of variants and starts can fail: starts and variants that break one promise each, and a core that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch

from peftc import plugin as p
from peftc.compiler.passes import starts
from peftc.diagnostics import PeftcError
from peftc.registry.manager import default_registry
from peftc.registry.starts import default_starts
from peftc.testing import examine
from peftc.testing.kit import chosen
from peftc.tuner.start import Chosen

CHECK = "begins_as_it_says"


class Sound(p.Start):
    """The strongest columns of the weight, taken out of the base."""

    name: ClassVar[str] = "mutant-start"
    changes_base: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True

    def factors(self, s: p.StartView) -> p.Begun:
        strongest = s.weight.norm(dim=0).topk(s.rank).indices
        rows = torch.eye(s.weight.shape[1]).to(s.weight)[strongest]
        return p.Begun(rows, s.weight[:, strongest] / s.scaling)


class Frozen(Sound):
    """B at random and frozen, A zero."""

    changes_base: ClassVar[bool] = False
    frozen: ClassVar[str] = "B"

    def factors(self, s: p.StartView) -> p.Begun:
        return p.Begun(s.weight.new_zeros(s.rank, s.weight.shape[1]), s.normal(s.weight.shape[0], s.rank))


class Reading(Frozen):
    """The means of inputs that a helper of its own gathers: nothing is tried here."""

    reads: ClassVar[p.Reads] = p.Reads.INPUTS


class LeavesTheBase(Sound):
    changes_base: ClassVar[bool] = False


class ForgetsTheScaling(Sound):
    def changed(self, s: p.StartView, kept: p.Tensors) -> p.Tensor:
        return s.weight - kept["B"] @ kept["A"]


class ChangesNothing(Sound):
    def factors(self, s: p.StartView) -> p.Begun:
        return p.Begun(s.weight.new_zeros(s.rank, s.weight.shape[1]), s.normal(s.weight.shape[0], s.rank))


class NotFinite(Frozen):
    is_offset: ClassVar[bool] = False

    def factors(self, s: p.StartView) -> p.Begun:
        begun = super().factors(s)
        assert begun.A is not None
        return p.Begun(begun.A * float("nan"), begun.B)


class BothZero(Frozen):
    def factors(self, s: p.StartView) -> p.Begun:
        return p.Begun(s.weight.new_zeros(s.rank, s.weight.shape[1]), s.weight.new_zeros(s.weight.shape[0], s.rank))


class Raising(Sound):
    def factors(self, s: p.StartView) -> p.Begun:
        raise ZeroDivisionError("on purpose")


class ForAllKinds(Sound):
    """Convolutions have what it does not know of, and a scaling to divide by."""

    kinds: ClassVar[frozenset[p.Kind]] = frozenset(p.Kind)

    def factors(self, s: p.StartView) -> p.Begun:
        if s.layer.kernel:
            raise NotImplementedError("convolutions")
        return super().factors(s)


SOUND: tuple[type[p.Start], ...] = (Sound, Frozen, Reading)
BROKEN: dict[type[p.Start], str] = {
    LeavesTheBase: "is not the base's",
    ForgetsTheScaling: "is not the base's",
    ChangesNothing: "The base weight of `lin0` is the same",
    NotFinite: "not finite",
    BothZero: "A training step changes nothing",
    Raising: "raised ZeroDivisionError: on purpose",
    ForAllKinds: "On the kind `conv1d`: `factors` of the start `mutant-start` raised NotImplementedError",
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Nothing of these stays known."""
    yield
    default_starts().forget(Sound.name)


def told(start: type[p.Start]) -> str:
    """What the first case that fails says, of those of the plainest method with a start."""
    default_starts().register(start())
    for case in chosen(Sound.name, [CHECK]):
        try:
            case.run()
        except PeftcError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("start", SOUND, ids=lambda cls: cls.__name__)
def test_a_sound_start_passes(start: type[p.Start]) -> None:
    assert told(start) == ""


@pytest.mark.parametrize("start", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_start_is_caught(start: type[p.Start]) -> None:
    assert BROKEN[start] in told(start)


def every_kind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Chosen, "problems", lambda *args: iter(()))


def never_frozen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(starts, "settled", lambda chosen, tuner, config, layer, slots: slots)


#: What is broken, with which start it shows, and what is said.
CORE: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], type[p.Start], str]] = {
    "every kind": (every_kind, Sound, "which does not name it: embedding"),
    "never frozen": (never_frozen, Frozen, "trains, and the start keeps it frozen"),
}


@pytest.mark.parametrize("name", CORE)
def test_a_broken_core_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, start, says = CORE[name]
    break_it(monkeypatch)
    assert says in told(start)


def test_a_start_comes_with_all_methods_that_take_one() -> None:
    default_starts().register(Sound())
    found = chosen(Sound.name)
    takers = {name for name in default_registry().names if default_registry().get(name).start_option}
    assert {case.subject.method.peft_type for case in found} == takers
    assert {case.check for case in found} == {CHECK}


def test_the_report_shows_the_line_of_a_start() -> None:
    default_starts().register(Raising())
    assert 'raise ZeroDivisionError("on purpose")' in str(examine(Raising.name, CHECK))
