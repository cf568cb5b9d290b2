"""Every operation on adapted models in random order, each step compared with the plain model of what should be."""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc import PeftcError, PeftConfig, PeftModel, get_peft_model, rules
from peftc.diagnostics import PeftcWarning
from peftc.helpers import rescale_adapter_scale
from peftc.model.hotswap import hotswap_adapter
from peftc.model.state import set_peft_model_state_dict
from peftc.runtime.layer import BaseTunerLayer
from peftc.runtime.tuner_model import TunerModel
from peftc.testing.models import seeded
from tests.states.oracle import BASE, Adapter, Plain, output_of, plain_name, set_scale
from tests.states.worlds import DTYPE, Kind, World

NAMES = ("default", "a", "b")
SLOTS = ("s0", "s1")
#: what an operation may be refused for, whatever the model's state
CLASH = rules.ADAPTERS_CONFLICT.code


class Machine(RuleBasedStateMachine):
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
        adapter.tensors = {key: _within(source[key], shapes[key]).clone() for key in adapter.facts.own}
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
        parts = [(own[path].part(one.name), other[path].part(two.name)) for path in own.keys() & other.keys()]
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

    # beginning ----------------------------------------------------------------------------------------------------

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self._wrap(self.world.build(), data.draw(st.sampled_from(self.world.kinds), "kind"), NAMES[0])

    def _wrap(self, base: nn.Module, kind: Kind, name: str) -> None:
        with seeded(self.count):
            self.model = get_peft_model(base, kind.config(), name, mixed=self.world.mixed).eval()
        self.plain.add(self.adopted(name, self.model.peft_config[name]))
        self.plain.activate([name])

    # adapters -----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def add(self, data: st.DataObject, name: str) -> None:
        kind = data.draw(st.sampled_from(self.world.kinds), "kind")
        beside = list(self.plain.adapters.values())
        new = Adapter(self.world, name, kind.config())
        must = self.cannot_join(new, beside)
        must += [rules.ADAPTER_EXISTS.code] if name in self.plain.adapters else []
        with seeded(self.count):
            if self.attempt(lambda: self.model.add_adapter(name, kind.config()), must):
                self.plain.add(self.adopted(name, self.model.peft_config[name]))

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), frozen=st.booleans())
    def activate(self, names: list[str], frozen: bool) -> None:
        unknown = [name for name in names if name not in self.plain.adapters]
        must = [rules.ADAPTER_UNKNOWN.code] if unknown else []
        must += [rules.ONE_PROMPT.code] if len(names) > 1 and not self.layered else []
        must += [CLASH] if not unknown and self.is_clash(names) else []
        if self.attempt(lambda: self.model.set_adapter(names, inference_mode=frozen), must):
            self.plain.activate(names, not frozen)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        must = [] if name in self.plain.adapters else [rules.ADAPTER_UNKNOWN.code]
        if name in self.plain.merged_names:
            must = [rules.WHILE_MERGED.code]
        if self.attempt(lambda: self.model.delete_adapter(name), must):
            self.plain.delete_and_succeed(name)

    @rule(name=st.sampled_from(NAMES), requires=st.booleans())
    def require(self, name: str, requires: bool) -> None:
        must = [] if name in self.plain.adapters else [rules.ADAPTER_UNKNOWN.code]
        if self.attempt(lambda: self.model.set_requires_grad(name, requires), must):
            self.plain.adapters[name].requires = requires

    @precondition(lambda self: self.layered and self.plain.adapters)
    @rule(data=st.data(), scale=st.sampled_from([0.5, 1.0, 2.0]))
    def scale(self, data: st.DataObject, scale: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.plain.adapters)), "adapter")
        if self.world.mixed and name in self.plain.merged_names:
            return  # which scale it is merged with depends on what is merged below it later
        set_scale(self.model, name, scale)
        self.plain.adapters[name].scale = scale

    # acting -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.blocks) < 2)
    @rule()
    def begin_block(self) -> None:
        block = self.model.disable_adapter()
        self.blocks.append((block, self.plain.enabled))
        block.__enter__()
        self.plain.enabled = False

    @precondition(lambda self: self.blocks)
    @rule()
    def end_block(self) -> None:
        block, before = self.blocks.pop()
        block.__exit__(None, None, None)
        self.plain.enabled = before

    @precondition(lambda self: self.layered and not self.blocks)
    @rule(enabled=st.booleans())
    def enable(self, enabled: bool) -> None:
        base = self.model.base_model
        base.enable_adapter_layers() if enabled else base.disable_adapter_layers()
        self.plain.enabled = enabled

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)
        self.plain.training = training

    @precondition(lambda self: self.plain.adapters)
    @rule(data=st.data())
    def rows(self, data: st.DataObject) -> None:
        names = [BASE, *sorted(self.plain.adapters)]
        count = len(next(iter(self.world.arguments.values())))
        rows = data.draw(st.lists(st.sampled_from(names), min_size=count, max_size=count), "rows")
        concerned = [self.plain.adapters[name] for name in rows if name != BASE]
        bare = set(rows) == {BASE}
        must = [rules.WHILE_MERGED.code] if self.plain.merged_names and not bare else []
        if any(not a.plan.nests for a in concerned):
            must.append(rules.CALL_NOT_POSSIBLE.code)
        if any(
            a.biases and not bare and (set(rows) != {n} or n not in self.plain.active)
            for n, a in self.plain.adapters.items()
        ):
            must.append(rules.CALL_NOT_POSSIBLE.code)
        if any(a.plan.modules for n, a in self.plain.adapters.items() if n in self.plain.active):
            must.append(rules.CALL_NOT_POSSIBLE.code)
        found: list[Tensor] = []
        random = self.plain.training and self.plain.adapters and self.is_random(self.computed(self.model))
        if self.attempt(lambda: found.append(self.computed(self.model, adapter_names=rows)), must) and not random:
            wanted = self.plain.rows(rows if self.plain.enabled else [BASE] * count)
            self.close(found[0], wanted, "the output by rows")

    @precondition(lambda self: self.layered)
    @rule(factor=st.sampled_from([0.5, 3.0]))
    def rescaled(self, factor: float) -> None:
        before = {name: adapter.scale for name, adapter in self.plain.adapters.items()}
        try:
            with rescale_adapter_scale(self.model, factor):
                for adapter in self.plain.adapters.values():
                    adapter.scale *= factor
                y = self.computed(self.model)
                if not (self.plain.training and self.is_random(y)):
                    self.close(y, self.plain.output(), "the output rescaled")
        except PeftcError as error:
            assert error.diagnostics[0].code == rules.NOT_ADAPTED.code
        for name, scale in before.items():
            self.plain.adapters[name].scale = scale

    # merging ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.layered and self.plain.adapters)
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: st.DataObject, safe: bool) -> None:
        some = st.lists(st.sampled_from(sorted(self.plain.adapters)), min_size=1, max_size=2, unique=True)
        names = data.draw(st.one_of(st.none(), some), "names")
        wanted = self.plain.active if names is None else names
        may = [rules.MERGE_ORDER.code] if self.world.mixed else []
        if self.attempt(lambda: self.model.merge_adapter(names, safe_merge=safe), self._unmergeable(wanted), may):
            self.plain.merge(wanted)

    def _unmergeable(self, names: Sequence[str]) -> list[str]:
        """Why these adapters cannot be merged, beside those that are."""
        must = [CLASH] if self.is_clash([*sorted(self.plain.merged_names), *names]) else []
        if any(not self.plain.adapters[name].facts.merges for name in names):
            must.append(rules.CANNOT_MERGE.code)
        return must

    @precondition(lambda self: self.layered)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.plain.unmerge()

    # training -----------------------------------------------------------------------------------------------------

    @rule()
    def step(self) -> None:
        """A step of training: gradients reach exactly what they should, and nothing else changes."""
        self.model.zero_grad(set_to_none=True)
        y = output_of(self.world, self.model, self.plain.dtype)
        grown = self.plain.grown()
        assert y.requires_grad == bool(grown), f"the output requires gradients: {y.requires_grad}"
        if not grown:
            return
        with seeded(3):
            seed = torch.randn(y.shape, dtype=torch.float32).to(y.dtype)
        (y * seed).sum().backward()
        live = {self.plain_name(name): p for name, p in self.model.named_parameters()}
        found = {name for name, p in live.items() if p.grad is not None}
        assert found == grown, f"gradients: {sorted(found ^ grown)[:4]} are wrong"
        for name in found if self.plain.enabled else ():  # what trains along is the base's own otherwise
            self.moved(live[name])
        for owner, adapter in self.plain.adapters.items() if self.plain.enabled else ():
            for name in () if self.plain.is_aside(owner) else found & set(adapter.tensors):
                adapter.tensors[name] = _within(live[name].detach(), adapter.tensors[name].shape).clone()
                adapter.changed()
            for name in found & adapter.trained.keys():
                adapter.trained[name] = live[name].detach().clone()
                adapter.changed()
        self.model.zero_grad(set_to_none=True)

    def moved(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad.sign()

    # copies -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.blocks and len(self.left) < 2)
    @rule(pickled=st.booleans())
    def copied(self, pickled: bool) -> None:
        weighs = any(kind.subject.method.call_tuner is not None for kind in self.world.kinds)  # hooks of transformers
        y = self.computed(self.model)
        old = self.model
        self.model = pickle.loads(pickle.dumps(old)) if pickled and not weighs else copy.deepcopy(old)
        if self.plain.training == old.training:
            self.left.append((old, y))

    @precondition(lambda self: self.plain.enabled or not any(a.biases for a in self.plain.adapters.values()))
    @rule(dtype=st.sampled_from([DTYPE, torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.plain.cast(dtype)

    # files --------------------------------------------------------------------------------------------------------

    @rule(slot=st.sampled_from(SLOTS))
    def save(self, slot: str) -> None:
        must = [] if self.plain.adapters else [rules.NOT_ADAPTED.code]
        if not self.attempt(lambda: self.model.save_pretrained(self.folder / slot), must):
            return
        content = {}
        for name in self.plain.adapters:
            place = self.place(slot, name)
            found = load_file(place / "adapter_model.safetensors")
            with torch.no_grad():
                wanted = self.plain.alike(name).alone.model.adapter_tensors(name)
            assert found.keys() == wanted.keys(), f"saved keys of {name}: {sorted(found.keys() ^ wanted.keys())[:4]}"
            for key, tensor in wanted.items():
                if self.plain.adapters[name].plan.prompt is not None:  # computed from its slots, in their dtype
                    self.close(found[key], tensor, f"saved {key} of {name}")
                else:
                    assert torch.equal(found[key].double(), tensor.double()), f"saved {key} of {name}"
            content[name] = self.plain.alike(name).placed(PeftConfig.from_pretrained(place))
        self.saved[slot] = {**self.saved.get(slot, {}), **content}

    def place(self, slot: str, name: str) -> Path:
        return self.folder / slot if name == "default" else self.folder / slot / name

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def reload(self, data: st.DataObject) -> None:
        """What was saved, on a fresh base."""
        slot = data.draw(st.sampled_from(sorted(self.saved)), "slot")
        name = data.draw(st.sampled_from(sorted(self.saved[slot])), "adapter")
        adapter = self.saved[slot][name]
        model = PeftModel.from_pretrained(self.world.build(), self.place(slot, name), adapter_name=name)
        fresh = Plain(self.world)
        fresh.add(
            Adapter(self.world, name, adapter.config, adapter.tensors, stored=adapter.stored, trained=adapter.trained)
        )
        fresh.activate([name])
        with torch.no_grad():
            self.close(output_of(self.world, model, DTYPE), fresh.output(), "the output of a loaded adapter")

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(NAMES), trains=st.booleans())
    def load(self, data: st.DataObject, name: str, trains: bool) -> None:
        """What was saved, beside what is there or over it."""
        place, new = self._saved(data, name)
        old = self.plain.adapters.get(name)
        must = self.cannot_join(new, [other for other in self.plain.adapters.values() if other is not old])
        must += [rules.WHILE_MERGED.code] if name in self.plain.merged_names else []
        if self.attempt(lambda: self.model.load_adapter(place, name, is_trainable=trains), must):
            if not trains:
                self.plain.training = False
            new.requires = trains if old is None else old.requires or (trains and name in self.plain.active)
            self.plain.load(new)
            self.take(new)
            found, wanted = self.model.adapter_tensors(name), load_file(place / "adapter_model.safetensors")
            assert found.keys() == wanted.keys()
            for key, tensor in found.items():
                assert torch.equal(tensor, wanted[key].to(tensor.dtype)), f"{key} is not what was loaded"

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def swap(self, data: st.DataObject, name: str) -> None:
        """The values of what was saved, in place of an adapter's own."""
        place, new = self._saved(data, name)
        must = [] if name in self.plain.adapters else [rules.ADAPTER_UNKNOWN.code]
        must += [rules.WHILE_MERGED.code] if name in self.plain.merged_names else []
        may = [rules.CANNOT_SWAP.code, rules.NOTHING_LOADS.code]
        if not self.attempt(lambda: hotswap_adapter(self.model, place, name), must, may):
            return
        old = self.plain.adapters[name]
        config = self.model.peft_config[name]
        if set(new.layers) != set(old.layers):  # the config is the new one's; layers stay
            config = config.model_copy(update={"target_modules": set(old.layers)})
        swapped = self.adopted(name, config)
        swapped.requires = old.requires
        swapped.trained = {key: tensor.to(self.plain.dtype) for key, tensor in new.trained.items()}
        self.plain.adapters[name] = swapped
        pristine = self.plain.pristine()
        for path in swapped.layers:
            found = swapped.alone.folded(path, pristine, pristine)
            wanted = (
                new.alone.folded(path, pristine, pristine) if path in new.layers else {k: pristine[k] for k in found}
            )
            for key, tensor in found.items():
                self.close(tensor, wanted[key], f"{key} with what was swapped in")

    def _saved(self, data: st.DataObject, name: str) -> tuple[Path, Adapter]:
        """Where one of the saved adapters is, and what it is under this name."""
        slot = data.draw(st.sampled_from(sorted(self.saved)), "slot")
        own = data.draw(st.sampled_from(sorted(self.saved[slot])), "saved adapter")
        saved = self.saved[slot][own]
        prompt = saved.plan.prompt is not None
        new = Adapter(self.world, name, saved.config.model_copy(deep=True), stored=prompt)
        if not prompt:
            pairs = zip(new.facts.own, saved.facts.own, strict=True)
            new.tensors = {key: saved.tensors[other].clone() for key, other in pairs}
        new.trained = {key: tensor.clone() for key, tensor in saved.trained.items()}
        return self.place(slot, own), new

    def take(self, adapter: Adapter) -> None:
        """Let tensors that were given to the model be as it has them: in its dtype, and of a prompt the table alone."""
        there = self.aside(adapter.name) if self.plain.is_aside(adapter.name) else self.live
        given = {key: there[key].clone() for key in adapter.facts.own} if adapter.stored else adapter.tensors
        adapter.tensors = {key: tensor.to(there[key].dtype) for key, tensor in given.items()}
        adapter.changed()

    @precondition(lambda self: self.layered and self.plain.adapters)
    @rule(data=st.data(), name=st.sampled_from(NAMES), way=st.sampled_from(["cat", "linear", "svd"]))
    def combine(self, data: st.DataObject, name: str, way: str) -> None:
        """A new adapter out of others, weighted; with `cat`, exactly their sum."""
        some = st.lists(st.sampled_from(sorted(self.plain.adapters)), min_size=1, max_size=2, unique=True)
        names = data.draw(some, "names")
        weights = data.draw(st.lists(st.sampled_from([0.5, -1.0, 2.0]), min_size=len(names), max_size=len(names)))
        must = [rules.ADAPTER_EXISTS.code] if name in self.plain.adapters else []
        may = [rules.CANNOT_COMBINE.code, CLASH]
        add = self.model.base_model.add_weighted_adapter
        if not self.attempt(lambda: add(names, weights, name, combination_type=way), must, may):
            return
        new = self.adopted(name, self.model.peft_config[name])
        self.plain.add(new)
        pristine = self.plain.pristine(self.plain.acting)
        for path in new.layers:
            parts = [self.plain.adapters[own] for own in names if path in self.plain.adapters[own].layers]
            if way == "cat" and all(own.facts.layers[path].part(own.name).tuner.additive for own in (new, *parts)):
                own, key = new.alone.folded(path, pristine, pristine), f"{path}.weight"
                shares = dict(zip(names, weights, strict=True))
                changes = [
                    shares[p.name] * (p.alone.folded(path, pristine, pristine)[key] - pristine[key]) for p in parts
                ]
                self.close(own[key], pristine[key] + sum(changes), f"{key} of the combination")

    @precondition(lambda self: self.plain.adapters)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        """Values from a dictionary."""
        name = data.draw(st.sampled_from(sorted(self.plain.adapters)), "adapter")
        with seeded(self.count):
            own = self.model.adapter_tensors(name)
            given = {k: t + torch.rand_like(t) if t.is_floating_point() else t.clone() for k, t in own.items()}
        must = [rules.WHILE_MERGED.code] if name in self.plain.merged_names else []
        may = [] if self.layered else [rules.TABLE_REFUSED.code]
        if self.attempt(lambda: set_peft_model_state_dict(self.model, given, name), must, may):
            for key, tensor in self.model.adapter_tensors(name).items():
                assert torch.equal(tensor, given[key]), f"{key} is not what was put in"
            adapter = self.plain.adapters[name]
            there = self.aside(name) if self.plain.is_aside(name) else self.live
            adapter.tensors = {key: there[key].clone() for key in adapter.tensors}
            adapter.changed()
            own = {self.plain_name(key): tensor for key, tensor in given.items()}
            adapter.trained = {key: own[key].to(self.plain.dtype) for key in adapter.trained}

    # endings ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.layered and not self.blocks)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def unload(self, data: st.DataObject, name: str) -> None:
        """The base as it was; then another adapter."""
        base = self.model.unload()
        for own in list(self.plain.adapters):
            self.plain.delete(own)
        self._begin_again(base, self.plain.shown(()), data, name)

    @precondition(lambda self: self.layered and self.plain.adapters and not self.blocks)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def merge_for_good(self, data: st.DataObject, name: str) -> None:
        """The base with adapters folded in, and what they train whole; then another adapter."""
        some = st.lists(st.sampled_from(sorted(self.plain.adapters)), min_size=1, max_size=2, unique=True)
        names = data.draw(st.one_of(st.none(), some), "names")
        wanted = self.plain.active if names is None else names
        must = self._unmergeable(wanted)
        may = [rules.MERGE_ORDER.code] if self.world.mixed else []
        found: list[nn.Module] = []
        if self.attempt(lambda: found.append(self.model.merge_and_unload(adapter_names=names)), must, may):
            self._begin_again(found[0], self.plain.in_effect(wanted, for_good=True), data, name)

    def _begin_again(self, base: nn.Module, wanted: dict[str, Tensor], data: st.DataObject, name: str) -> None:
        kinds = {str(type(module).__name__) for module in base.modules() if isinstance(module, BaseTunerLayer)}
        assert not kinds, f"wrappers are left: {kinds}"
        state = base.state_dict()
        assert state.keys() == wanted.keys()
        for key, tensor in wanted.items():
            self.close(state[key], tensor, f"{key} of the base")
        self.plain = self.plain.again(state)
        self._wrap(base, data.draw(st.sampled_from(self.world.kinds), "kind"), name)

    # what holds after every step ----------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if self.model is None:
            return
        self.count += 1
        type(self).steps += 1
        Machine.steps += 1
        plain = self.plain
        assert list(self.model.peft_config) == list(plain.adapters)
        assert self.model.active_adapters == plain.active
        live = self.live
        assert live.keys() == plain.names(), f"names: {sorted(live.keys() ^ plain.names())[:4]}"
        trainable = {self.plain_name(n) for n, p in self.model.named_parameters() if p.requires_grad}
        wanted = plain.trainable()
        assert trainable == wanted, f"trainable: {sorted(trainable ^ wanted)[:4]}"
        for owner, adapter in plain.adapters.items():
            there = self.aside(owner) if plain.is_aside(owner) else live
            for name, tensor in adapter.tensors.items():
                found = _within(there[name], tensor.shape)  # what is beyond is padding
                assert _same(found, tensor), f"{name} of {owner} is not what it was"
                assert found.numel() == there[name].numel() or there[name].count_nonzero() == found.count_nonzero()
        for name, tensor in plain.shown(plain.acting).items():
            if name in plain.instead:
                self.close(live[name], plain.weights[name], f"{name}, merged,")
            else:
                assert _same(live[name], tensor), f"{name} is not what it was"
        y = self.computed(self.model)
        if not (plain.training and self.is_random(y)):
            self.close(y, plain.output(), "the output")

    def is_random(self, y: Tensor) -> bool:
        """Whether a call of the model draws random numbers, as some do in training."""
        with torch.no_grad(), seeded(6):
            return not torch.equal(output_of(self.world, self.model, self.plain.dtype), y)


def _within(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of a padded tensor that counts."""
    return tensor[tuple(slice(size) for size in shape)]


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def machine(world: World) -> type[Machine]:
    """The machine of a world."""
    return type(f"Machine_{world.name.replace('-', '_')}", (Machine,), {"world": world})
