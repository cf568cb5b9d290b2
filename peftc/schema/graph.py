"""The JSON Schema of a module graph's file, which `peftc graph --out` writes and `peftc plan --graph` reads."""

from __future__ import annotations

from peftc.graph.nodes import READABLE
from peftc.schema.parts import ROLE, SIZE, TEXT, Schema, layer, list_of, model, obj, or_null, ref, row, tensor


def graph_schema() -> Schema:
    """The schema, without its heading."""
    block = row("The list of layers, and the place in it.", ("list", TEXT), ("index", SIZE))
    node = row(
        "A module.",
        ("path", TEXT),
        ("index in `facts`", SIZE),
        ("role", or_null(ROLE, "What the module is for, where that is known.")),
        ("block", or_null(block, "The numbered block that it is in.")),
    )
    former = row(
        "What a parameter was before it was fused.",
        ("module", TEXT),
        ("parameter", TEXT),
        ("layers", {**list_of(TEXT), "minItems": 1}),
    )
    split = row("How tensor parallelism would split a module or a parameter.", ("name", TEXT), ("style", TEXT))
    graph = obj(
        "The modules of a model.",
        version={"enum": list(READABLE)},
        model=ref("model"),
        facts=list_of(ref("layer"), "Kinds of modules."),
        nodes={**list_of(node, "All modules, parents first."), "minItems": 1},
        ties=list_of({**list_of(TEXT), "minItems": 1}, "Names of parameters that are one tensor."),
        former=list_of(former, "What weights were; missing in files of version 1."),
        splits=list_of(split, "How processes would share weights; missing in files of versions 1 and 2."),
        optional=("former", "splits"),
    )
    return {**graph, "$defs": {"model": model(), "layer": layer(), "tensor": tensor()}}
