"""Default targets by role, for types of model that no table knows: what a table's entries mean, found in the graph.

A model that has other parts beside a language model is adapted in the language model alone, as the tables do for the types
that they know. The targets are written so that they mean exactly the modules found, in any library that reads them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from peftc.compiler.match import Names, shortened
from peftc.compiler.passes.draft import listed
from peftc.graph.nodes import LINEAR_KINDS, ModuleGraph, ModuleNode, Role, suffixes
from peftc.graph.targets import TableRoles, Targets

#: Roles of layers that attention looks with, and those that a layer has which makes several of them at once.
_ATTENTION = frozenset({Role.Q, Role.K, Role.V})
#: A number in a path, and what stands for any number where paths are compared.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_ANY = "#"


@dataclass(frozen=True)
class Found:
    """The layers of some roles in the order of the graph, and where they were looked for, in words for a reader."""

    nodes: tuple[ModuleNode, ...]
    place: str = ""

    @cached_property
    def paths(self) -> frozenset[str]:
        return frozenset(node.path for node in self.nodes)

    @property
    def told(self) -> str:
        """The roles with the names of their layers: ``q (`q_proj`), v (`v_proj`), in `language_model` alone``."""
        for segments in (1, 2):  # two where one means several roles, as for `q_proj.linear` and `v_proj.linear`
            names: dict[Role | None, dict[str, None]] = {}
            for node in self.nodes:
                names.setdefault(node.role, {})[".".join(node.path.split(".")[-segments:])] = None
            if sum(map(len, names.values())) == len(set().union(*names.values())):
                break
        return ", ".join(f"{role} ({listed(names[role], 4)})" for role in Role if role in names) + self.place


def find_by_role(graph: ModuleGraph, roles: TableRoles) -> Found | None:
    """The layers of these roles in the part of the model that is adapted by default; None if a needed role has none."""
    wanted = {*roles.all, *([Role.QKV] if _ATTENTION.intersection(roles.all) else [])}
    nodes = [node for node in graph.nodes if node.role in wanted and _can_be_meant(node)]
    within = _parents_of_attention(graph) if Role.NORM in wanted else frozenset()
    nodes = [node for node in nodes if node.role is not Role.NORM or _parent(node) not in within]
    place, part = _default_part(graph)
    found = Found(tuple(node for node in nodes if part.holds(node.path)), place)
    return found if all(_has(found.nodes, role) for role in roles.needed) else None


def _can_be_meant(node: ModuleNode) -> bool:
    """Whether it is a layer, and not what contains layers; norms that keep statistics of the data are none of attention's."""
    if node.role is Role.NORM:
        return bool(node.facts.params) and not node.facts.buffers
    return node.facts.kind in LINEAR_KINDS


def _has(nodes: Iterable[ModuleNode], role: Role) -> bool:
    serving = {role, Role.QKV} if role in _ATTENTION else {role}
    return any(node.role in serving for node in nodes)


def _parents_of_attention(graph: ModuleGraph) -> frozenset[str]:
    """Attention modules: norms in them are of queries and keys, not of a block."""
    looking = _ATTENTION | {Role.QKV}
    return frozenset(_parent(node) for node in graph.nodes if node.role in looking and node.facts.kind in LINEAR_KINDS)


def _parent(node: ModuleNode) -> str:
    return node.path.rpartition(".")[0]


# parts of a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A part of a model: below one of `roots`, or anywhere if there are none, but not below one of `without`."""

    roots: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def holds(self, path: str) -> bool:
        return (not self.roots or _below(path, self.roots)) and not _below(path, self.without)


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _default_part(graph: ModuleGraph) -> tuple[str, _Part]:
    """Where to look, in words for a reader and as data.

    The language model is the part that is called so and has the input embeddings, or, in encoder–decoder models and where
    nothing is called so, all but the towers and what connects them. Without text the whole model is what there is.
    """
    texts = _outermost(graph, Role.TEXT)
    others = tuple(sorted((*_outermost(graph, Role.TOWER), *_outermost(graph, Role.CONNECTOR))))
    entrance = graph.model.input_embeddings
    language = tuple(path for path in texts if entrance is not None and _below(entrance, [path]))
    if language and not graph.model.is_encoder_decoder:
        return f", in `{language[0]}` alone", _Part(language)
    has_text = bool(texts) or (entrance is not None and not _below(entrance, others))
    if others and has_text:
        return f", outside of {listed(others)}", _Part(without=others)
    return "", _Part()


def _outermost(graph: ModuleGraph, role: Role) -> tuple[str, ...]:
    """Containers of a role that are in no other of it."""
    found: list[str] = []
    for node in graph.nodes:
        if node.role is role and node.path and not _below(node.path, found):
            found.append(node.path)
    return tuple(found)


# how they are written --------------------------------------------------------------------------------------------------


def written(paths: Collection[str], graph: ModuleGraph, numbered: bool = False) -> Targets:
    """Targets that mean exactly these modules: a list of suffixes, or one regular expression where names are not enough.

    With `numbered`, suffixes with the numbers of layers are tried before that.
    """
    meant, others = set(paths), {node.path for node in graph.nodes if node.path and node.path not in paths}
    kinds, other_kinds = ({_NUMBER.sub(_ANY, path) for path in group} for group in (meant, others))
    if kinds & other_kinds:  # of some repeated layers not all are meant
        kinds, other_kinds = meant, others
    endings, exact = _endings(kinds, other_kinds)
    if not exact and not any(_ANY in ending for ending in endings):
        return endings
    if numbered:
        longer, full = _endings(meant, others)
        if not full:
            return longer
    return _pattern(endings, exact)


def _endings(paths: Collection[str], others: Collection[str]) -> tuple[list[str], list[str]]:
    """The shortest suffixes that mean these paths and none of the others; apart, full paths that others end in."""
    endings = shortened(paths, others)
    exact = {ending for path in others for ending in suffixes(path)}.intersection(endings)
    return sorted(endings - exact), sorted(exact)


def among(paths: Collection[str], chosen: Collection[str], graph: ModuleGraph) -> Targets:
    """Those of the chosen entries that mean these modules and no other; a regular expression where one means both."""
    names = Names(chosen)
    meant: dict[str, list[str]] = {}
    for node in graph.nodes:
        for entry in names.find(node.path) if node.path else ():
            meant.setdefault(entry, []).append(node.path)
    inside = [entry for entry, found in meant.items() if all(path in paths for path in found)]
    mixed = any(path in paths for entry, found in meant.items() if entry not in inside for path in found)
    if not mixed:
        return sorted(inside)
    targets = written([path for path in paths if names.find(path)], graph)
    return targets if isinstance(targets, str) else _pattern(targets)


def _pattern(endings: Iterable[str], exact: Iterable[str] = ()) -> str:
    r"""One regular expression for suffixes, and for full paths that other paths end in.

    >>> _pattern(["a.#.q", "a.#.v", "o"], ["norm"])
    'norm|(.*\\.)?(a\\.\\d+\\.(q|v)|o)'
    """
    stems: dict[str, list[str]] = {}
    for ending in endings:
        stem, dot, last = ending.rpartition(".")
        stems.setdefault(_escaped(stem + dot), []).append(_escaped(last))
    alone = stems.pop("", [])
    texts = [*(stem + _either(lasts) for stem, lasts in stems.items()), *alone]
    return "|".join([*map(_escaped, exact), *([rf"(.*\.)?{_either(texts)}"] if texts else [])])


def _either(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"({'|'.join(texts)})"


def _escaped(text: str) -> str:
    return r"\d+".join(re.escape(part) for part in text.split(_ANY))
