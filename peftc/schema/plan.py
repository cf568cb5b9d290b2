"""The JSON Schema of a plan's file, for programs that read plans without peftc: policy checks, dashboards, review bots.

Written by hand, because a plan is made of frozen dataclasses in a compact form; a test holds real plans against it.
"""

from __future__ import annotations

from typing import Any

from peftc.tuner.prompt import Place

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_SIZE: Schema = {"type": "integer", "minimum": 0}
_SHAPE: Schema = {"type": "array", "items": _SIZE}
_PLACE = (("module", _TEXT), ("index in `kinds`", _SIZE))
_PARAMETER = (("parameter", _TEXT), ("wrappers outside", _SIZE))
_DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _object(description: str, optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _row(description: str, *columns: tuple[str, Schema], optional: int = 0) -> Schema:
    """A list with these columns, of which the last few may be missing."""
    return {
        "type": "array",
        "description": description,
        "prefixItems": [{**schema, "title": title} for title, schema in columns],
        "minItems": len(columns) - optional,
        "items": False,
    }


def _list(items: Schema, description: str = "") -> Schema:
    return {"type": "array", "items": items, **({"description": description} if description else {})}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _or_null(schema: Schema, description: str) -> Schema:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def plan_schema() -> Schema:
    """The schema, without its heading."""
    plan = _object(
        "What the adapters change in one base model.",
        format={"const": "peftc.plan"},
        version={"const": 1},
        base=_or_null(_ref("base"), "The base model as the spec names it; null for a model given in Python."),
        model={
            "type": "object",
            "description": "Facts about the base model: class, model type, embeddings, dimensions.",
        },
        base_parameters={**_SIZE, "description": "Parameters of the base model, tied ones counted once."},
        base_bytes={**_SIZE, "description": "Bytes of the base model's parameters."},
        graph={**_DIGEST, "description": "Digest of the base model's structure."},
        active=_list(_TEXT, "Adapters that act."),
        trainable={**_SIZE, "description": "Trainable parameters of the adapted model."},
        total={**_SIZE, "description": "All parameters of the adapted model."},
        adapters=_list(_ref("adapter")),
        warnings=_list(_ref("warning")),
        digest={**_DIGEST, "description": "Digest of everything else here."},
    )
    return {**plan, "$defs": _definitions()}


def _definitions() -> dict[str, Schema]:
    tensor = _row("A tensor.", ("name", _TEXT), ("shape", _SHAPE), ("dtype", _TEXT))
    trained = _row(
        "A base parameter that becomes trainable.",
        ("module", _TEXT),
        ("parameter", _TEXT),
        ("shape", _SHAPE),
        ("dtype", _TEXT),
        ("in an adapted module", _FLAG),
        ("reason", _TEXT),
    )
    return {
        **_layer_definitions(),
        "tensor": tensor,
        "base": {"type": "object", "description": "How the base model is named: as the section `base` of a spec."},
        "warning": {
            "type": "object",
            "required": ["code", "severity", "what", "why", "fix"],
            "properties": {"code": {"type": "string", "pattern": "^PC[0-9]{3}$"}, "severity": {"const": "warning"}},
        },
        "save": _object(
            "A module that is copied, trained whole and saved.",
            path=_TEXT,
            reason=_TEXT,
            tensors=_list(_ref("tensor")),
            buffers=_list(_ref("tensor")),
        ),
        "prompt": _object(
            "Virtual tokens, before the input or in the cache.",
            slots=_list(_ref("slot")),
            dtype=_TEXT,
            disk=_TEXT,
            shape=_SHAPE,
            embeddings=_TEXT,
            place={"enum": [place.value for place in Place]},
            extra=_list(_row("What is saved beside the table.", ("key", _TEXT), ("shape", _SHAPE))),
        ),
        "call": _call(),
        "adapter": _object(
            "All that one adapter does.",
            name=_TEXT,
            peft_type=_TEXT,
            config={"type": "object", "description": "Its options, as in adapter_config.json, defaults resolved."},
            kinds=_list(_ref("kind")),
            maps=_list(
                _row("A module, or a parameter of it.", *_PLACE, *_PARAMETER, optional=len(_PARAMETER)),
                "Adapted modules, in order.",
            ),
            saves=_list(_ref("save")),
            trains=_list(trained),
            prompt=_or_null(_ref("prompt"), "Null for methods that change layers."),
            modules=_list(_ref("wrapped"), "Wrapped modules, in order; missing if there is none."),
            call=_ref("call"),
            needed_by={**_TEXT, "description": "The adapter that weighs this one; missing if there is none."},
            origin={**_TEXT, "description": "Where this one is read from, if it is weighed."},
            rewrites=_list(_rewrite(), "Targets that were given by former names; missing if there are none."),
            notes=_list(_TEXT, "What was decided that no option says; missing if nothing was."),
            optional=("modules", "call", "needed_by", "origin", "rewrites", "notes"),
        ),
    }


def _rewrite() -> Schema:
    change = _row("An option that is not that of one layer.", ("option", _TEXT), ("before", {}), ("now", {}))
    return _object(
        "Targets by the names of layers that became one parameter.",
        entries=_list(_TEXT, "Entries of the config."),
        layers=_list(_TEXT, "Names of the layers, in the order of their rows; empty if it was always a parameter."),
        parameter={**_TEXT, "description": "What it is called now, as in `target_parameters`."},
        options=_list(change),
    )


def _call() -> Schema:
    return _object(
        "Storage of an adapter that acts around calls; missing for all others.",
        owner={**_TEXT, "description": "What the storage is called, at the root of the model."},
        slots=_list(_ref("slot")),
        dtype=_TEXT,
        needs=_list(_TEXT, "Adapters that it weighs."),
        layers=_list(_TEXT, "Layers that those change, in the model's order."),
    )


def _layer_definitions() -> dict[str, Schema]:
    return {
        "layer": _object(
            "Facts of a kind of layer.",
            kind=_TEXT,
            cls=_TEXT,
            in_features=_SIZE,
            out_features=_SIZE,
            kernel=_SHAPE,
            groups=_SIZE,
            experts={**_SIZE, "description": "How many maps a parameter holds; missing for other layers."},
            transposed={**_FLAG, "description": "Whether experts are stored as (experts, in, out)."},
            optional=("experts", "transposed"),
            note={**_TEXT, "description": "Why it is none of the kinds that it looks like, if so."},
            params=_list(_ref("tensor")),
            buffers=_list(_ref("tensor")),
        ),
        "wrapped": _object(
            "Modules of one kind that are wrapped.",
            paths=_list(_TEXT),
            inner={**_TEXT, "description": "What the module is called inside the wrapper."},
            layer=_ref("layer"),
            slots=_list(_ref("slot")),
            dtype=_TEXT,
            reason={**_TEXT, "description": "Why the modules are wrapped."},
            role=_or_null(_TEXT, "What the modules are for, where their names tell."),
        ),
        "slot": _object(
            "A tensor that the adapter adds to a layer.",
            optional=("named", "derived", "share", "home", "value", "blocks"),
            name=_TEXT,
            shape=_SHAPE,
            container={"enum": ["module", "parameter"]},
            tail=_TEXT,
            trainable=_FLAG,
            saved=_FLAG,
            dtype=_or_null(_TEXT, "Null: as the site's."),
            named={"const": False, "description": "The adapter's name is no part of the tensor's; missing if it is."},
            derived={
                "const": True,
                "description": "A frozen buffer that the method computes; missing for a parameter.",
            },
            share={**_TEXT, "description": "Layers with the same key have one tensor; missing if each has its own."},
            value={"type": "number", "description": "What a constant is filled with; missing for others."},
            home={**_TEXT, "description": "The layer that a shared tensor is saved under; empty for the model itself."},
            blocks={
                "type": "integer",
                "description": "Parts along the first dimension that are padded each by itself.",
            },
        ),
        "kind": _object(
            "What adapted modules of one kind have in common.",
            layer=_ref("layer"),
            slots=_list(_ref("slot")),
            dtype=_TEXT,
            reason={**_TEXT, "description": "Why the module is adapted."},
            role=_or_null(_TEXT, "What the module is for, where its name tells."),
            overrides=_list(
                _row("An option and its value.", ("option", _TEXT), ("value", {})),
                "Options that patterns changed here.",
            ),
        ),
    }
