"""`peftc methods`: what can be used as `peft_type`, and the options of one method with types, defaults and meaning."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from peftc.cli import console
from peftc.diagnostics import PeftcError

if TYPE_CHECKING:
    from peftc.diagnostics import Diagnostic
    from peftc.registry.manager import Registry
    from peftc.tuner.method import TunerMethod

HEADS = ("OPTION", "TYPE", "DEFAULT", "MEANING")

HELP = "List the methods, or the options of one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a PEFT type, in any case; left out: list all")
    parser.add_argument(
        "--matrix", action="store_true", help="show what can be done with each method, and on which layers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from peftc.registry.manager import default_registry

    registry = default_registry()
    if args.matrix:
        return _print_matrix([args.name.upper()] if args.name else registry.names, registry, args.json)
    if args.name:
        method = registry.get(args.name.upper())
        _print_one(method, args.json)
        return 0
    return _print_all(registry, args.json)


def _loaded(names: Iterable[str], registry: Registry) -> tuple[list[TunerMethod], list[Diagnostic]]:
    """The methods of those names, and what is wrong with those that cannot be loaded."""
    found: list[TunerMethod] = []
    broken: list[Diagnostic] = []
    for name in names:
        try:
            found.append(registry.get(name))
        except PeftcError as error:
            broken.extend(error.diagnostics)
    return found, broken


def _print_matrix(names: Iterable[str], registry: Registry, as_json: bool) -> int:
    """A table for each group of features: a row for each method."""
    from peftc.tuner.features import MATRIX, features_of

    found, broken = _loaded(names, registry)
    rows = {method.peft_type: features_of(method) for method in found}
    if as_json:
        console.out_json({"ok": not broken, "methods": rows, "diagnostics": [d.to_dict() for d in broken]})
        return int(bool(broken))
    for group, columns in MATRIX.items():
        shown = [f for f in columns if any(row[group][f.name] for row in rows.values())]
        body = [(name, *("yes" if row[group][f.name] else "-" for f in shown)) for name, row in rows.items()]
        console.out(console.table(body, (group.upper(), *(f.name for f in shown))))
        console.out("")
    console.show(broken)
    return int(bool(broken))


def _print_all(registry: Registry, as_json: bool) -> int:
    found, broken = _loaded(registry.names, registry)
    if as_json:
        problems = [d.to_dict() for d in broken]
        console.out_json({"ok": not broken, "methods": [_facts(m) for m in found], "diagnostics": problems})
    else:
        rows = [(m.peft_type, _kind(m), m.config.__name__, m.summary) for m in found]
        console.out(console.table(rows, ("TYPE", "KIND", "CONFIG", "SUMMARY")))
        console.show(broken)
    return int(bool(broken))


def _print_one(method: TunerMethod, as_json: bool) -> None:
    import textwrap

    from peftc.schema.generate import method_schema

    schema = method_schema(method)
    if as_json:
        console.out_json({**_facts(method), "options": schema["properties"]})
        return
    facts = [("type", method.peft_type), ("config", method.config.__name__), ("kind", _kind(method))]
    facts += (
        [("layers", ", ".join(sorted(method.supports)) or "decided by its options")] if method.adapts_layers else []
    )
    facts += [("paper", method.paper)] if method.paper else []
    room = console.width() - max(len(head) for head, _ in facts) - 2
    told = [row for head, text in facts for row in zip_longest([head], textwrap.wrap(text, room), fillvalue="")]
    console.out(f"{textwrap.fill(method.summary, console.width())}\n\n{console.table(told)}\n")
    if method.variants:
        own = [(v.option, v.summary, v.paper) for v in method.variants]
        console.out(f"{console.table(own, ('VARIANT BY', 'WHAT IT DOES', 'PAPER'))}\n")
    definitions = schema.get("$defs", {})
    rows = [HEADS]
    for name in _own_first(method):
        option = schema["properties"].get(name)
        if option is not None and name != "peft_type":
            default = method.config.model_fields[name].get_default(call_default_factory=True)
            rows.append((name, type_of(option, definitions), _value(default), option.get("description", "")))
    heads, *body = _wrapped(rows)
    console.out(console.table(body, heads))


def _own_first(method: TunerMethod) -> list[str]:
    """Names of options: the method's own, then those it shares with many, then those of every adapter."""
    names: dict[str, None] = {}
    for cls in method.config.__mro__:
        names.update(dict.fromkeys(name for name in inspect.get_annotations(cls) if name in method.config.model_fields))
    return list(names)


def _wrapped(rows: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """Cells broken into lines: types and defaults where they are long, the meaning at what is left of the width."""
    import textwrap

    name_room = max(len(row[0]) for row in rows)
    room = max(20, console.width() - name_room - 24 - 16 - 3 * 2)
    lines = []
    for name, kind, default, meaning in rows:
        cells = [[name], textwrap.wrap(kind, 24), textwrap.wrap(default, 16), textwrap.wrap(meaning, room)]
        for index in range(max(len(cell) for cell in cells)):
            first, second, third, fourth = (cell[index] if index < len(cell) else "" for cell in cells)
            lines.append((first, second, third, fourth))
    return lines


def _facts(method: TunerMethod) -> dict[str, Any]:
    return {
        "peft_type": method.peft_type,
        "config": method.config.__name__,
        "kind": _kind(method),
        "layers": sorted(method.supports),
        "summary": method.summary,
        "paper": method.paper,
    }


def _kind(method: TunerMethod) -> str:
    if method.call_tuner is not None:
        return "calls"
    return "prompt" if method.is_prompt else "layers" if method.adapts_layers else "modules"


def type_of(option: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The type of an option, from its schema, in a few words: `string or list of strings or null`."""
    if "$ref" in option:
        return type_of(definitions[option["$ref"].rpartition("/")[2]], definitions)
    if "const" in option or "enum" in option:
        values = option.get("enum", [option.get("const")])
        return " | ".join(_value(value) for value in values)
    if "anyOf" in option:
        return " or ".join(dict.fromkeys(type_of(branch, definitions) for branch in option["anyOf"]))
    kind = option.get("type", "any")
    if kind == "array" and "items" in option:
        return f"list of {type_of(option['items'], definitions)}"
    if kind == "object" and isinstance(option.get("additionalProperties"), Mapping):
        return f"map to {type_of(option['additionalProperties'], definitions)}"
    return f"{kind}{_range(option)}"


def _range(option: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {option[key]:g}" for key, sign in signs.items() if key in option)


def _value(value: Any) -> str:
    import json

    return value if isinstance(value, str) and value else json.dumps(value, default=str)
