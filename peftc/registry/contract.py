"""What a method's record must be: the type of every field, looked at once when the plugin is loaded.

The core relies on it without asking again, so that a wrong record is the plugin's problem alone, told by its field's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peftc.config.base import PeftConfig
from peftc.graph.nodes import Kind
from peftc.tuner.calls import CallTuner
from peftc.tuner.method import MapTuner, TunerMethod
from peftc.tuner.modules import ModuleTuner
from peftc.tuner.prompt import PromptTuner

Fits = Callable[[Any], bool]


def _a(kind: type | tuple[type, ...]) -> Fits:
    return lambda value: isinstance(value, kind)


def _all(fits: Fits) -> Fits:
    return lambda value: isinstance(value, tuple) and all(map(fits, value))


def _by_name(fits: Fits) -> Fits:
    return lambda value: isinstance(value, Mapping) and all(isinstance(k, str) and fits(v) for k, v in value.items())


def _is_tuner(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(tuner, MapTuner) for tuner in value)
    return isinstance(value, (MapTuner, ModuleTuner, PromptTuner, CallTuner)) or callable(value)


_TEXT, _TEXTS, _FUNCTION, _OPTIONS = _a(str), _all(_a(str)), callable, _by_name(lambda value: True)

#: Field of a record -> what its value is, and whether one is that.
_FIELDS: Mapping[str, tuple[str, Fits]] = {
    "peft_type": ("a text", _TEXT),
    "config": ("a subclass of `PeftConfig`", lambda value: isinstance(value, type) and issubclass(value, PeftConfig)),
    "tuner": ("a tuner, a tuple of `MapTuner`, or a function that chooses one", _is_tuner),
    "choices": ("a tuple of `MapTuner`", _all(_a(MapTuner))),
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
    "resolve": ("a function", _FUNCTION),
    "follows_ties": ("true or false", _a(bool)),
    "identity_at_start": ("a function", _FUNCTION),
}


def contract_problem(peft_type: str, method: object) -> str:
    """What keeps the answer of a plugin's hook from being the record of the method of this type; empty if nothing does."""
    if method is None:
        return "no function is marked `@hookimpl` and called `peftc_tuner`"
    if not isinstance(method, TunerMethod):
        return f"`peftc_tuner` returned a `{type(method).__name__}`, not a `TunerMethod`"
    if method.peft_type != peft_type:
        return f"the record says `{method.peft_type}`, the entry point `{peft_type}`"
    wrong = "; ".join(_of_other_types(method))
    if wrong:
        return wrong
    default = method.config.model_fields["peft_type"].default
    if default != method.peft_type:
        return f"`{method.config.__name__}.peft_type` is `{default}`, not `{method.peft_type}`"
    if not method.is_prompt and method.call_tuner is None and not (method.prefix and method.layer_names):
        return "a method on layers needs a `prefix` and `layer_names`"
    stray = [n for n in method.layer_names if not n.startswith(method.prefix)]
    return f"slots {stray} do not begin with the prefix `{method.prefix}`" if stray else ""


def _of_other_types(method: TunerMethod) -> Iterator[str]:
    for name, (wanted, fits) in _FIELDS.items():
        value = getattr(method, name)
        if not fits(value):
            yield f"`{name}` is {value!r:.60}, not {wanted}"
    given = method.tuner if isinstance(method.tuner, tuple) else (method.tuner,)
    for tuner in (*given, *(method.choices if isinstance(method.choices, tuple) else ())):
        if isinstance(tuner, MapTuner):
            kinds = getattr(tuner, "supports", None)
            if not isinstance(kinds, frozenset) or not all(isinstance(kind, Kind) for kind in kinds):
                yield f"`{type(tuner).__name__}.supports` is {kinds!r:.60}, not a frozenset of `Kind`"
