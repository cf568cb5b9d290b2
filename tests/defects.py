"""Putting a small defect into peftc for the length of a test: the proof that the test could have failed.

A defect is an edit of a module's source text. Only the code of the functions that it changes is exchanged, in place, so
that whoever has imported them runs the defect too.
"""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType, ModuleType

import pytest


def put_defect(monkeypatch: pytest.MonkeyPatch, module: ModuleType, before: str, after: str) -> None:
    """Run `module` as if `before`, which occurs once in its source, were `after`. Undone with `monkeypatch`."""
    source = inspect.getsource(module)
    assert source.count(before) == 1, f"{before!r} occurs {source.count(before)} times in {module.__name__}"
    path = module.__file__ or module.__name__
    old, new = (_functions(compile(text, path, "exec")) for text in (source, source.replace(before, after)))
    changed = [name for name, code in new.items() if _differs(code, old.get(name))]
    functions = [f for name in changed if (f := _find(module, name)) is not None]
    assert functions, f"{before!r} is not inside a function of {module.__name__}"
    for function in functions:
        monkeypatch.setattr(function, "__code__", new[function.__qualname__])


def _functions(code: CodeType) -> dict[str, CodeType]:
    """Code of functions of the module and of methods of its classes, by qualified name."""
    found: dict[str, CodeType] = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                found[constant.co_qualname] = constant
            else:  # the body of a class
                found |= _functions(constant)
    return found


def _differs(new: CodeType, old: CodeType | None) -> bool:
    return old is not None and (new.co_code, new.co_names, _plain(new)) != (old.co_code, old.co_names, _plain(old))


def _plain(code: CodeType) -> list[object]:
    """Constants, nested code by its content and not by its line numbers."""
    return [(c.co_code, c.co_names, _plain(c)) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts]


def _find(module: ModuleType, name: str) -> FunctionType | None:
    """The function of that qualified name, out of whatever decorates it."""
    found: object = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
    for attribute in ("__func__", "fget", "func"):
        found = getattr(found, attribute, found)
    found = inspect.unwrap(found) if callable(found) else found
    return found if isinstance(found, FunctionType) else None
