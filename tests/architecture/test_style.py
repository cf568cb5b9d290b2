"""House rules that a reader relies on: sizes, documentation, no protocols by `hasattr`, no catch-all handlers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TypeGuard

from tests.architecture.tree import Source, of_every, sources

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# The plugin boundary, where any exception of a stranger's code becomes a diagnostic, and rollbacks that re-raise.
CATCH_ALL: dict[str, str] = {
    "peftc.registry.boundary": "the plugin boundary: calls of a method's functions",
    "peftc.registry.door": "the plugin boundary: importing and registering a plugin",
    "peftc.runtime.journal": "an undo that fails must not keep others from being run; the first error is raised",
}

# Handlers that take an error of memory for another, each with the reason why it is none.
NO_MEMORY: dict[str, str] = {
    "peftc.ops.transposed.hides_saved": "a context is opened, and no tensor made",
    "peftc.integrations.transformers.jobs.device_named": "a name is read",
    "peftc.checkpoint.weights.device_of": "a name is read",
    "peftc.integrations.packages.is_torch_tpu_available": "a device is asked for",
    "peftc.checkpoint.zipped.zipped_header_of": "a header is read: sizes that no memory holds are damage",
    "peftc.integrations.transformers.architecture._config_of": "a config is read: sizes that no memory holds are wrong",
    "peftc.integrations.transformers.graph.meta_model": "no memory is taken: sizes that no memory holds are wrong",
    "peftc.host.architectures.as_configured": "no memory is taken: what is built is on the meta device",
    "peftc.integrations.transformers.gguf.read_config": "a header is read: sizes that no memory holds are damage",
    "peftc.integrations.transformers.gguf.load_tokenizer": "a header is read: sizes that no memory holds are damage",
    "peftc.runtime.journal.Journal.undo": "an undo that fails must not keep others from being run; the first error is raised",
}

CODE = sources("peftc", "plugins")
ALL = sources("peftc", "plugins", "tests", "benchmarks", "docs", "examples")


@of_every(ALL)
def test_files_and_functions_fit_on_a_few_screens(source: Source) -> None:
    lines = len(source.text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{source.name} has {lines} lines"
    long = [
        f"{source.module}.{name} has {node.end_lineno - node.lineno + 1} lines"
        for name, node in source.functions
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


@of_every(CODE)
def test_files_and_public_names_are_documented(source: Source) -> None:
    missing = [] if ast.get_docstring(source.ast) else [source.name]
    missing += [f"{source.module}.{n.name}" for n in source.ast.body if _is_public(n) and not ast.get_docstring(n)]
    assert not missing, f"without a docstring: {missing}"


@of_every(CODE)
def test_no_protocol_by_hasattr(source: Source) -> None:
    lines = [
        node.lineno
        for node in ast.walk(source.ast)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    ]
    assert not lines, f"{source.name}: declare what is needed in a type, and ask for that (lines {lines})"


@of_every(CODE)
def test_only_the_plugin_boundary_catches_everything(source: Source) -> None:
    caught = [
        node.lineno
        for node in ast.walk(source.ast)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and not _reraises(node)
    ]
    assert not caught or source.module in CATCH_ALL, f"{source.name} catches everything in lines {caught}"


def test_a_wide_handler_lets_errors_of_memory_pass() -> None:
    """torch's `OutOfMemoryError` is a `RuntimeError`: caught as what it is not, it blames a config, a file or a plugin, and
    whoever would free memory and go on never sees it."""
    assert set(_takes_memory()) == NO_MEMORY.keys()


def _takes_memory() -> Iterator[str]:
    wide = {"Exception", "BaseException", "RuntimeError", "MemoryError"}
    tuples = {
        (source.module, target.id): {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
        for source in CODE
        for node in source.ast.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    imported = {name: classes for (_, name), classes in tuples.items() if not name.startswith("_")}
    for source in CODE:
        for name, function in source.functions:
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler):
                    classes = (
                        wide if node.type is None else {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                    )
                    classes = classes.union(*(tuples.get((source.module, c), imported.get(c, set())) for c in classes))
                    if classes & wide and not _reraises(node) and not _lets_memory_pass(node):
                        yield f"{source.module}.{name}"


def _lets_memory_pass(handler: ast.ExceptHandler) -> bool:
    """Whether it begins with raising such an error again, or raises all but such."""
    first = handler.body[0]
    asked = isinstance(first, ast.If) and "is_out_of_memory(error)" in ast.unparse(first.test)
    return asked and isinstance(first, ast.If) and isinstance(first.body[0], ast.Raise) and first.body[0].exc is None


@of_every(CODE)
def test_a_handler_of_builtin_classes_lets_our_own_errors_pass(source: Source) -> None:
    """A `PeftcError` may be an `OSError` or a `ValueError`: who raises one below such a handler has another before it."""
    caught = [
        node.lineno
        for node in ast.walk(source.ast)
        if isinstance(node, ast.Try)
        and any(_raises_ours(inner) for part in node.body for inner in ast.walk(part))
        and "PeftcError" not in (kind := ast.unparse(node.handlers[0].type or ast.Constant(None)))
        and "Error" in kind
    ]
    assert not caught, (
        f"{source.name} may catch its own errors in lines {caught}: begin with `except PeftcError: raise`"
    )


def _raises_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and ast.unparse(node.exc or node).startswith(("PeftcError(", "ConfigError("))


def _reraises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler cleans up and lets the same exception go on."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _is_public(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.ClassDef]:
    """A function or class that others may use; a hook's implementation is documented where the hook is specified."""
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return False
    return not any(ast.unparse(mark) == "hookimpl" for mark in node.decorator_list)
