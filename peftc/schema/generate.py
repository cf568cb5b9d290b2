"""JSON Schemas made from the configs, which are the one source: per method and for specs; those of plans and graphs.

The text is canonical (sorted keys, two spaces, newline at the end), so that a committed schema is compared byte by byte and
a diff shows every change of the options. Types of other distributions get theirs the same way, at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.config.docs import describe
from peftc.config.sections import TrainSection
from peftc.config.spec import AdapterSpec
from peftc.diagnostics import PeftcError, did_you_mean
from peftc.registry import shorthand
from peftc.registry.boundary import boundary
from peftc.registry.manager import OWN, Registry
from peftc.registry.optimizers import PLAIN
from peftc.schema.graph import graph_schema
from peftc.schema.plan import plan_schema
from peftc.tuner.method import TunerMethod
from peftc.tuner.optimizer import NamedOptimizer

DIALECT = "https://json-schema.org/draft/2020-12/schema"

SPEC, PLAN, GRAPH = "spec", "plan", "graph"

Schema = dict[str, Any]


class _Generator(GenerateJsonSchema):
    """With the docstrings of options, and without a title on each: editors would show it in place of the description."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: Any) -> Schema:
        made = super().model_schema(schema)
        for name, option in made.get("properties", {}).items():
            text = describe(schema["cls"], name)
            if text:
                option["description"] = text
        return made


def structure_of(method: TunerMethod) -> Schema:
    """The schema of a config of one method, without texts: for validation."""
    with boundary(method.peft_type, "options"):
        return _typed(method.config.model_json_schema(), method)


def structure_of_spec() -> Schema:
    """The schema of a spec, without texts; it leaves the options of adapters to the schemas of their methods."""
    return AdapterSpec.model_json_schema()


def method_schema(method: TunerMethod) -> Schema:
    """The schema of a config of one method."""
    with boundary(method.peft_type, "options"):
        schema = method.config.model_json_schema(schema_generator=_Generator)
    return _headed(
        _typed(schema, method), method.peft_type.lower(), f"{method.peft_type}: {method.summary}".rstrip(": ")
    )


def spec_schema(registry: Registry) -> Schema:
    """The schema of a spec; an adapter's options follow its `peft_type`, for the bundled methods."""
    methods = [registry.get(peft_type) for peft_type in bundled(registry)]
    named = [*PLAIN, *(own for method in methods for own in method.optimizers)]
    models: list[type[Any]] = [
        AdapterSpec,
        TrainSection,
        *(m.config for m in methods),
        *dict.fromkeys(own.options for own in named),
    ]
    schema, definitions = _with_definitions(models)
    for method in methods:
        _typed(definitions[schema[method.config]], method)
    root = definitions.pop(schema[AdapterSpec])
    definitions["Adapter"] = _adapter(methods, schema)
    _optimizers(definitions[schema[TrainSection]], named, schema)
    root["properties"]["adapters"]["additionalProperties"] = {"$ref": "#/$defs/Adapter"}
    return _headed({**root, "$defs": definitions}, SPEC, "peftc spec: a base model, adapters, and what to do with them")


def bundled(registry: Registry) -> list[str]:
    """PEFT types that this distribution brings, sorted."""
    return sorted(claim.peft_type for claim in registry.claims if claim.distribution == OWN)


def names(registry: Registry) -> list[str]:
    """Names of the schemas that are committed."""
    return [*(peft_type.lower() for peft_type in bundled(registry)), GRAPH, PLAN, SPEC]


def schema_named(name: str, registry: Registry) -> Schema:
    """The schema called `spec`, `plan`, `graph`, or like a PEFT type in any case. Raises `PeftcError` for an unknown type."""
    special: Mapping[str, Callable[[], Schema]] = {
        SPEC: lambda: spec_schema(registry),
        PLAN: lambda: _headed(plan_schema(), PLAN, "peftc plan: exactly what an adapter changes"),
        GRAPH: lambda: _headed(graph_schema(), GRAPH, "peftc graph: the modules of a model, without its weights"),
    }
    make = special.get(name.lower())
    if make is not None:
        return make()
    close = did_you_mean(name.lower(), special)
    if close and name.upper() not in registry.names:
        raise PeftcError(rules.UNKNOWN_TYPE(f"There is no schema and no method `{name}`", fix=close))
    return method_schema(registry.get(name.upper()))


def file_name(name: str) -> str:
    """The file of a schema: `spec.schema.json`."""
    return f"{name.lower()}.schema.json"


def to_text(schema: Schema) -> str:
    """Canonical text."""
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _with_definitions(models: list[type[Any]]) -> tuple[dict[type[Any], str], dict[str, Schema]]:
    """Name of each model's definition, and all definitions."""
    references, schema = models_json_schema([(m, "validation") for m in models], schema_generator=_Generator)
    named = {model: references[(model, "validation")]["$ref"].rpartition("/")[2] for model in models}
    return named, schema["$defs"]


def _typed(schema: Schema, method: TunerMethod) -> Schema:
    """Fix the type, which a document must name; leave out what no document has."""
    for name, field in method.config.model_fields.items():
        if field.exclude:
            del schema["properties"][name]
    schema["properties"]["peft_type"] = {"const": method.peft_type, "description": _line(method.summary)}
    if shorthand.takes(method):
        schema["properties"][shorthand.INIT] = shorthand.schema()
    schema["required"] = sorted({"peft_type", *schema.get("required", [])})
    return schema


def _optimizers(section: Schema, named: list[NamedOptimizer], references: Mapping[type[Any], str]) -> None:
    """Let the options of an optimiser follow its name."""
    known = [{"const": own.name, "description": _line(own.summary or f"{own.title}.")} for own in named]
    other = {"type": "string", "description": "Another spelling, or one that another installed distribution brings."}
    option = section["properties"]["optimizer"]
    option["anyOf"] = [*known, other, {"type": "null"}]
    section["allOf"] = [
        {
            "if": {"properties": {"optimizer": {"const": own.name}}, "required": ["optimizer"]},
            "then": {
                "properties": {
                    "optimizer_options": {"anyOf": [{"$ref": f"#/$defs/{references[own.options]}"}, {"type": "null"}]}
                }
            },
        }
        for own in named
    ]


def _adapter(methods: list[TunerMethod], references: Mapping[type[PeftConfig], str]) -> Schema:
    types = [{"const": m.peft_type, "description": _line(m.summary)} for m in methods]
    other = {"type": "string", "description": "A type that another installed distribution registers."}
    return {
        "type": "object",
        "required": ["peft_type"],
        "properties": {"peft_type": {"description": "The method.", "anyOf": [*types, other]}},
        "allOf": [
            {
                "if": {"properties": {"peft_type": {"const": m.peft_type}}, "required": ["peft_type"]},
                "then": {"$ref": f"#/$defs/{references[m.config]}"},
            }
            for m in methods
        ],
    }


def _headed(schema: Schema, name: str, title: str) -> Schema:
    headed = {**schema, "$schema": DIALECT, "$id": f"urn:peftc:schema:1:{name}", "title": title}
    one_line: Schema = _one_line(headed)
    return one_line


def _one_line(value: Any) -> Any:
    """Descriptions with the line breaks of the source taken out."""
    if isinstance(value, list):
        return [_one_line(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _line(v) if k == "description" and isinstance(v, str) else _one_line(v) for k, v in value.items()}


def _line(text: str) -> str:
    return " ".join(text.split())
