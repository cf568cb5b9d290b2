"""The JSON Schema of a plan's file: what is read is held to it, and programs that read plans without peftc have it.

Written by hand, because a plan is made of frozen dataclasses in a compact form; a test holds real plans against it.
"""

from __future__ import annotations

from peftc.schema.parts import (
    DIGEST,
    FLAG,
    ROLE,
    SHAPE,
    SIZE,
    STORED_DTYPE,
    TEXT,
    TRAINED_DTYPE,
    Schema,
    layer,
    list_of,
    model,
    obj,
    or_null,
    ref,
    row,
    tensor,
)
from peftc.tuner.prompt import Place

_PLACE = (("module", TEXT), ("index in `kinds`", SIZE))
_UNDER = ("path in memory, under wrappers of the adapter", TEXT)
_PARAMETER = (
    ("parameter", TEXT),
    ("wrappers outside", SIZE),
    _UNDER,
    ("module in the wrapper that has the slots", TEXT),
    ("embedding that it is tied to", TEXT),
    ("names in a checkpoint, and of what they are the transpose", {"type": "array"}),
)


def plan_schema() -> Schema:
    """The schema, without its heading."""
    plan = obj(
        "What the adapters change in one base model.",
        format={"const": "peftc.plan"},
        version={"const": 1},
        base=or_null(ref("base"), "The base model as the spec names it; null for a model given in Python."),
        model=ref("model"),
        base_parameters={**SIZE, "description": "Parameters of the base model, tied ones counted once."},
        base_bytes={**SIZE, "description": "Bytes of the base model's parameters."},
        graph={**DIGEST, "description": "Digest of the base model's structure."},
        active=list_of(TEXT, "Adapters that act."),
        trainable={**SIZE, "description": "Trainable parameters of the adapted model."},
        total={**SIZE, "description": "All parameters of the adapted model."},
        adapters={**list_of(ref("adapter")), "minItems": 1},
        warnings=list_of(ref("warning")),
        digest={**DIGEST, "description": "Digest of everything else here."},
    )
    return {**plan, "$defs": _definitions()}


def _definitions() -> dict[str, Schema]:
    return {
        **_layer_definitions(),
        "tensor": tensor(),
        "model": model(),
        "base": _base(),
        "warning": obj(
            "What was told when the plan was made.",
            code={"type": "string", "pattern": "^PC[0-9]{3}$"},
            severity={"const": "warning"},
            what=TEXT,
            why=TEXT,
            fix=TEXT,
            where=obj(
                "The place.", file=TEXT, line=SIZE, column=SIZE, path=TEXT, optional=("file", "line", "column", "path")
            ),
        ),
        "save": _save(),
        "prompt": obj(
            "Virtual tokens, before the input or in the cache.",
            slots=list_of(ref("slot")),
            dtype=TRAINED_DTYPE,
            disk=TEXT,
            shape={**SHAPE, "minItems": 2, "maxItems": 2},
            embeddings=TEXT,
            place={"enum": [place.value for place in Place]},
            extra=list_of(row("What is saved beside the table.", ("key", TEXT), ("shape", SHAPE))),
        ),
        "call": _call(),
        "adapter": obj(
            "All that one adapter does.",
            name=TEXT,
            peft_type=TEXT,
            config={"type": "object", "description": "Its options, as in adapter_config.json, defaults resolved."},
            kinds=list_of(ref("kind")),
            maps=list_of(
                row(
                    "A module, or a parameter of it, or rows that train beside the method.",
                    *_PLACE,
                    *_PARAMETER,
                    optional=len(_PARAMETER),
                ),
                "Adapted modules, in order.",
            ),
            saves=list_of(ref("save")),
            trains=list_of(_trained()),
            prompt=or_null(ref("prompt"), "Null for methods that change layers."),
            modules=list_of(ref("wrapped"), "Wrapped modules, in order; missing if there is none."),
            call=ref("call"),
            needed_by={**TEXT, "description": "The adapter that weighs this one; missing if there is none."},
            origin={**TEXT, "description": "Where this one is read from, if it is weighed."},
            rewrites=list_of(_rewrite(), "Targets that were given by former names; missing if there are none."),
            notes=list_of(TEXT, "What was decided that no option says; missing if nothing was."),
            optional=("modules", "call", "needed_by", "origin", "rewrites", "notes"),
        ),
    }


def _base() -> Schema:
    names = ("model", "path", "gguf", "distribution", "file", "revision", "task_type", "dtype")
    texts = dict.fromkeys(names, TEXT)
    config: Schema = {"type": ["object", "string"]}
    what = "How the base model is named: as the section `base` of a spec."
    packed: Schema = {"type": "object", "description": "How the base is quantised, as transformers has it."}
    optional = (*names, "config", "quantization")
    return obj(what, optional=optional, config=config, quantization=packed, **texts)


def _rewrite() -> Schema:
    change = row("An option that is not that of one layer.", ("option", TEXT), ("before", {}), ("now", {}))
    return obj(
        "Targets by the names of layers that became one parameter.",
        entries=list_of(TEXT, "Entries of the config."),
        layers=list_of(TEXT, "Names of the layers, in the order of their rows; empty if it was always a parameter."),
        parameter={**TEXT, "description": "What it is called now, as in `target_parameters`."},
        options=list_of(change),
    )


def _save() -> Schema:
    return obj(
        "A module that is copied, trained whole and saved.",
        path=TEXT,
        reason=TEXT,
        tensors=list_of(ref("tensor")),
        buffers=list_of(ref("tensor")),
        lifted={
            "const": True,
            "description": "What of it is in half precision is copied as float32; missing for a copy as it is.",
        },
        tied=list_of(
            row("A tensor that is another copy's.", ("tensor", TEXT), ("parameter of the base", TEXT)),
            "Tensors that are one with those of another copy; missing if there are none.",
        ),
        optional=("lifted", "tied"),
    )


def _call() -> Schema:
    return obj(
        "Storage of an adapter that acts around calls; missing for all others.",
        owner={**TEXT, "description": "What the storage is called, at the root of the model."},
        slots=list_of(ref("slot")),
        dtype=TEXT,
        needs=list_of(TEXT, "Adapters that it weighs."),
        layers=list_of(TEXT, "Layers that those change, in the model's order."),
    )


def _trained() -> Schema:
    return row(
        "A base parameter that becomes trainable.",
        ("module", TEXT),
        ("parameter", TEXT),
        ("shape", SHAPE),
        ("dtype", TEXT),
        ("in an adapted module", FLAG),
        ("reason", TEXT),
        _UNDER,
        ("further names in the adapted base model", list_of(TEXT)),
        optional=2,
    )


def _layer_definitions() -> dict[str, Schema]:
    return {
        "layer": layer(),
        "wrapped": obj(
            "Modules of one kind that are wrapped.",
            paths=list_of(TEXT),
            inner={**TEXT, "pattern": r"^[^.]+$", "description": "What the module is called inside the wrapper."},
            layer=ref("layer"),
            slots=list_of(ref("slot")),
            dtype=TRAINED_DTYPE,
            reason={**TEXT, "description": "Why the modules are wrapped."},
            role=or_null(ROLE, "What the modules are for, where their names tell."),
        ),
        "slot": obj(
            "A tensor that the adapter adds to a layer.",
            optional=("named", "derived", "share", "home", "value", "blocks", "stored_tail"),
            name=TEXT,
            shape=SHAPE,
            container={"enum": ["module", "parameter"]},
            tail=TEXT,
            trainable=FLAG,
            saved=FLAG,
            dtype=or_null(STORED_DTYPE, "Null: as the site's."),
            named={"const": False, "description": "The adapter's name is no part of the tensor's; missing if it is."},
            derived={
                "const": True,
                "description": "A frozen buffer that the method computes; missing for a parameter.",
            },
            share={**TEXT, "description": "Layers with the same key have one tensor; missing if each has its own."},
            value={"type": "number", "description": "What a constant is filled with; missing for others."},
            home={**TEXT, "description": "The layer that a shared tensor is saved under; empty for the model itself."},
            stored_tail={**TEXT, "description": "What stands for the tail in a checkpoint; missing if it is the tail."},
            blocks={
                **SIZE,
                "description": "Parts along the first dimension; missing if there is one.",
            },
        ),
        "kind": obj(
            "What adapted modules of one kind have in common.",
            layer=ref("layer"),
            slots=list_of(ref("slot")),
            dtype=TRAINED_DTYPE,
            reason={**TEXT, "description": "Why the module is adapted."},
            role=or_null(ROLE, "What the module is for, where its name tells."),
            overrides=list_of(
                row("An option and its value.", ("option", TEXT), ("value", {})),
                "Options that patterns changed here.",
            ),
        ),
    }
