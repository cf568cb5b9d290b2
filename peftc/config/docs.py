"""What an option means: the docstring under its field, read from the source when somebody asks.

Reading sources at import, as pydantic offers, would cost every program a good part of its start for texts that few show.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise

from pydantic import BaseModel


def describe(model: type[BaseModel], name: str) -> str:
    """What the option means, on one line: the docstring under it, else what its type says; empty if nothing is written."""
    given = descriptions(model).get(name) or model.model_fields[name].description or ""
    return " ".join(given.split())


@cache
def descriptions(model: type[BaseModel]) -> Mapping[str, str]:
    """The docstrings under the fields of the class and of its bases; none for a class whose source is not at hand."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            found.update(_in_source(cls))
    return found


@cache
def _in_source(cls: type) -> Mapping[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # defined in a prompt, or shipped without source
        return {}
    body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
