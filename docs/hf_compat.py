"""The page that compares peftc's public API with the reference's, name by name.

`reference_api.json` is the reference's public contract as data. What is here is looked at, not remembered: names are
resolved, signatures compared, members looked for on classes and on live objects.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import peftc
from peftc.registry.manager import Registry, default_registry

SAME, DIFFERS, ABSENT, TO_COME = "same", "differs", "not here", "to come"
DATA = Path(__file__).with_name("reference_api.json")
HEAD = "| name | status | why |\n| --- | --- | --- |"

#: Parts of a method's options that come with that method's variants: functions and classes of their own.
WAITING = {
    "ArrowConfig": "routing between adapters",
    "BdLoraConfig": "block-diagonal factors",
    "EvaConfig": "starts from data",
    "LoftQConfig": "starts that quantise",
    "LoraGAConfig": "starts from gradients",
    "MontecloraConfig": "a variant of the method",
    "VeloraConfig": "a variant of the method",
    "create_arrow_model": "routing between adapters",
    "find_kappa_target_modules": "choice of targets by weights",
    "get_eva_state_dict": "starts from data",
    "initialize_lora_eva_weights": "starts from data",
    "preprocess_loraga": "starts from gradients",
}

#: Why a name is not the same here; `Class.member`, or `*.member` for all classes.
REASONS: dict[str, str] = {
    "AdaptionPromptModel": "made from one config and a name, as every other model class",
    "AdaptionPromptModel.add_adapter": "`PeftModel.add_adapter`, or `inject_adapter` as of every other model class",
    "*.layers_mapping": "which kinds of layer a method adapts is declared by its mathematics (`peftc methods --matrix`)",
    "*.generate": "`PeftModel.generate`, which takes the same arguments",
    "*.subtract_mutated_init": "`save_pretrained(path_initial_model_for_weight_conversion=…)` does it",
    "NoMatchingPeftModuleError": "an error carries its diagnostics",
    "PeftMixedModel.load_adapter": "the arguments are those of `PeftModel`, by name",
    "PeftMixedModel.merge_and_unload": "the arguments are those of `PeftModel`, by name",
    "PeftMixedModel.save_pretrained": "saves; there it raises",
    "PeftMixedModel.unload": "there are none to take",
    "PeftModelForTokenClassification": "without a config there is nothing to adapt; there it fails later",
    **dict.fromkeys(
        ("PromptEmbedding", "PromptEncoder", "PrefixEncoder", "CPTEmbedding", "CartridgeEncoder"),
        "an encoder is made from the plan; the class is for `isinstance`",
    ),
    **dict.fromkeys(
        ("CPTEmbedding.calculate_loss", "CPTEmbedding.get_epsilon", "CPTEmbedding.get_projection"),
        "a step of the method's own mathematics, which is in its plugin",
    ),
    "CPTEmbedding.set_updated_tokens": "which tokens train follows from the config",
    "CartridgeEncoder.embedding": "the parts are `trainable_embedding` and `frozen_embedding`; calling the encoder joins them",
    "CartridgeEncoder.forward": "the table has no indices; calling the encoder gives all of it",
    "PrefixEncoder.forward": "the table has no indices but those of its rows, named `indices`",
    "CartridgeEncoder.reset_parameters": "a fresh adapter is made by `add_adapter`",
}


#: Where a fresh adapter has other numbers than the reference's, and why.
OTHER_STARTS: dict[str, str] = {
    "HRA with `apply_GS`": "the reference starts from pairs of equal columns, of which Gram-Schmidt leaves nothing",
    "HIRA with `gaussian` on convolutions": "the reference leaves the option out there",
    "BOFT with several butterfly factors": "the reference trains one where its CUDA extension cannot be built",
    "LORA on `MultiheadAttention`": "the reference makes the adapter of the output layer twice, before and after the other's",
    "XLORA": "the reference draws starts for the adapters that it loads, before its router",
    "layers and options that the reference refuses or adapts otherwise": "as grouped convolutions, but for LORA, LOHA and LOKR",
}


@dataclass(frozen=True)
class Row:
    """One name of the reference."""

    name: str
    status: str
    why: str = ""

    def __str__(self) -> str:
        return f"| `{self.name}` | {self.status} | {self.why} |"


#: What *same* does not say of states that a model can be in.
STATES = """- Weights that accelerate offloads (`cpu_offload`, `disk_offload`, `device_map` with `cpu` or `disk`): forward, training,
  generation, merging, saving, loading and conversion do what they do on others. A gradient of an adapter that is itself offloaded
  is refused (PC536): offload the base first. Weights that a layer computes (`weight_norm`, parametrizations) are adapted and
  trained beside; merging into them is refused (PC536).
- When the active adapter is deleted, the first that remains takes over, with a warning (PC560), and trains if the deleted one
  did, copies of `modules_to_save` too. When none remains, the model is its base.
- A method whose output has a constant (`y * scale + shift`) merges into weight and bias; a layer without a bias gets one then, with
  a warning, and unmerging takes it away again.
- Copies of `modules_to_save` beside a base in half precision are float32 while `autocast_adapter_dtype` is on, as factors are: in the
  reference they stay in the base's dtype. What they give, what is merged and what is in files has the base's dtype.
- `disable_adapter()` is a state of the model: other threads see it. `adapter_names=["__base__"]` is one of the call."""


def compat_page(registry: Registry) -> str:
    """The whole page."""
    rows = list(all_rows(registry))
    counts = Counter(row.status for row in rows)
    here = len(rows) - counts[TO_COME]
    other = [row for row in rows if row.status in (DIFFERS, ABSENT)]
    numbers = "\n".join(f"| {status} | {counts[status]} |" for status in (SAME, DIFFERS, ABSENT, TO_COME))
    blocks = [
        "# The API of Hugging Face PEFT, name by name",
        f"Every public function, class and member of `peft` {_api()['version']} and its status here. *Same*: the name is"
        " importable from `peftc`, takes the same arguments with the same defaults, and means the same. *To come*: it"
        " belongs to a method, or a variant of one, that peftc does not have yet.",
        f"| status | names |\n| --- | --- |\n{numbers}",
        f"Of the {here} names that are not to come, {100 * counts[SAME] / here:.1f} % are the same.",
        "## What is not the same",
        "\n".join([HEAD, *map(str, other)]) if other else "Nothing.",
        "## Seeds",
        "After the same `torch.manual_seed` a fresh adapter has the reference's numbers, bit for bit, whatever the method, the"
        " kind of layer and the base's dtype, and torch's generator is left where the reference leaves it. Loading draws"
        " nothing. `tests/methods/test_starts.py` holds it. Other numbers:",
        "\n".join(f"- {where}: {why}." for where, why in OTHER_STARTS.items()),
        "## States",
        STATES,
        "## Every name",
        "\n".join([HEAD, *map(str, rows)]),
    ]
    return "\n\n".join(blocks) + "\n"


def all_rows(registry: Registry) -> Iterator[Row]:
    """A row for every name: functions, data, enums with their members, classes with their members."""
    api = _api()
    waiting = _waiting(registry)
    for name, signature in api["functions"].items():
        yield waiting.get(name) or _callable_row(name, signature, _found(name))
    for name in api["data"]:
        yield _row(name, _found(name) is not None)
    for name, members in api["enums"].items():
        yield _row(name, _found(name) is not None)
        for member in members:
            yield _enum_member(name, member, registry)
    for name, described in api["classes"].items():
        if name in waiting:
            yield waiting[name]
            yield from (Row(f"{name}.{member}", TO_COME, waiting[name].why) for member in described["members"])
        else:
            yield from _class_rows(name, described)


def _enum_member(name: str, member: str, registry: Registry) -> Row:
    full = f"{name}.{member}"
    if name == "PeftType" and member not in registry.names:
        return Row(full, TO_COME, f"the method {member}")
    return _row(full, hasattr(_found(name), member))


def _class_rows(name: str, described: Mapping[str, Any]) -> Iterator[Row]:
    cls = _found(name)
    if cls is None:
        yield _row(name, False)
        yield from (_row(f"{name}.{member}", False) for member in described["members"])
        return
    strange = [base for base in described["bases"] if (b := _found(base)) is not None and not issubclass(cls, b)]
    if strange:
        yield _row(name, True, f"is no `{strange[0]}`")
    elif described["init"]:
        inherited = any(_api()["classes"].get(base, {}).get("init") for base in described["bases"])
        # there the further keywords are those of the class above, which has a row of its own
        signature = described["init"].replace(", **kwargs)", ")") if inherited else described["init"]
        yield _callable_row(name, signature, cls.__init__)
    else:
        yield _row(name, True)
    for member, text in described["members"].items():
        kind, _, signature = text.partition(" ")
        full = f"{name}.{member}"
        if kind in ("method", "classmethod", "staticmethod"):
            yield _callable_row(full, signature, inspect.getattr_static(cls, member, None) and getattr(cls, member))
        else:
            yield _row(full, _has(cls, member))


def _has(cls: Any, member: str) -> bool:
    """Whether instances have the attribute: on the class, as an option, or set when an instance is made."""
    fields = cls.model_fields if issubclass(cls, BaseModel) else getattr(cls, "__dataclass_fields__", {})
    return hasattr(cls, member) or member in fields or hasattr(_live(cls), member)


@cache
def _live(cls: Any) -> Any:
    """A live object of the class, where one is easily made; else None."""
    from peftc.testing.models import MODELS

    registry = default_registry()
    tiny = next(model for model in MODELS if model.is_language_model)
    found = registry.find_name(cls.__name__)
    if found is not None and found[1] == "model" and found[0].examples:
        return peftc.get_peft_model(tiny.build(), found[0].config(**found[0].examples[0])).base_model
    if not issubclass(cls, (peftc.PeftModel, getattr(peftc, "PeftMixedModel", peftc.PeftModel))):
        return None
    method = next(m for m in map(registry.get, registry.names) if m.examples and m.adapts_layers)
    return cls(tiny.build(), method.config(**method.examples[0]))


def _callable_row(name: str, signature: str, ours: Any) -> Row:
    if ours is None:
        return _row(name, False)
    return _row(name, True, _mismatch(_parameters(signature), inspect.signature(inspect.unwrap(ours))))


def _row(name: str, exists: bool, difference: str = "") -> Row:
    if exists and not difference:
        return Row(name, SAME)
    reason = REASONS.get(name) or REASONS.get(f"*.{name.rpartition('.')[2]}") or ""
    why = ": ".join(part for part in (difference, reason) if part)
    return Row(name, DIFFERS if exists else ABSENT, why)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the reference's function; `default` is its source text."""

    name: str
    kind: str
    default: str | None = None


def _parameters(signature: str) -> list[Parameter]:
    (function,) = ast.parse(f"def f{signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    spec = function.args
    placed = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(placed) - len(spec.defaults)) + [ast.unparse(d) for d in spec.defaults]
    found = [Parameter(a.arg, "placed", d) for a, d in zip(placed, defaults, strict=True)]
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        found.append(Parameter(argument.arg, "named", None if default is None else ast.unparse(default)))
    found += [Parameter(spec.vararg.arg, "rest")] if spec.vararg else []
    return found + ([Parameter(spec.kwarg.arg, "keywords")] if spec.kwarg else [])


def _mismatch(theirs: list[Parameter], ours: inspect.Signature) -> str:
    """What a call that the reference accepts would stumble over here; empty if nothing."""
    own = {p.name: p for p in ours.parameters.values()}
    kinds = {p.kind for p in own.values()}
    placed = [p.name for p in own.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for position, parameter in enumerate([p for p in theirs if p.name != "self"], start="self" in own or "cls" in own):
        mine = own.get(parameter.name)
        if parameter.kind == "rest":
            problem = "" if inspect.Parameter.VAR_POSITIONAL in kinds else "takes no further arguments"
        elif parameter.kind == "keywords":
            problem = "" if inspect.Parameter.VAR_KEYWORD in kinds else "takes no further keywords"
        elif mine is None:
            problem = "" if inspect.Parameter.VAR_KEYWORD in kinds else f"does not take `{parameter.name}`"
        elif parameter.kind == "placed" and placed[position : position + 1] != [parameter.name]:
            problem = f"`{parameter.name}` is at another place"
        else:
            problem = _other_default(parameter, mine)
        if problem:
            return problem
    return _demanded(theirs, own)


def _other_default(theirs: Parameter, mine: inspect.Parameter) -> str:
    if theirs.default is None:
        return ""
    if mine.default is mine.empty:
        return f"`{theirs.name}` must be given"
    try:
        wanted = ast.literal_eval(theirs.default)
    except ValueError:
        return ""  # a name, which cannot be compared
    own = None if callable(mine.default) else mine.default  # what is recorded of the reference has no functions
    return "" if own == wanted else f"`{theirs.name}` is {mine.default!r} by default, there {wanted!r}"


def _demanded(theirs: list[Parameter], own: Mapping[str, inspect.Parameter]) -> str:
    """An argument that only ours cannot do without."""
    known = {p.name for p in theirs} | {"self", "cls"}
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [n for n, p in own.items() if n not in known and p.default is p.empty and p.kind not in fixed]
    return f"needs `{needed[0]}`" if needed else ""


def _found(name: str) -> Any:
    return getattr(peftc, name, None)


def _waiting(registry: Registry) -> dict[str, Row]:
    """Names that belong to methods, or variants, that are not here yet."""
    rows = {name: Row(name, TO_COME, why) for name, why in WAITING.items() if _found(name) is None}
    for peft_type, names in _api()["methods"].items():
        if peft_type not in registry.names:
            rows |= {name: Row(name, TO_COME, f"the method {peft_type}") for name in names}
    return rows


@cache
def _api() -> dict[str, Any]:
    api: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return api
