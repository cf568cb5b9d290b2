"""The `peftc` program: which commands there are, and what every one of them has in common.

A command is the module `peftc.cli.<name>`, imported when it runs. Exit codes: 0 done, 1 diagnostics, 2 usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn, TextIO

from peftc import __version__, rules
from peftc.cli import console
from peftc.diagnostics import Diagnostic, PeftcError, PeftcWarning, Where, did_you_mean
from peftc.registry.boundary import is_out_of_memory

#: name -> one line of help. The module has the same line as `HELP`; a test compares them.
COMMANDS = {
    "validate": "Check specs and adapter configs; every problem with its line",
    "plan": "Show what a spec would adapt, before any weight is loaded",
    "apply": "Apply a saved plan to its base model and save the fresh adapter",
    "train": "Train the adapter of a spec and save it",
    "generate": "Generate text with a base model and an adapter",
    "merge": "Merge an adapter into its base model and save the result",
    "convert": "Turn an adapter into one of another method, or its file into another form",
    "inspect": "Show what is in an adapter folder",
    "run": "Run a Python program in which `peft` means peftc",
    "demo": "Plan, train, evaluate and merge the quickstart adapter",
    "schema": "Print, write or check the JSON Schemas",
    "methods": "List the methods, or the options of one",
    "plugins": "List installed plugins, begin a new one, or check one",
    "graph": "Write a model's module graph to a file",
    "doctor": "Show what is installed beside peftc, and what does not fit",
    "cache": "Show or clear the cache of module graphs",
}

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser that names the option most like an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        hint = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        super().error(console.plain(f"{message}. {hint}" if hint else message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (those of the process) and return its exit code.

    Raises `SystemExit` for `--help`, `--version` and wrong usage, as `argparse` does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        _never_fail_on_encoding(stream)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:  # /dev/full as stdout; a file that vanished under a command
        console.show([_system_refused(error)])
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return report([_out_of_memory(error)], as_json="--json" in words)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return DONE if words else USAGE
    if words[0] == "--version":
        print(f"peftc {__version__}")
        return DONE
    name = words[0]
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "`peftc --help` lists the commands."
        print(f"peftc: there is no command `{console.plain(name)}`. {hint}", file=sys.stderr)
        return USAGE
    command = importlib.import_module(f"peftc.cli.{name}")
    return _run(command, parser_for(name, command).parse_args(words[1:]))


def parser_for(name: str, command: ModuleType) -> argparse.ArgumentParser:
    """The parser of one command, with the options that all commands have."""
    parser = Parser(prog=f"peftc {name}", description=f"{command.HELP}.", allow_abbrev=False)
    parser.set_defaults(json=False)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the result and problems only")
    command.add_arguments(parser)
    return parser


def _run(command: ModuleType, args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", PeftcWarning)
        try:
            code: int = command.run(args)
        except PeftcError as error:
            return report(error.diagnostics, as_json=args.json)
        return code


def report(diagnostics: Sequence[Diagnostic], as_json: bool) -> int:
    """Print the problems, as `{"ok": false, "diagnostics": […]}` on stdout if asked; the exit code is 1."""
    if as_json:
        console.out_json({"ok": False, "diagnostics": [d.to_dict() for d in diagnostics]})
    else:
        console.show(diagnostics)
    return FAILED


def _help() -> str:
    lines = [f"  {console.paint(name.ljust(10), 'bold')}{line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: peftc COMMAND [options]",
            "",
            "Declarative parameter-efficient fine-tuning: a spec becomes a plan, the plan an adapter.",
            "",
            "commands:",
            *lines,
            "",
            "`peftc COMMAND --help` explains one command; `peftc --version` prints the version.",
        ]
    )


def _system_refused(error: OSError) -> Diagnostic:
    file = error.filename if isinstance(error.filename, str) else None
    what = f"{error.strerror or type(error).__name__}"
    return rules.SYSTEM_REFUSED(what, fix="Check the path, its permissions and the free space.", where=Where(file=file))


def _out_of_memory(error: BaseException) -> Diagnostic:
    what = str(error).partition("\n")[0] or type(error).__name__
    fix = "Use a smaller batch or shorter texts, half precision (`dtype`), or a machine with more memory."
    return rules.OUT_OF_MEMORY(what, fix=fix)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours as diagnostics, others' as one line without the source."""
    if isinstance(message, PeftcWarning):
        console.show([message.diagnostic])
    else:
        print(console.plain(f"warning: {message}"), file=sys.stderr)


def _never_fail_on_encoding(stream: TextIO) -> None:
    from io import TextIOWrapper

    if isinstance(stream, TextIOWrapper):  # a test's capture is not one
        stream.reconfigure(errors="backslashreplace")
