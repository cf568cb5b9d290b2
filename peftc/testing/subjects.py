"""What a check is run on: a method with some options on a tiny model, and the few things that every check does with it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.compile import compile_plan
from peftc.config.base import PeftConfig
from peftc.config.mixins import TargetNamesMixin, TargetParametersMixin
from peftc.diagnostics import PeftcError, PeftcWarning, Severity
from peftc.graph.nodes import Kind, ModuleNode
from peftc.model.functions.assistance import row_values
from peftc.model.mapping import get_peft_model
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.registry.starts import known_start
from peftc.runtime.applying.apply import session_of
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.testing.models import MODELS, TinyModel, seeded
from peftc.testing.report import broken
from peftc.tuner.experts import tuner_for
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.prompt import PromptTuner

#: Kinds of layer that some method may adapt.
ADAPTABLE = frozenset(Kind) - {Kind.OTHER}
#: Codes of what a method fails with, and does not say itself.
_FAILED = frozenset(rule.code for rule in (rules.PLUGIN_RAISED, rules.PLUGIN_INVALID, rules.CORE_RAISED))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings that a check provokes on purpose out of the test's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftcWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that models and callers still use
        yield


@dataclass(frozen=True)
class Subject:
    """A method, options, and a model. `targets` are the layers to adapt, None for the method's own defaults; `parameters` the
    single parameters, beside no layers. `part` tells subjects apart that have different layers of one model.

    `first` marks those with the first options, for checks that need no others; `foremost` the one that stands for the method.
    """

    method: TunerMethod
    options: Mapping[str, Any]
    model: TinyModel
    targets: tuple[str, ...] | None = None
    first: bool = field(default=False, compare=False)
    foremost: bool = field(default=False, compare=False)
    parameters: tuple[str, ...] = ()
    part: str = ""

    def __str__(self) -> str:
        options = ",".join(
            f"{name}={value}" for name, value in (*self.options.items(), *([("only", self.part)] if self.part else []))
        )
        if self.targets is None and self.method.adapts_layers:
            options = f"{options},defaults" if options else "defaults"
        return f"{options or ('defaults' if self.targets is None else 'no-options')}-{self.model.name}"

    def config(self, **changes: Any) -> PeftConfig:
        """A fresh config, with these options changed."""
        values = {**self.options, **changes}
        if self.targets is not None:
            values.setdefault("target_modules", list(self.targets))
        if self.parameters:
            values.setdefault("target_parameters", list(self.parameters))
        if self.method.call_tuner is not None:
            values.setdefault(self.method.call_tuner.option, adapters_for(self.method, self.model))
        if self.model.is_language_model:
            values.setdefault("task_type", "CAUSAL_LM")
        return self.method.config(**values)

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The bare model."""
        return self.model.build(dtype)

    def wrap(self, adapter: str = "default", dtype: torch.dtype | None = None, **changes: Any) -> PeftModel:
        """The model with a fresh adapter, in evaluation mode."""
        with quiet(), seeded(2):
            return get_peft_model(self.build(dtype), self.config(**changes), adapter).eval()

    def trained(self, adapter: str = "default", dtype: torch.dtype | None = None, **changes: Any) -> PeftModel:
        """The model with an adapter whose slots are moved at random, so that it acts; by another name it acts otherwise."""
        model = self.wrap(adapter, dtype, **changes)
        randomise(model, adapter)
        return model

    def join(self, model: PeftModel, adapter: str) -> None:
        """Add a second adapter with moved slots; equal to that of `trained(adapter)`."""
        with quiet(), seeded(2):
            model.add_adapter(adapter, self.config())
        randomise(model, adapter)

    def arguments(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keywords of a call of this model: tasks of the rows too, where an adapter needs them."""
        given: dict[str, Any] = dict(self.model.arguments(dtype))
        tuner = self.method.tuner
        tasks = tuner.tasks(self.config()) if isinstance(tuner, PromptTuner) else None
        if tasks is not None and isinstance(model, PeftModel):
            given["task_ids"] = torch.arange(given["input_ids"].shape[0]) % tasks
        return given | (self.values if isinstance(model, PeftModel) else {})

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """What the method reads of a call, for the rows of the model's inputs."""
        rows = next(iter(self.model.arguments().values())).shape[0]
        values = self.method.example_values(self.config(), rows)
        return {name: torch.tensor(value) for name, value in values.items()}

    @property
    def merges(self) -> bool:
        """Whether adapters can be folded into weights."""
        if not self.method.adapts_layers:
            return False
        config = self.config()
        nodes = [node for node in self.model.graph.nodes if self.targets is None or node.path in self.targets]
        nodes += [node for node in _stacks(self.model) if node.path in self.parameters]
        return any(
            tuner_for(self.method, config, node).is_mergeable for node in nodes if _fits(self.method, config, node)
        )

    @property
    def rebases(self) -> bool:
        """Whether adapters have base weights of their own: they need these, and all rows of a call are computed with them."""
        chosen = known_start(self.method, self.config())
        return chosen is not None and chosen.start.changes_base

    @property
    def bent(self) -> bool:
        """Whether the mathematics says that gradients are not the slopes of the output."""
        return any(tuner.bent_gradients for tuner in self._tuners)

    @property
    def draws(self) -> bool:
        """Whether slots act in training alone."""
        return any(tuner.draws_in_training for tuner in self._tuners)

    @contextmanager
    def drawing(self, model: nn.Module) -> Iterator[None]:
        """In training, from one seed, where slots act there alone."""
        if not self.draws:
            yield
            return
        modes = [(module, module.training) for module in model.modules()]
        model.train()
        try:
            with seeded(4):
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    @property
    def _tuners(self) -> Sequence[MapTuner[Any]]:
        """All mathematics that these options may lead to."""
        variant = self.method.variant_for(self.config())
        of_others = {id(tuner) for other in self.method.variants for tuner in other.tuners}
        plain = [tuner for tuner in self.method.map_tuners if id(tuner) not in of_others]
        return plain if variant is None else variant.tuners

    def calling(self, model: nn.Module) -> AbstractContextManager[None]:
        """Where layers of the model, or a model adapted in place, can be called by themselves."""
        return row_values(model, **self.values) if self.values else nullcontext()

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
        """The model's output for the model's inputs, with gradients if they are on."""
        in_place = not isinstance(model, PeftModel) and session_of(model) is not None
        with self.calling(model) if in_place else nullcontext():
            out = model(**self.arguments(model, dtype), **options)
        return out if isinstance(out, Tensor) else out.logits

    def rows(self, model: nn.Module, names: Sequence[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """The output with an adapter for each row of the batch, without gradients."""
        with torch.no_grad():
            return self.run(model, dtype, adapter_names=names)

    def output(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same without gradients."""
        with torch.no_grad():
            return self.run(model, dtype)

    def grown(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Gradients by parameter name after a backward pass of a fixed random functional of the output."""
        model.zero_grad(set_to_none=True)
        with self.drawing(model):
            y = self.run(model, dtype)
        with seeded(3):
            seed = torch.randn(y.shape, dtype=torch.float32).to(y.dtype)
        (y * seed).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def adapters_for(method: TunerMethod, model: TinyModel) -> dict[str, str]:
    """Folders with adapters of the model, made once in a process, for a method that weighs them."""
    root = _made(method.peft_type, model.name)
    folders = {str(number): Path(root.name, str(number)) for number in range(len(method.example_adapters))}
    for (name, folder), options in zip(folders.items(), method.example_adapters, strict=True):
        if not folder.is_dir():
            other = default_registry().get(str(options["peft_type"]))
            given = {key: value for key, value in options.items() if key != "peft_type"}
            subject = Subject(other, given, model, _targets(other, given, model))
            subject.trained(name).save_pretrained(root.name)
    return {name: str(folder) for name, folder in folders.items()}


@cache
def _made(peft_type: str, model: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def slots_of(model: PeftModel, adapter: str, trainable: bool = True) -> dict[str, nn.Parameter]:
    """The adapter's parameters by planned name, those that are kept aside too; only those that train if `trainable`."""
    session = model.session
    plan = session.plans[adapter]
    own = dict(model.named_parameters())
    aside = {} if adapter in session.active else _around(model, adapter)
    weighed = () if plan.call is None else (session.plans[name] for name in plan.call.needs)
    listed = (p for own_plan in (plan, *weighed) for p in own_plan.parameters())
    planned = [p for p in listed if not p.base and (p.trainable or not trainable)]
    missing = [p.name for p in planned if p.name not in own and p.name not in aside]
    if missing:
        raise broken(f"The plan lists `{missing[0]}`, which the model has not", "Declare in `slots` what is stored.")
    return {p.name: aside[p.name] if p.name in aside else own[p.name] for p in planned}


def _around(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """The tensors of an adapter's module sites, in or out of the model."""
    session = model.session
    found = {}
    for site in session.plans[adapter].modules:
        stored = session.modules[site.path].parameters_of(adapter)
        for slot, (_, parameter) in zip(site.slots, stored, strict=True):
            found[site.key(slot, adapter).memory(session.plans[adapter].root)] = parameter
    return found


def randomise(model: PeftModel, adapter: str) -> None:
    """Move the adapter's slots at random, in a way that depends on its name."""
    seed = 100 + sum(adapter.encode())
    with torch.no_grad():
        for parameter in slots_of(model, adapter).values():
            with seeded(seed):
                parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter.dtype))
            seed += 1


def layers_of(model: PeftModel, adapter: str = "default") -> dict[str, TunerLayer]:
    """The adapter's layers by path."""
    session = model.session
    return {site.path: session.layers[site.path] for site in session.plans[adapter].maps}


def calls_of(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, tuple[Tensor, ...]]:
    """What each module is called with, last, while `run` runs; those that are not called are left out."""
    calls: dict[str, tuple[Tensor, ...]] = {}
    handles = []
    for path, module in modules.items():

        def keep(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            calls[path] = args

        handles.append(module.register_forward_pre_hook(keep))
    run()
    for handle in handles:
        handle.remove()
    return calls


def subjects(method: TunerMethod) -> tuple[Subject, ...]:
    """The method's examples on the models that it can adapt: the first on all, others on the small ones where there are
    any, and the method's own default targets on language models."""
    found: list[Subject] = []
    for options in method.examples or ({},):
        first = not found
        for model in MODELS:
            if first or not method.adapts_layers or not model.is_language_model:
                for s in on_model(method, options, model):
                    found.append(replace(s, first=first, foremost=not found))
    if method.default_targets:
        found += [_by_defaults(method, model) for model in MODELS if model.is_language_model]
    return tuple(found)


def on_model(method: TunerMethod, options: Mapping[str, Any], model: TinyModel) -> Iterator[Subject]:
    """The options on the layers of a model that the method can adapt; nothing if there are none."""
    targets = _targets(method, options, model) if method.adapts_layers else None
    parameters = _parameters(method, options, model)
    if parameters if model.parameters else _has_place(method, options, model, targets):
        for part, own in _parted(method, options, model, targets).items():
            yield Subject(method, options, model, own, parameters=parameters, part=part)


def _by_defaults(method: TunerMethod, model: TinyModel) -> Subject:
    """The method where it acts of itself; with the options of an example, if some must be given or are for larger layers."""
    found = [Subject(method, options, model) for options in ({}, *method.examples)]
    return next(filter(_can_be_planned, found), found[0])


def _can_be_planned(s: Subject) -> bool:
    try:
        with quiet():
            compile_plan(s.model.graph, {"default": s.config()})
    except PeftcError:
        return False
    return True


def _has_place(
    method: TunerMethod, options: Mapping[str, Any], model: TinyModel, targets: tuple[str, ...] | None
) -> bool:
    """Whether the method can adapt the model. One that raises is asked again by the checks."""
    if method.is_prompt or method.call_tuner is not None:
        return model.is_language_model
    if method.module_tuner is None:
        return targets != ()
    config = method.config(**options)
    try:
        with boundary(method.peft_type, "sites"):
            config = config.model_copy(update=dict(method.module_tuner.resolve(config, model.graph)))
            return bool(method.module_tuner.sites(config, model.graph))
    except PeftcError as error:
        return any(problem.code in _FAILED for problem in error.diagnostics)


def _targets(method: TunerMethod, options: Mapping[str, Any], model: TinyModel) -> tuple[str, ...] | None:
    """Layers of the model that the method can adapt; None if the options choose them, or the method has no targets."""
    if not issubclass(method.config, TargetNamesMixin) or "target_modules" in options:
        return None
    if model.parameters:
        return ()
    config = method.config(**options)
    nodes = (node for node in model.graph.nodes if node.facts.kind in ADAPTABLE)
    return tuple(node.path for node in nodes if _fits(method, config, node))


def _parted(
    method: TunerMethod, options: Mapping[str, Any], model: TinyModel, targets: tuple[str, ...] | None
) -> dict[str, tuple[str, ...] | None]:
    """The targets; apart from each other, if a method can be folded into the weights of some of them and not into all."""
    if not targets:
        return {"": targets}
    config = method.config(**options)
    beside = []
    for path in targets:
        try:
            with boundary(method.peft_type, "tuner_for", path):
                beside += [] if tuner_for(method, config, model.graph.by_path[path]).is_mergeable else [path]
        except PeftcError:
            return {"": targets}  # the checks ask again
    if len(beside) in (0, len(targets)):
        return {"": targets}
    return {"": tuple(path for path in targets if path not in beside), "beside": tuple(beside)}


def _parameters(method: TunerMethod, options: Mapping[str, Any], model: TinyModel) -> tuple[str, ...]:
    """Parameters of the model that the method can adapt, if it has the option."""
    if not issubclass(method.config, TargetParametersMixin):
        return ()
    config = method.config(**options)
    return tuple(node.path for node in _stacks(model) if _fits(method, config, node))


def _stacks(model: TinyModel) -> Iterator[ModuleNode]:
    """The model's parameters that hold several weights, each as the compiler has it."""
    for path, _, name in (full.rpartition(".") for full in model.parameters):
        node = model.graph.by_path[path]
        facts = node.facts.of_parameter(name)
        if facts is not None:
            yield node.of_parameter(name, facts)


def kinds_in(model: TinyModel) -> frozenset[Kind]:
    """Kinds of layer that a method is tried on, on a model."""
    if model.parameters:
        return frozenset(node.facts.kind for node in _stacks(model))
    return frozenset(node.facts.kind for node in model.graph.nodes) & ADAPTABLE


def _fits(method: TunerMethod, config: PeftConfig, node: ModuleNode) -> bool:
    """Whether the method says that it can adapt a layer. A method that raises is asked again by the checks."""
    try:
        with boundary(method.peft_type, "tuner_for", node.path):
            tuner = tuner_for(method, config, node)
            problems = tuner.problems(config, node.facts, node.path) if node.facts.kind in tuner.supports else ()
            return node.facts.kind in tuner.supports and not any(p.severity is Severity.ERROR for p in problems)
    except PeftcError:
        return True
