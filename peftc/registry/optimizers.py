"""Which optimisers a spec can name: those of torch and transformers, listed here, and those that methods bring.

What is wrong with a choice is told before any model is there: by the options' model, and by the slots that the active adapters
would have on a layer of each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from peftc import rules
from peftc.config.base import ConfigModel, PeftConfig
from peftc.config.optimizers import (
    AdafactorOptions,
    AdagradOptions,
    AdamOptions,
    LionOptions,
    RmspropOptions,
    SgdOptions,
)
from peftc.config.problems import Problem, problems_of
from peftc.diagnostics import PeftcError, did_you_mean
from peftc.graph.nodes import CONV_KINDS, LINEAR_KINDS, Kind, LayerFacts
from peftc.graph.tensors import TensorFacts
from peftc.registry.boundary import boundary
from peftc.registry.manager import Registry, default_registry
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.optimizer import NamedOptimizer, any_layer, two_means

#: What is taken where a spec names none.
DEFAULT = "adamw"
#: Names that others have for options of the `train` section.
_SAID = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
#: How wide a layer is that stands for all of a kind.
_WIDTH = 4096


def _if_moving(c: Any, shape: Sequence[int]) -> int:
    return math.prod(shape) if c.momentum else 0


def _rows_and_columns(c: Any, shape: Sequence[int]) -> int:
    """Adafactor's: of a matrix the sums of its rows and of its columns."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))


def _of_rmsprop(c: Any, shape: Sequence[int]) -> int:
    return math.prod(shape) * (1 + bool(c.momentum) + bool(c.centered))


def _one_each(c: Any, shape: Sequence[int]) -> int:
    return math.prod(shape)


#: From how many numbers on bitsandbytes keeps states in eight bits, and how many of them share a scale.
_SMALLEST, _BLOCK = 4096, 256


def _bytes_each(states: int) -> Callable[[Any, Sequence[int]], int]:
    """A byte for each number and state, with the scales of blocks, counted in numbers of four bytes, as adapters have."""

    def keeps(c: Any, shape: Sequence[int]) -> int:
        numel = math.prod(shape)
        return states * (numel if numel < _SMALLEST else -(-numel // 4) + -(-numel // _BLOCK))

    return keeps


def _of_bitsandbytes(name: str, title: str, states: int, options: type[ConfigModel], *aliases: str) -> NamedOptimizer:
    """One of bitsandbytes', by transformers' name for it, which says in how many bits states are and where they may go."""
    bits, paged = 8 if "8bit" in name else 32, "paged" in name
    moved = ", in main memory while the accelerator's is full" if paged else ""
    return NamedOptimizer(
        name,
        f"{title}{', 8 bits' if bits == 8 else ''}",
        options,
        cls=f"bitsandbytes.optim:{title}",
        fixed={"optim_bits": bits, "is_paged": paged},
        summary=f"bitsandbytes', with states of {bits} bits{moved}.",
        aliases=aliases,
        keeps=_bytes_each(states) if bits == 8 else two_means if states == 2 else _one_each,
        package="bitsandbytes",
    )


#: Those that know no adapters. `adamw` is what transformers takes by itself.
PLAIN: tuple[NamedOptimizer, ...] = (
    NamedOptimizer(
        "adamw", "AdamW", AdamOptions, cls="torch.optim:AdamW", fixed={"fused": True}, aliases=("adamw_torch_fused",)
    ),
    NamedOptimizer("adamw_torch", "AdamW", AdamOptions, cls="torch.optim:AdamW"),
    NamedOptimizer("sgd", "SGD", SgdOptions, cls="torch.optim:SGD", keeps=_if_moving),
    NamedOptimizer(
        "adafactor",
        "Adafactor",
        AdafactorOptions,
        cls="transformers.optimization:Adafactor",
        fixed={"scale_parameter": False, "relative_step": False},
        keeps=_rows_and_columns,
    ),
    NamedOptimizer("adagrad", "Adagrad", AdagradOptions, cls="torch.optim:Adagrad", keeps=_one_each),
    NamedOptimizer("rmsprop", "RMSprop", RmspropOptions, cls="torch.optim:RMSprop", keeps=_of_rmsprop),
    _of_bitsandbytes("adamw_8bit", "AdamW", 2, AdamOptions, "adamw_bnb_8bit"),
    _of_bitsandbytes("paged_adamw_8bit", "AdamW", 2, AdamOptions),
    _of_bitsandbytes("paged_adamw_32bit", "AdamW", 2, AdamOptions),
    _of_bitsandbytes("lion_8bit", "Lion", 1, LionOptions),
    _of_bitsandbytes("paged_lion_8bit", "Lion", 1, LionOptions),
    _of_bitsandbytes("paged_lion_32bit", "Lion", 1, LionOptions),
)


@dataclass(frozen=True)
class ChosenOptimizer:
    """An optimiser with its options, as a `train` section names it."""

    record: NamedOptimizer
    options: Any

    @property
    def said(self) -> dict[str, Any]:
        """What of it has to be equal for a training to be carried on, as plain data."""
        return {"optimizer": self.record.name, "optimizer_options": self.options.model_dump(mode="json")}


def optimizers(registry: Registry | None = None) -> dict[str, NamedOptimizer]:
    """All by name: the plain ones, then those of installed methods."""
    of_methods = (own for method in (registry or default_registry()).load_all() for own in method.optimizers)
    found: dict[str, NamedOptimizer] = {}
    for record in (*PLAIN, *of_methods):
        found.setdefault(record.name, record)
    return found


def find_optimizer(name: str, registry: Registry | None = None) -> NamedOptimizer | None:
    """The one of a name; methods are loaded only for a name that none of the plain ones has."""
    text = name.lower()
    plain = next((record for record in PLAIN if text in (record.name, *record.aliases)), None)
    if plain is not None:
        return plain
    known = optimizers(registry).values()
    return next((record for record in known if text in (record.name, *record.aliases)), None)


def chosen_optimizer(
    name: str | None, options: Mapping[str, Any] | None, registry: Registry | None = None
) -> ChosenOptimizer:
    """The optimiser of a `train` section. Raises `PeftcError` with all that is wrong with name and options."""
    found = list(option_problems(name, options, registry))
    if found:
        raise PeftcError(problem.diagnostic for problem in found)
    record = find_optimizer(name or DEFAULT, registry)
    assert record is not None
    return ChosenOptimizer(record, record.options(**(options or {})))


def option_problems(
    name: str | None, options: Mapping[str, Any] | None, registry: Registry | None = None
) -> Iterator[Problem]:
    """What is wrong with name and options, by place in the `train` section."""
    record = find_optimizer(name or DEFAULT, registry)
    if record is None:
        known = optimizers(registry)
        fix = did_you_mean(str(name).lower(), known) or f"There are {', '.join(known)}."
        yield Problem(("optimizer",), rules.OPTIMIZER_UNKNOWN(f"No optimiser is called `{name}`", fix=fix))
        return
    if record.package and find_spec(record.package) is None:
        what = f"The optimiser `{record.name}` needs the package `{record.package}`"
        told = rules.DEPENDENCY_MISSING(what, fix=f"Install it: `pip install {record.package}`.", why="")
        yield Problem(("optimizer",), told)
    given = dict(options or {})
    for key, own in {**_SAID, **record.said}.items():
        if key in given and key not in record.options.model_fields:
            del given[key]
            what = f"`{key}` is said by `train.{own}`"
            fix = f"Give it there, and remove it here: {record.title} takes `{own}` of the section."
            yield Problem(("optimizer_options", key), rules.CONTRADICTION(what, fix=fix), on_key=True)
    for problem in problems_of(record.options, given):
        yield Problem(("optimizer_options", *problem.location), problem.diagnostic, problem.on_key)


def unfit(record: NamedOptimizer, adapter: str, peft_type: str) -> Problem:
    """That an adapter has no layer which the optimiser is for."""
    what = f"`{record.name}` is for {record.needs}, and `{adapter}` ({peft_type}) has none"
    why = "It would train like AdamW, or not at all."
    fix = "Use another optimiser, such as `adamw`, or an adapter with such layers."
    return Problem(("optimizer",), rules.OPTIMIZER_MISFIT(what, why=why, fix=fix))


def fit_problems(
    record: NamedOptimizer, adapters: Mapping[str, PeftConfig], registry: Registry | None = None
) -> Iterator[Problem]:
    """Adapters that have no fitting layer of any kind, whatever the model."""
    registry = registry or default_registry()
    if record.fits is any_layer:
        return
    for name, config in adapters.items():
        with suppress(PeftcError):  # a variant that is not there is told with the other options
            method = registry.method_of(config)
            if not _may_fit(record, method, config):
                yield unfit(record, name, method.peft_type)


def _may_fit(record: NamedOptimizer, method: TunerMethod, config: PeftConfig) -> bool:
    """Whether one of the method's mathematics, or of the variant that acts, has slots on some layer that fit."""
    variant = method.variant_for(config)
    for tuner in method.own_tuners if variant is None else variant.tuners:
        for layer in _layers(tuner):
            try:
                with boundary(method.peft_type, "slots"):
                    slots = tuple(tuner.slots(config, layer))
            except PeftcError:  # the plan knows more
                return True
            if record.fits(layer, slots):
                return True
    return False


def _layers(tuner: MapTuner[Any]) -> Iterable[LayerFacts]:
    """A layer of each kind on which the mathematics is defined."""
    for kind in (*sorted(LINEAR_KINDS), Kind.EMBEDDING, *sorted(CONV_KINDS)):
        if kind in tuner.supports:
            kernel = (3,) * (1 + sorted(CONV_KINDS).index(kind)) if kind in CONV_KINDS else ()
            weight = TensorFacts((_WIDTH, _WIDTH, *kernel), "float32")
            yield LayerFacts(kind, kind.value, _WIDTH, _WIDTH, kernel, params={"weight": weight})  # type: ignore[arg-type]
