"""What all operations stand on: one model beside its plain counterpart, how they are looked at, and what may be refused."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis.stateful import RuleBasedStateMachine
from torch import Tensor, nn

from peftc import PeftcError, get_peft_model, rules
from peftc.diagnostics import PeftcWarning
from peftc.runtime.applying.tuner_model import TunerModel
from peftc.testing.models import seeded
from tests.states.alone import Adapter, output_of, plain_name
from tests.states.oracle import Plain
from tests.states.worlds import Kind, World

NAMES = ("default", "a", "b")
#: what an operation may be refused for, whatever the model's state
CLASH = rules.ADAPTERS_CONFLICT.code


class Pair(RuleBasedStateMachine):
    """One model and its plain counterpart. Subclasses say in which world."""

    world: ClassVar[World]
    #: steps of all machines together
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain(self.world)
        self.model: Any = None
        self.count = 0
        self.blocks: list[tuple[AbstractContextManager[None], bool]] = []
        self.saved: dict[str, dict[str, Adapter]] = {}
        self.left: list[tuple[nn.Module, Tensor]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="states"))
        self.catching = warnings.catch_warnings()
        self.catching.__enter__()
        warnings.simplefilter("ignore", PeftcWarning)
        warnings.simplefilter("ignore", FutureWarning)

    def teardown(self) -> None:
        try:
            while self.blocks:
                self.blocks.pop()[0].__exit__(None, None, None)
            for model, y in self.left:
                with torch.no_grad(), seeded(5):
                    assert torch.equal(output_of(self.world, model, y.dtype), y), "a model changed with its copy"
        finally:
            self.catching.__exit__(None, None, None)
            shutil.rmtree(self.folder)

    # looking ------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> dict[str, Tensor]:
        """All tensors by plain name."""
        return {self.plain_name(name): tensor for name, tensor in self.model.state_dict().items()}

    def plain_name(self, name: str) -> str:
        return plain_name(name, self.model, [adapter.plan for adapter in self.plain.adapters.values()])

    def computed(self, model: nn.Module, **options: Any) -> Tensor:
        with torch.no_grad(), seeded(5):
            return output_of(self.world, model, self.plain.dtype, **options)

    def close(self, found: Tensor, wanted: Tensor, what: str) -> None:
        wanted = wanted.double()
        scale = max(1.0, float(wanted.abs().max()))
        difference = float((found.double() - wanted).abs().max())
        assert difference <= self.plain.tolerance * scale, f"{what} differs by {difference:.3g} of {scale:.3g}"

    @contextmanager
    def refused(self, *codes: str) -> Iterator[None]:
        """What is done inside must be refused for one of these reasons, with nothing changed: the same objects, too."""
        before = self.objects()
        try:
            yield
        except PeftcError as error:
            found = {problem.code for problem in error.diagnostics}
            assert found & set(codes), f"refused for {found}, not for {codes}: {error}"
        else:
            raise AssertionError(f"not refused: {codes}")
        assert self.objects() == before, "refused, but other objects are in the model"

    def objects(self) -> dict[str, int]:
        return {name: id(p) for name, p in self.model.named_parameters()}

    def attempt(self, call: Callable[[], object], must: Sequence[str], may: Sequence[str] = ()) -> bool:
        """Whether it was done. It has to be refused for one of `must`, if there are any; it may be for one of `may`."""
        if must:
            with self.refused(*must, *may):  # where several reasons hold, one is told
                call()
            return False
        before = self.objects()
        try:
            call()
        except PeftcError as error:
            found = {problem.code for problem in error.diagnostics}
            assert found & set(may), f"refused, and should not have been: {error}"
            assert self.objects() == before, "refused, but other objects are in the model"
            return False
        return True

    def adopted(self, name: str, config: Any) -> Adapter:
        """A new adapter with the tensors that it was given at random."""
        adapter = Adapter(self.world, name, config.model_copy(deep=True))
        aside = bool(adapter.plan.modules) and name not in self.plain.active
        source = self.aside(name) if aside else self.live
        shapes = adapter.facts.shapes
        adapter.trained = {key: self.live[key].clone() for key in adapter.biases}
        adapter.tensors = {key: within(source[key], shapes[key]).clone() for key in adapter.facts.own}
        return adapter

    def aside(self, name: str) -> dict[str, Tensor]:
        """Tensors of an adapter that are in the model only while it acts, and go without its name."""
        return {key.removeprefix("base_model.model."): t for key, t in self.model.adapter_tensors(name).items()}

    def is_clash(self, names: Sequence[str]) -> bool:
        """Whether these adapters cannot act together."""
        unique = [self.plain.adapters[name] for name in dict.fromkeys(names)]
        pairs = [(one, two) for i, one in enumerate(unique) for two in unique[i + 1 :]]
        return any(self._pair_clashes(one, two) for one, two in pairs)

    def _pair_clashes(self, one: Adapter, two: Adapter) -> bool:
        if one.plan.call is not None and two.plan.call is not None:
            return True
        around = {site.path for site in one.plan.modules} & {site.path for site in two.plan.modules}
        own, other = one.facts.layers, two.facts.layers
        if around or {*one.copies} & {*two.copies} or (one.plan.prompt is not None and two.plan.prompt is not None):
            return True
        if one.peft_type != two.peft_type:
            return False
        both = [path for path in own.keys() & other.keys() if own[path].spot == other[path].spot]
        parts = [(own[path].part(one.name), other[path].part(two.name)) for path in both]
        return any(p.tuner.clash(p.view.config, q.view.config) for p, q in parts)

    def cannot_join(self, adapter: Adapter, beside: Sequence[Adapter]) -> list[str]:
        """Why an adapter cannot be on the model with others."""
        codes = []
        if not self.world.mixed and any(other.peft_type != adapter.peft_type for other in beside):
            codes.append(rules.MIXED_TYPES.code)
        if beside and any(a.biases for a in (adapter, *beside)):
            codes.append(CLASH)
        for one, two in [(adapter, other) for other in beside] + [(other, adapter) for other in beside]:
            sites = [site.path for site in two.plan.sites]
            if any(f"{site}.".startswith(f"{path}.") for path in one.copies for site in sites):
                codes.append(CLASH)
        for other in beside:
            alike = self.world.kinds[0].subject.method.alike
            if other.peft_type == adapter.peft_type and any(
                getattr(other.config, n, None) != getattr(adapter.config, n, None) for n in alike
            ):
                codes.append(CLASH)
        return codes

    @property
    def layered(self) -> bool:
        return isinstance(self.model.base_model, TunerModel)

    @property
    def mergeable(self) -> bool:
        return self.layered and all(a.facts.merges for a in self.plain.adapters.values())

    def wrap(self, base: nn.Module, kind: Kind, name: str) -> None:
        with seeded(self.count):
            self.model = get_peft_model(base, kind.config(), name, mixed=self.world.mixed).eval()
        self.plain.add(self.adopted(name, self.model.peft_config[name]))
        self.plain.activate([name])

    def unmergeable(self, names: Sequence[str]) -> list[str]:
        """Why these adapters cannot be merged, beside those that are."""
        must = [CLASH] if self.is_clash([*sorted(self.plain.merged_names), *names]) else []
        if any(not self.plain.adapters[name].facts.merges for name in names):
            must.append(rules.CANNOT_MERGE.code)
        return must

    def is_random(self, y: Tensor) -> bool:
        """Whether a call of the model draws random numbers, as some do in training."""
        with torch.no_grad(), seeded(6):
            return not torch.equal(output_of(self.world, self.model, self.plain.dtype), y)


def within(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a padded tensor that counts."""
    return tensor[tuple(slice(size) for size in shape)]


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)
