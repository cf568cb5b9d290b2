"""A method's record and its hook in one call, for what plugins say alike: what the record can know by itself it is not told.

    peftc_tuner = method(ScaleConfig, Scale(), prefix="scale_", layer_names=("scale_v",))

is the same as a function `peftc_tuner`, marked `@hookimpl`, that returns a `TunerMethod`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Required, TypedDict, Unpack

from peftc.config.base import PeftConfig
from peftc.config.mixins import TargetNamesMixin
from peftc.diagnostics import Diagnostic
from peftc.graph.nodes import ModuleGraph
from peftc.graph.targets import has_table
from peftc.registry.hookspecs import hookimpl
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import Mathematics, TunerMethod
from peftc.tuner.optimizer import NamedOptimizer
from peftc.tuner.start import Start
from peftc.tuner.storage import Storage
from peftc.tuner.variant import Variant

#: A first sentence such as `Name: what it does (who, where).`, of which the middle is taken.
_SENTENCE = re.compile(r"[^:`]+: (?P<what>.+?)(?= \(|\.(?:\s|$)|$)")
_PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|https?://[^\s),;]+")


class Fields(TypedDict, total=False):
    """What a record is told beside config and mathematics; what the fields mean stands in `TunerMethod`.

    `layer_options` may be a tuple of options that the layer class shows under their own names; `exports` and
    `model_methods` may be tuples of classes and functions that are called what they are called.
    """

    choices: tuple[MapTuner[Any], ...]
    variants: tuple[Variant[MapTuner[Any]], ...]
    prefix: Required[str]
    layer_names: tuple[str, ...]
    model_class: str
    layer_class: str
    encoder_class: str
    layer_options: Mapping[str, str] | tuple[str, ...]
    layer_dropout: str
    model_methods: Mapping[str, Callable[..., Any]] | tuple[Callable[..., Any], ...]
    exports: Mapping[str, Any] | tuple[Callable[..., Any], ...]
    default_targets: Mapping[str, str]
    alike: tuple[str, ...]
    summary: str
    paper: str
    tags: tuple[str, ...]
    examples: tuple[Mapping[str, Any], ...]
    example_adapters: tuple[Mapping[str, Any], ...]
    example_values: Callable[[Any, int], Mapping[str, Sequence[int]]]
    check: Callable[[Any], Iterable[Diagnostic]]
    check_start: Callable[[Any], Iterable[Diagnostic]]
    start_option: str
    own_starts: tuple[str, ...]
    optimizers: tuple[NamedOptimizer, ...]
    resolve: Callable[[Any, ModuleGraph], Mapping[str, Any]]
    follows_ties: bool
    identity_at_start: Callable[[Any], bool]


def method(
    config: type[PeftConfig],
    tuner: Mathematics,
    **fields: Unpack[Fields],
) -> Callable[[], TunerMethod]:
    """The hook `peftc_tuner` of a plugin, with the method's record: `fields` are those of `TunerMethod`, of which `prefix` has to
    be given. `layer_options`, `exports` and `model_methods` may be tuples, whose entries go by the names that they have.

    The PEFT type is the default of the config's `peft_type`. Left out, `summary` and `paper` are those of the first sentence
    of the config's module or of its package, `Name: what it does (who, arXiv:1234.56789).`, and `default_targets` names the
    table that is called as the type, if there is one and the config has `target_modules`.
    """
    peft_type = str(config.model_fields["peft_type"].default or "")
    known: dict[str, Any] = _told(config) | _targets(config, peft_type) | dict(fields)
    for name in ("layer_options", "exports", "model_methods"):
        if isinstance(known.get(name), tuple):
            known[name] = {own if isinstance(own, str) else own.__name__: own for own in known[name]}
    record = TunerMethod(peft_type, config, tuner, **known)

    @hookimpl
    def peftc_tuner() -> TunerMethod:
        return record

    return peftc_tuner


def starting(record: Start) -> Callable[[], Start]:
    """The hook `peftc_start` of a module that brings a start: `peftc_start = starting(MyStart())`."""

    @hookimpl
    def peftc_start() -> Start:
        return record

    return peftc_start


def storing(record: Storage) -> Callable[[], Storage]:
    """The hook `peftc_storage` of a module that brings a storage: `peftc_storage = storing(MyStorage())`."""

    @hookimpl
    def peftc_storage() -> Storage:
        return record

    return peftc_storage


def _told(config: type[PeftConfig]) -> dict[str, str]:
    """Summary and paper, from the docstring of the module that the config is in, or of its package."""
    for name in (config.__module__, config.__module__.rpartition(".")[0]):
        text = " ".join((getattr(sys.modules.get(name), "__doc__", None) or "").strip().partition("\n\n")[0].split())
        sentence, paper = _SENTENCE.match(text), _PAPER.search(text)
        if sentence is not None:
            what = sentence["what"]
            return {"summary": f"{what[:1].upper()}{what[1:]}.", "paper": paper[0] if paper else ""}
    return {}


def _targets(config: type[PeftConfig], peft_type: str) -> dict[str, Mapping[str, str]]:
    """The table of default targets that is called as the type."""
    table = peft_type.lower().replace("_", "")
    found = issubclass(config, TargetNamesMixin) and has_table(table)
    return {"default_targets": {"target_modules": table}} if found else {}
