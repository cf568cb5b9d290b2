"""The source tree as data, for the tests that read it: files, imports, functions, words.

Everything here is plain `ast` and `tokenize`; nothing of the tree is imported.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, the line, and whether it is imported when the file is."""

    module: str
    line: int
    deferred: bool


@dataclass(frozen=True)
class Source:
    """One Python file of the tree."""

    path: Path

    @property
    def name(self) -> str:
        """Path below the root, as messages show it."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        """Dotted name; `plugins/x.py` is `plugins.x` here, whatever it is imported as."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def ast(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every import but those for type checkers only; those inside functions are `deferred`."""
        return tuple(_imports(self, self.ast))

    @cached_property
    def for_types(self) -> tuple[Import, ...]:
        """Imports for type checkers only."""
        blocks = [node for node in ast.walk(self.ast) if isinstance(node, ast.If) and _is_for_types(node)]
        return tuple(i for block in blocks for child in block.body for i in _imports(self, ast.Module([child], [])))

    @cached_property
    def functions(self) -> tuple[tuple[str, Function], ...]:
        """Qualified name and node of every function and method that is not itself inside a function."""
        return tuple(_functions(self.ast, ""))

    @cached_property
    def docstrings(self) -> frozenset[tuple[int, int]]:
        """Start positions of the strings that document something: statements that are a lone string."""
        return frozenset(
            (node.value.lineno, node.value.col_offset)
            for node in ast.walk(self.ast)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )

    def tokens(self) -> Iterator[tokenize.TokenInfo]:
        """Names, strings and comments."""
        kinds = {tokenize.NAME, tokenize.STRING, tokenize.COMMENT}
        kinds |= {getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # f-strings are split from Python 3.12 on
        return (t for t in tokenize.generate_tokens(io.StringIO(self.text).readline) if t.type in kinds)


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python files below these folders of the root, sorted."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(_source(path) for path in sorted(paths) if "__pycache__" not in path.parts)


@cache
def _source(path: Path) -> Source:
    """One for each file, whatever folders it was asked for with."""
    _ALL.append(source := Source(path))
    return source


_ALL: list[Source] = []


def forget() -> None:
    """Let go of all that was read of the files; it is read again where it is asked for."""
    for source in _ALL:
        for name in ("text", "ast", "imports", "functions", "docstrings"):
            vars(source).pop(name, None)


def of_every(found: Iterable[Source]) -> Callable[[Callable[[Source], None]], Callable[[], None]]:
    """Decorator: one test of all these files, which tells each one for which it does not hold."""

    def over(check: Callable[[Source], None]) -> Callable[[], None]:
        def test() -> None:
            told = []
            for source in found:
                try:
                    check(source)
                except AssertionError as error:
                    told.append(f"{source.name}: {error}")
            assert not told, "\n".join(told)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return over


def _is_for_types(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(source: Source, node: ast.AST, *, deferred: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_for_types(child):
            for other in child.orelse:
                yield from _imports(source, other, deferred=deferred)
        elif isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(module, child.lineno, deferred) for module in _from_modules(source, child))
        else:
            yield from _imports(source, child, deferred=deferred or isinstance(child, Function))


def _from_modules(source: Source, node: ast.ImportFrom) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        package = source.module.split(".")
        cut = node.level - (source.path.name == "__init__.py")
        base = ".".join([*package[: len(package) - cut], *([base] if base else [])])
    folder = ROOT.joinpath(*base.split("."))
    for alias in node.names:
        is_module = (folder / f"{alias.name}.py").is_file() or (folder / alias.name / "__init__.py").is_file()
        yield f"{base}.{alias.name}" if is_module else base


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, prefix)
