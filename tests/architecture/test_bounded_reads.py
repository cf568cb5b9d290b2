"""Files of others are read in one way: regular, of a bounded size, and JSON without its traps."""

from __future__ import annotations

import ast

from tests.architecture.tree import Source, of_every, sources

#: What reads a file whole, or JSON as Python's parser takes it, and why that is in order there.
READERS = {
    "peftc.config.reader": "the bounded reader itself",
    "peftc.config.json_text": "the strict parser itself",
    "peftc.checkpoint.format": "a header, whose length is bounded before it is read",
    "peftc.checkpoint.report": "bounded; a plan that only explains, and whose facts are checked",
    "peftc.compiler.plan.serial": "text that was written a moment ago, by itself",
    "peftc.config.files": "a card in a folder of our own",
    "peftc.graph.cache": "bounded; what it holds is checked or built anew",
    "peftc.graph.files": "bounded bytes of the cache",
    "peftc.graph.locate": "bounded; configs of transformers may hold `Infinity`",
    "peftc.integrations.transformers.data": "lines, each bounded",
    "peftc.model.parts.identity": "a file of a bounded size; what is of another form tells nothing",
    "peftc.cli.generate": "prompts of the user, line by line",
    "peftc.cli.demo": "a file that comes with peftc",
    "peftc.cli.plugin_new": "templates that come with peftc",
    "peftc.cli.schema": "schemas that come with peftc",
    "peftc.compat.finder": "a member of that name, not a file",
    "peftc.compat.kinds": "data of peftc",
    "peftc.compat.pins": "data of peftc",
    "peftc.graph.roles": "data of peftc",
    "peftc.graph.targets": "data of peftc",
    "peftc.installed.tried": "data of peftc",
}
WHOLE = {"read_text", "read_bytes"}


@of_every(sources("peftc"))
def test_files_are_read_by_the_bounded_reader(source: Source) -> None:
    found = [
        f"{source.name}:{node.lineno}"
        for node in ast.walk(source.ast)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr in WHOLE or ast.unparse(node.func) in ("json.load", "json.loads"))
    ]
    if source.module.startswith("peftc.testing"):
        return  # the kit reads what it wrote
    assert bool(found) <= (source.module in READERS), f"use `peftc.config.reader` and `parse_json`: {found}"


def test_no_reason_is_left_over() -> None:
    names = {source.module for source in sources("peftc")}
    assert READERS.keys() <= names
