"""What the hand-written schemas are made of: short forms of JSON Schema, and facts that plans and graphs have in common."""

from __future__ import annotations

from typing import Any

from peftc.graph.nodes import Kind, Role
from peftc.graph.tensors import DTYPE_BYTES, TRAINABLE
from peftc.limits import MAX_DIMENSIONS, MAX_INTEGER

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
SIZE: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
SHAPE: Schema = {"type": "array", "items": SIZE, "maxItems": MAX_DIMENSIONS}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
ROLE: Schema = {"enum": [role.value for role in Role]}
#: Number formats that adapters are stored in; those of a base model's tensors are whatever its library has.
STORED_DTYPE: Schema = {"enum": sorted(DTYPE_BYTES)}
TRAINED_DTYPE: Schema = {"enum": sorted(TRAINABLE)}


def obj(description: str, optional: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with these members, and no others."""
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def row(description: str, *columns: tuple[str, Schema], optional: int = 0) -> Schema:
    """A list with these columns, of which the last few may be missing."""
    return {
        "type": "array",
        "description": description,
        "prefixItems": [{**schema, "title": title} for title, schema in columns],
        "minItems": len(columns) - optional,
        "items": False,
    }


def list_of(items: Schema, description: str = "") -> Schema:
    """A list of such items."""
    return {"type": "array", "items": items, **({"description": description} if description else {})}


def ref(name: str) -> Schema:
    """What is defined under a name."""
    return {"$ref": f"#/$defs/{name}"}


def or_null(schema: Schema, description: str) -> Schema:
    """Such a value, or null."""
    return {"anyOf": [schema, {"type": "null"}], "description": description}


def tensor() -> Schema:
    """A tensor of a module."""
    return row("A tensor.", ("name", TEXT), ("shape", SHAPE), ("dtype", TEXT))


def model() -> Schema:
    """Facts about a model as a whole."""
    text: Schema = {"type": ["string", "null"]}
    return obj(
        "Facts about the base model: class, model type, embeddings, dimensions.",
        cls=TEXT,
        model_type=text,
        name_or_path=text,
        input_embeddings=text,
        output_embeddings=text,
        dims={"type": "object", "additionalProperties": {"type": "integer"}},
        is_encoder_decoder=FLAG,
    )


def _packed() -> Schema:
    return obj(
        "How the weight is stored, where that is in a form of its own.",
        storage={**TEXT, "description": "Name of the storage."},
        in_features=SIZE,
        out_features=SIZE,
        dtype={**TEXT, "description": "The dtype of the weight as it is opened."},
        nbytes={**SIZE, "description": "All bytes of the weight as it is stored."},
        passes_gradients={**FLAG, "description": "Whether a call gives gradients to its input."},
        optional=("passes_gradients",),
    )


def layer() -> Schema:
    """Facts of a kind of layer; refers to `tensor`."""
    return obj(
        "Facts of a kind of layer.",
        kind={"enum": [kind.value for kind in Kind]},
        cls=TEXT,
        in_features=SIZE,
        out_features=SIZE,
        kernel=SHAPE,
        groups=SIZE,
        experts={**SIZE, "description": "How many maps a parameter holds; missing for other layers."},
        transposed={**FLAG, "description": "Whether experts are stored as (experts, in, out)."},
        packed=_packed(),
        optional=("experts", "transposed", "packed"),
        note={**TEXT, "description": "Why it is none of the kinds that it looks like, if so."},
        params=list_of(ref("tensor")),
        buffers=list_of(ref("tensor")),
    )
