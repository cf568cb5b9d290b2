"""YAML 1.2 as plain data: duplicate keys, tags, merge keys, directives and further documents are refused, all reported.

The parser's events are consumed without recursion, so that depth and size, aliases counted as if written out, are
limited before anything is built. Scalars follow YAML 1.2's core schema: `1e-4` is a number, `no` is a string.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from peftc import rules
from peftc.config.json_text import beyond, has_surrogate, is_beyond
from peftc.config.places import Document, Location, Position, Positions, json_path
from peftc.diagnostics import Collector, Diagnostic, PeftcError, Rule, Where
from peftc.limits import MAX_DEPTH, MAX_NODES

_INTEGERS = ((re.compile(r"[-+]?[0-9]+"), 10), (re.compile(r"0o[0-7]+"), 8), (re.compile(r"0x[0-9a-fA-F]+"), 16))
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def parse_yaml(text: str, file: str) -> Document:
    """The one document in the text. Raises `PeftcError` with everything that is refused.

    A key given twice does not keep the rest from being read: it is among the document's problems.
    """
    builder = _Builder(file, text.split("\n"))
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.feed(event)
    except PeftcError:  # may be a `ValueError` itself
        raise
    except YAMLError as error:
        builder.found.add(_syntax(error, file))
    except (ValueError, OverflowError) as error:
        # the parser lets these out for an escape that is no character, such as `\UFFFFFFFF`
        builder.found.add(rules.SYNTAX(f"Not valid YAML: {error}", fix="Correct the escape.", where=Where(file)))
    if any(problem.code != rules.DUPLICATE_KEY.code for problem in builder.found):
        builder.found.raise_errors()
    positions = builder.positions
    return Document(file, builder.root, lambda: positions, tuple(builder.found))


def _syntax(error: YAMLError, file: str) -> Diagnostic:
    where, what = Where(file), str(error).partition("\n")[0]
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            where = Where(file, mark.line + 1, mark.column + 1)
        what = ", ".join(part for part in (error.context, error.problem) if part)
    fix = "Indent with spaces, not with tabs." if "'\\t'" in what else "Correct the text at or before this place."
    return rules.SYNTAX(f"Not valid YAML: {what}", fix=fix, where=where)


@dataclass
class _Open:
    """A collection that is being read."""

    value: dict[str, Any] | list[Any]
    location: Location
    position: Position
    anchor: str | None
    nodes_before: int
    key: str | None = None
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def wants_key(self) -> bool:
        return isinstance(self.value, dict) and self.key is None

    @property
    def next(self) -> Location:
        """Location of the value that comes next."""
        if isinstance(self.value, list):
            return (*self.location, len(self.value))
        return self.location if self.key is None else (*self.location, self.key)


class _Builder:
    """Builds data from events, collects what is refused, stops at a limit."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.file = file
        self.lines = lines
        self.found = Collector()
        self.positions = Positions()
        self.root: Any = None
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._nodes = 0
        self._documents = 0

    def feed(self, event: Event) -> None:
        position = _position(event.start_mark)
        if isinstance(event, DocumentStartEvent):
            self._start_document(position)
        elif isinstance(event, CollectionStartEvent):
            self._refuse_tag(event.tag, position)
            self._open(event, position)
        elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
            opened = self._stack.pop()
            self._complete(opened.value, opened.position, opened.anchor, opened.nodes_before)
        elif isinstance(event, ScalarEvent):
            self._refuse_tag(event.tag, position)
            self._count(1, position)
            value = self._scalar(event, position)
            self._complete(value, position, event.anchor, self._nodes - 1)
        elif isinstance(event, AliasEvent):
            self._alias(event.anchor, position)

    def _start_document(self, position: Position) -> None:
        self._documents += 1
        if self._documents > 1:
            self._stop(rules.YAML_FEATURE, "A second document begins here", "Write one document per file.", position)
        for number, line in enumerate(self.lines[: position[0]], start=1):
            if line.startswith("%"):
                self._refuse(
                    f"Directive `{line.strip()[:40]}` is not allowed", "Remove it; documents are YAML 1.2.", (number, 1)
                )
            if line.startswith("---"):
                break

    def _open(self, event: CollectionStartEvent, position: Position) -> None:
        if len(self._stack) >= MAX_DEPTH:
            self._stop(rules.TOO_LARGE, "Nesting is too deep", f"Nest at most {MAX_DEPTH} levels.", position)
        before = self._nodes
        self._count(1, position)
        value: dict[str, Any] | list[Any] = {} if isinstance(event, MappingStartEvent) else []
        self._stack.append(_Open(value, self._next(), position, event.anchor, before))

    def _next(self) -> Location:
        return self._stack[-1].next if self._stack else ()

    def _complete(self, value: Any, position: Position, anchor: str | None, nodes_before: int) -> None:
        """A node is whole: it is a key or a value of the innermost open collection, or the root."""
        if anchor is not None:
            self._anchors[anchor] = value, self._nodes - nodes_before
        if not self._stack:
            self.root = value
            self.positions.values[()] = position
            return
        parent = self._stack[-1]
        if parent.wants_key:
            parent.key = self._key(parent, value, position)
            return
        location = parent.next
        self.positions.values.setdefault(location, position)
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is not None:
            parent.value.setdefault(parent.key, value)
            parent.key = None

    def _key(self, parent: _Open, value: Any, position: Position) -> str:
        if not isinstance(value, str):
            shown = "A list or mapping" if isinstance(value, (list, dict)) else f"`{_shown(value)}`"
            self._refuse(f"{shown} cannot be a key", "Keys are strings; put quotes around it.", position)
            return f"{position[0]}:{position[1]}"
        if value == "<<":
            self._refuse(
                "The merge key `<<` is not allowed", "Write the keys out, or use an alias for a whole value.", position
            )
            return f"{position[0]}:{position[1]}"
        if value in parent.lines:
            where = Where(self.file, *position, path=json_path((*parent.location, value)))
            fix = f"Keep one of them; the first is on line {parent.lines[value]}."
            self.found.add(rules.DUPLICATE_KEY(f"`{value}` is given twice", fix=fix, where=where))
        else:
            parent.lines[value] = position[0]
            self.positions.keys[(*parent.location, value)] = position
        return value

    def _alias(self, name: str, position: Position) -> None:
        if name not in self._anchors:
            self._refuse(f"Alias `*{name}` names no complete value above it", f"Define `&{name}` before.", position)
            self._complete(None, position, None, self._nodes)
            return
        value, nodes = self._anchors[name]
        self._count(nodes, position)
        self._complete(value, position, None, self._nodes)

    def _scalar(self, event: ScalarEvent, position: Position) -> Any:
        text: str = event.value
        if has_surrogate(text):
            try:  # two escapes may make one character, as JSON writes it
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                self._syntax_at("Half of a surrogate pair is not a character", position)
                return ""
        if event.style is not None:  # quoted or block scalars are strings
            return text
        if text in _WORDS:
            return _WORDS[text]
        for form, base in _INTEGERS:
            if form.fullmatch(text):
                return self._integer(text, base, position)
        if _FLOAT.fullmatch(text) and math.isfinite(value := float(text)):
            return value
        if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
            where = Where(self.file, *position, path=json_path(self._next()))
            what = f"`{_shown(text)}` is not a finite number"
            self.found.add(rules.NOT_FINITE(what, fix="Give a number.", where=where))
            return 0.0
        return text

    def _integer(self, text: str, base: int, position: Position) -> int:
        if is_beyond(text, base):
            self.found.add(beyond(text, Where(self.file, *position, path=json_path(self._next()))))
            return 0
        return int(text, base)

    def _refuse_tag(self, tag: object, position: Position) -> None:
        if tag is not None:
            self._refuse(
                f"The tag `{_shown(tag)}` is not allowed",
                "Remove it; types follow from how a value is written.",
                position,
            )

    def _count(self, nodes: int, position: Position) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            fix = f"Keep the document under {MAX_NODES:,} values; an alias counts as if it were written out."
            self._stop(rules.TOO_LARGE, "The document has too many values", fix, position)

    def _refuse(self, what: str, fix: str, position: Position) -> None:
        where = Where(self.file, *position, path=json_path(self._next()))
        self.found.add(rules.YAML_FEATURE(what, fix=fix, where=where))

    def _syntax_at(self, what: str, position: Position) -> None:
        self.found.add(rules.SYNTAX(what, fix="Correct the escape.", where=Where(self.file, *position)))

    def _stop(self, rule: Rule, what: str, fix: str, position: Position) -> None:
        self.found.add(rule(what, fix=fix, where=Where(self.file, *position)))
        raise PeftcError(self.found)


def _position(mark: StringMark) -> Position:
    return mark.line + 1, mark.column + 1


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"
