"""Makes `plugin-reference.md`: every name that authors of plugins import, from the source that defines it.

Signatures, docstrings and comments are read as they stand in the files, so that the page says what an editor shows.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from peftc import plugin, rules
from peftc.config.base import PeftConfig
from peftc.config.docs import describe
from peftc.diagnostics import Rule

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
#: Sections of the page, and the names in each; what stands in none comes last.
SECTIONS: Mapping[str, str] = {
    "The record": "method TunerMethod hookimpl register_plugin unregister_plugin",
    "Starts": "starting Start Begun StartView Reads start_targets begin_anew refill_factors base_weights register_start unregister_start",
    "Optimisers": "NamedOptimizer AdamOptions with_factors with_linear_factors with_factors_alone",
    "Kinds of method": "MapTuner ModuleTuner PromptTuner CallTuner",
    "Declaring tensors": "parameter_slot module_slot linear_slots derived_slot constant_slot Share labelled Slot Container",
    "Packed bases": "Storage Packed storing register_storage unregister_storage dtype_name",
    "Facts": "LayerFacts Kind LINEAR_KINDS CONV_KINDS EXPERT_KINDS RankLimit ModuleNode ModuleGraph",
    "What the mathematics is handed": "View SlotInit ModuleView PromptView PromptContext CallView Run Place Changes Former",
    "What it can call": "columns linear wrong_rows linear_compressed mean_direction row_norms norms_of_sum drop_outputs kept_outputs "
    "widened weighted_sum to_logical to_stored",
    "Annotations": "Tensors TensorLists Slots Problems Factors Weights LabelledSlots Shapes Dims Options",
    "Configs": "LayersConfig PeftConfig PromptLearningConfig PeftConfigMixin ConfigModel TargetsMixin TargetNamesMixin"
    " OwnExclusionsMixin LayersMixin ModulesToSaveMixin RankMixin RankPatternMixin AlphaMixin InitWeightsMixin BiasMixin"
    " UpdateDropoutMixin TokensMixin TiesMixin ReplicationMixin OrientationMixin TargetParametersMixin ExpertsMixin PeftType TaskType Count Dropout Names NameList"
    " Field model_validator matches",
    "What is wrong": "rules Rule Severity Diagnostic PeftcError did_you_mean warn",
    "Files": "read_adapter read_weights write_adapter convert_adapter",
}
#: What names of other libraries are for.
FOREIGN = {
    "Field": "Pydantic's: an option with a default and bounds, `alpha: float = p.Field(default=8.0, gt=0)`.",
    "model_validator": "Pydantic's: marks a method of a config that looks at several options together.",
    "hookimpl": "Pluggy's: marks the function `peftc_tuner()`, which takes nothing and returns the record, or `peftc_start()`. A plugin has one;"
    " `method`, or `starting`, makes it.",
}
WIDTH, WIDE = 110, 1000


def reference_page(cell: Any, option: Any) -> str:
    """The page; `cell` and `option` are how the other pages write text in tables, and an option's row."""
    listed = {name for names in SECTIONS.values() for name in names.split()}
    sections = {**SECTIONS, "Further names": " ".join(name for name in plugin.__all__ if name not in listed)}
    blocks = [
        "# What `peftc.plugin` has",
        "All that a plugin imports: `from peftc import plugin as p`, then `p.MapTuner`, `p.parameter_slot`, and so on."
        " [Writing a plugin](writing-a-plugin.md) shows how they go together. Importing it needs no torch; `p.Tensor` and `p.nn`, for"
        " annotations, are torch's.",
        *(_contents(title, names) for title, names in sections.items() if names),
    ]
    for title, names in sections.items():
        blocks += [f"## {title}"] if names else []
        for name in names.split():
            blocks += [f"### `{name}`", *_of(name, getattr(plugin, name), cell, option)]
    return "\n\n".join(blocks) + "\n"


def _contents(title: str, names: str) -> str:
    return f"{title}: " + ", ".join(f"[`{name}`](#{name.lower()})" for name in names.split())


def _of(name: str, value: Any, cell: Any, option: Any) -> Iterator[str]:
    """The paragraphs about one name."""
    if name in FOREIGN:
        yield FOREIGN[name]
    elif value is rules:
        yield from _rules(cell)
    elif isinstance(value, type) and issubclass(value, BaseModel):
        yield from _config(value, option)
    elif isinstance(value, type):
        yield from _class(value)
    elif inspect.isfunction(value):
        yield f"```python\n{_signature(_definition(value))}\n```"
        yield _text(inspect.getdoc(value))
    else:
        yield from _constant(name, value)


def _constant(name: str, value: Any) -> Iterator[str]:
    home, node = _assigned(name)
    if isinstance(value, frozenset):
        yield "`{" + ", ".join(f"Kind.{kind.name}" for kind in sorted(value)) + "}`"
    elif node is not None and node.value is not None:
        yield f"`{name} = {ast.unparse(node.value)}`"
    text = _comment(home, node) if node is not None else _text(inspect.getdoc(value))
    if text:
        yield _sentence(text)


def _class(cls: type) -> Iterator[str]:
    """Its bases, its text, and its members one a line."""
    bases = [base.__name__ for base in cls.__bases__ if base.__name__ in plugin.__all__]
    yield " ".join(filter(None, [f"A `{bases[0]}`." if bases else "", _text(cls.__doc__)]))
    members = [f"- `{member.head}`: {member.text}" for member in members_of(cls)]
    if members:
        yield "\n".join(members)


def _config(cls: type[BaseModel], option: Any) -> Iterator[str]:
    yield from _class(cls)
    names = {name: field for name, field in cls.model_fields.items() if _is_own(cls, name)}
    if names:
        head = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        yield "\n".join([*head, *(option(cls, name, field) for name, field in names.items())])


def _is_own(cls: type[BaseModel], name: str) -> bool:
    """Whether an option is told with the class: those of `PeftConfig` are told with that alone."""
    return cls is PeftConfig or name not in PeftConfig.model_fields


def _rules(cell: Any) -> Iterator[str]:
    yield (
        "Kinds of problem, each called with what is wrong and what to do:"
        ' `p.rules.BAD_TARGET("`layer` is too small", fix="Leave it out.", where=path)`.'
        " [Diagnostics](diagnostics.md) has all of them; the bundled methods use these. What none of them fits is a"
        " [`Rule`](#rule) of the plugin's own."
    )
    used = _rules_of_plugins()
    found = {name: rule for name, rule in vars(rules).items() if isinstance(rule, Rule) and name in used}
    rows = [f"| `{name}` | {r.code} | {r.severity.value} | {r.title} | {cell(r.why)} |" for name, r in found.items()]
    yield "\n".join(["| rule | code | severity | what | why it matters |", "| --- | --- | --- | --- | --- |", *rows])


def _rules_of_plugins() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in PLUGINS.glob("*.py"))
    return {name for text in texts for name in re.findall(r"\brules\.([A-Z_]+)", text)}


# members of a class ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A public member of a class: its name, how it is written, and what is said of it."""

    name: str
    head: str
    text: str


def members_of(cls: type) -> list[Member]:
    """Public members in the order of the source, those of bases that have no entry of their own included."""
    told = [base for base in cls.__mro__[1:] if base.__name__ in plugin.__all__]
    bases = (base for base in cls.__mro__ if not any(issubclass(other, base) for other in told))
    owners = [base for base in reversed([*bases]) if base is cls or _is_told_with(base)]
    found: dict[str, Member] = {}
    for owner in owners:
        for node in _class_node(owner).body:
            member = _member(owner, node)
            if member is not None and not member.name.startswith("_"):
                found[member.name] = member
    return list(found.values())


def _is_told_with(base: type) -> bool:
    return base.__module__.startswith("peftc.") and base.__name__ not in plugin.__all__


def _member(owner: type, node: ast.stmt) -> Member | None:
    home = _source(owner.__module__)
    if isinstance(node, ast.FunctionDef):
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        text = _text(ast.get_docstring(node))
        if marks & {"property", "cached_property"}:
            return Member(node.name, f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name, text)
        if marks and not marks & {"abstractmethod", "classmethod"}:
            return None
        required = "To be given. " if "abstractmethod" in marks else ""
        return Member(node.name, _signature(node, WIDE).removeprefix("def "), required + text)
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        if issubclass(owner, BaseModel) and node.target.id in owner.model_fields:
            return None  # told as an option
        value = f" = {ast.unparse(node.value)}" if node.value is not None else ""
        head = f"{node.target.id}: {ast.unparse(node.annotation)}{value}"
        return Member(node.target.id, head, _sentence(_comment(home, node)))
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and issubclass(owner, Enum):
        head = f"{node.targets[0].id} = {ast.unparse(node.value)}"
        return Member(node.targets[0].id, head, _sentence(_comment(home, node)))
    return None


# source ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A module's text by line, and its tree."""

    lines: tuple[str, ...]
    tree: ast.Module


@cache
def _source(module: str) -> Source:
    text = inspect.getsource(importlib.import_module(module))
    return Source(tuple(text.splitlines()), ast.parse(text))


def _class_node(cls: type) -> ast.ClassDef:
    body = _source(cls.__module__).tree.body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)


def _definition(function: Any) -> ast.FunctionDef:
    body = _source(function.__module__).tree.body
    return next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == function.__name__)


def _assigned(name: str) -> tuple[Source, ast.Assign | ast.AnnAssign | None]:
    """Where a constant that the page tells is assigned: in the module that `peftc.plugin` has it from."""
    own = _source(plugin.__name__)
    imports = [node for node in own.tree.body if isinstance(node, ast.ImportFrom)]
    homes = [node.module for node in imports if node.module and any(alias.name == name for alias in node.names)]
    home = _source(homes[0]) if homes else own
    for node in home.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and [ast.unparse(target) for target in targets] == [name]:
            return home, node
    return home, None


def _signature(node: ast.FunctionDef, width: int = WIDTH) -> str:
    """`def name(…) -> type`, without `self`; one parameter a line where it would be long."""
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, /)?(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    whole = f"def {node.name}({arguments}){returns}"
    if len(whole) <= width:
        return whole
    return f"def {node.name}(\n" + "".join(f"    {part},\n" for part in _split(arguments)) + f"){returns}"


def _split(arguments: str) -> Iterable[str]:
    """Parameters, parted at commas that are in no brackets."""
    depth, part = 0, ""
    for sign in arguments:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += sign
    yield part.strip()


def _comment(home: Source, node: ast.stmt) -> str:
    """The `#:` lines above an assignment, or the comment behind it."""
    above: list[str] = []
    for line in reversed(home.lines[: node.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        above.insert(0, line.strip().removeprefix("#:").strip())
    if above:
        return " ".join(above)
    behind = home.lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
    return re.sub(r"^noqa: \w+ - ", "", behind.partition("#")[2].strip())


def _sentence(text: str) -> str:
    text = text.strip()
    return text and f"{text[0].upper()}{text[1:].removesuffix('.')}."


def _text(docstring: str | None) -> str:
    """A docstring as one paragraph; examples for Python's shell are left out."""
    plain = re.split(r"\n\s*>>> ", inspect.cleandoc(docstring or ""))[0]
    return " ".join(plain.split())


def undescribed() -> list[str]:
    """Public names and members of which nothing is said, as `Class.member`."""
    classes = [value for name in plugin.__all__ if isinstance(value := getattr(plugin, name), type)]
    found = [f"{cls.__name__}.{member.name}" for cls in classes for member in members_of(cls) if not member.text]
    options = [(cls, name) for cls in classes if issubclass(cls, BaseModel) for name in cls.model_fields]
    found += [f"{cls.__name__}.{name}" for cls, name in options if not describe(cls, name)]
    plain = (
        name for name in plugin.__all__ if name not in FOREIGN and not isinstance(getattr(plugin, name), ModuleType)
    )
    return found + [name for name in plain if not _said(name)]


def _said(name: str) -> bool:
    value = getattr(plugin, name)
    if inspect.isfunction(value) or isinstance(value, type):
        return bool(inspect.getdoc(value))
    home, node = _assigned(name)
    return node is not None and bool(_comment(home, node))
