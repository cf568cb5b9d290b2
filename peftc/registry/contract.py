"""What a method's record must be: the type of every field, looked at once when the plugin is loaded.

The core relies on it without asking again, so that a wrong record is the plugin's problem alone, told by its field's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from peftc.config.base import ConfigModel, PeftConfig
from peftc.graph.nodes import Kind
from peftc.tuner.calls import CallTuner
from peftc.tuner.maps import MapTuner
from peftc.tuner.method import TunerMethod
from peftc.tuner.modules import ModuleTuner
from peftc.tuner.optimizer import NamedOptimizer
from peftc.tuner.prompt import PromptTuner
from peftc.tuner.start import Start
from peftc.tuner.variant import Variant

Fits = Callable[[Any], bool]


def _a(kind: type | tuple[type, ...]) -> Fits:
    return lambda value: isinstance(value, kind)


def _all(fits: Fits) -> Fits:
    return lambda value: isinstance(value, tuple) and all(map(fits, value))


def _by_name(fits: Fits) -> Fits:
    return lambda value: isinstance(value, Mapping) and all(isinstance(k, str) and fits(v) for k, v in value.items())


def _is_tuner(value: Any) -> bool:
    return isinstance(value, (ModuleTuner, PromptTuner, CallTuner)) or _is_map(value)


def _is_map(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(tuner, MapTuner) for tuner in value)
    return isinstance(value, MapTuner) or callable(value)


_TEXT, _TEXTS, _FUNCTION, _OPTIONS = _a(str), _all(_a(str)), callable, _by_name(lambda value: True)

#: Field of a record -> what its value is, and whether one is that.
_FIELDS: Mapping[str, tuple[str, Fits]] = {
    "peft_type": ("a text", _TEXT),
    "config": ("a subclass of `PeftConfig`", lambda value: isinstance(value, type) and issubclass(value, PeftConfig)),
    "tuner": ("a tuner, a tuple of `MapTuner`, or a function that chooses one", _is_tuner),
    "choices": ("a tuple of `MapTuner`", _all(_a(MapTuner))),
    "variants": ("a tuple of `Variant`", _all(_a(Variant))),
    "prefix": ("a text", _TEXT),
    "layer_names": ("a tuple of texts", _TEXTS),
    "model_class": ("a text", _TEXT),
    "layer_class": ("a text", _TEXT),
    "encoder_class": ("a text", _TEXT),
    "layer_options": ("a mapping of texts", _by_name(_TEXT)),
    "layer_dropout": ("a text", _TEXT),
    "model_methods": ("a mapping of functions", _by_name(_FUNCTION)),
    "exports": ("a mapping by name", _OPTIONS),
    "default_targets": ("a mapping of texts", _by_name(_TEXT)),
    "alike": ("a tuple of texts", _TEXTS),
    "summary": ("a text", _TEXT),
    "paper": ("a text", _TEXT),
    "tags": ("a tuple of texts", _TEXTS),
    "examples": ("a tuple of options", _all(_OPTIONS)),
    "example_adapters": ("a tuple of options", _all(_OPTIONS)),
    "example_values": ("a function", _FUNCTION),
    "check": ("a function", _FUNCTION),
    "check_start": ("a function", _FUNCTION),
    "start_option": ("a text", _TEXT),
    "own_starts": ("a tuple of texts", _TEXTS),
    "optimizers": ("a tuple of `NamedOptimizer`", _all(_a(NamedOptimizer))),
    "resolve": ("a function", _FUNCTION),
    "follows_ties": ("true or false", _a(bool)),
    "identity_at_start": ("a function", _FUNCTION),
}

#: The same of a variant's record.
_OF_VARIANTS: Mapping[str, tuple[str, Fits]] = {
    "peft_type": ("a text", _TEXT),
    "name": ("a text", _TEXT),
    "tuner": ("a `MapTuner`, a tuple of them, or a function that chooses one", _is_map),
    "choices": ("a tuple of `MapTuner`", _all(_a(MapTuner))),
    "chosen": ("a function, or nothing", lambda value: value is None or callable(value)),
    "option": ("a text", _TEXT),
    "options": (
        "a subclass of `ConfigModel`, or nothing",
        lambda value: value is None or (isinstance(value, type) and issubclass(value, ConfigModel)),
    ),
    "start": (
        "a `Start` that changes base weights, or nothing",
        lambda value: value is None or (isinstance(value, Start) and value.changes_base),
    ),
    "check": ("a function", _FUNCTION),
    "layer_names": ("a tuple of texts", _TEXTS),
    "summary": ("a text", _TEXT),
    "paper": ("a text", _TEXT),
    "examples": ("a tuple of options", _all(_OPTIONS)),
    "chosen_by": ("options by name", _OPTIONS),
}


def variant_problem(key: str, variant: object) -> str:
    """What keeps the answer of a plugin's hook from being the record of the variant of this key; empty if nothing does."""
    if variant is None:
        return "no function is marked `@hookimpl` and called `peftc_variant`"
    if not isinstance(variant, Variant):
        return f"`peftc_variant` returned a `{type(variant).__name__}`, not a `Variant`"
    wrong = "; ".join(_of_other_types(variant, _OF_VARIANTS)) or "; ".join(_of_no_kinds(variant.tuners))
    if wrong:
        return wrong
    own = f"{variant.peft_type}.{variant.name}".lower()
    if key and own != key:
        return f"the record says `{own}`, the entry point `{key}`"
    return "" if variant.chosen is None else "`chosen` is for variants that a method brings itself; others go by name"


def contract_problem(peft_type: str, method: object) -> str:
    """What keeps the answer of a plugin's hook from being the record of the method of this type; empty if nothing does."""
    if method is None:
        return "no function is marked `@hookimpl` and called `peftc_tuner`"
    if not isinstance(method, TunerMethod):
        return f"`peftc_tuner` returned a `{type(method).__name__}`, not a `TunerMethod`"
    if method.peft_type != peft_type:
        return f"the record says `{method.peft_type}`, the entry point `{peft_type}`"
    given = method.tuner if isinstance(method.tuner, tuple) else (method.tuner,)
    wrong = "; ".join(_of_other_types(method, _FIELDS)) or "; ".join(_of_no_kinds((*given, *method.map_tuners)))
    if wrong:
        return wrong
    default = method.config.model_fields["peft_type"].default
    if default != method.peft_type:
        return f"`{method.config.__name__}.peft_type` is `{default}`, not `{method.peft_type}`"
    if not method.is_prompt and method.call_tuner is None and not (method.prefix and method.layer_names):
        return "a method on layers needs a `prefix` and `layer_names`"
    stray = [n for n in method.layer_names if not n.startswith(method.prefix)]
    return f"slots {stray} do not begin with the prefix `{method.prefix}`" if stray else ""


def _of_other_types(record: object, fields: Mapping[str, tuple[str, Fits]]) -> Iterator[str]:
    for name, (wanted, fits) in fields.items():
        value = getattr(record, name)
        if not fits(value):
            yield f"`{name}` is {value!r:.60}, not {wanted}"


def _of_no_kinds(tuners: Iterable[object]) -> Iterator[str]:
    for tuner in tuners:
        if isinstance(tuner, MapTuner):
            kinds = getattr(tuner, "supports", None)
            if not isinstance(kinds, frozenset) or not all(isinstance(kind, Kind) for kind in kinds):
                yield f"`{type(tuner).__name__}.supports` is {kinds!r:.60}, not a frozenset of `Kind`"
