"""The frame of the program: commands, exit codes, streams, and what happens when it is interrupted."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import peftc
from peftc import rules
from peftc.cli import console, main
from peftc.cli.main import COMMANDS
from peftc.diagnostics import PeftcError, PeftcWarning, Severity, Where, warn

PROGRAM = [sys.executable, "-m", "peftc"]
PROBLEM = rules.BAD_VALUE("`r` is \x1b[31mwrong", fix="Make it right.", where=Where("f.yaml", 2, 3))


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command `try` whose `run` a test sets."""
    made = SimpleNamespace(
        HELP="Try it", add_arguments=lambda parser: parser.add_argument("--json", action="store_true")
    )
    monkeypatch.setitem(COMMANDS, "try", "Try it")
    monkeypatch.setitem(sys.modules, "peftc.cli.try", made)
    return made


# the table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_exists_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"peftc.cli.{name}")
    assert COMMANDS[name] == module.HELP
    with pytest.raises(SystemExit) as stop:
        main.main([name, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: peftc {name}" in shown
    assert COMMANDS[name] in shown


def test_every_module_with_a_command_is_in_the_table() -> None:
    folder = Path(main.__file__).parent
    found = {p.stem for p in folder.glob("*.py") if re.search(r"^HELP\b", p.read_text(), re.MULTILINE)}
    assert found == set(COMMANDS)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["help"]):
        assert main.main(words) == 0
        shown = capsys.readouterr()
        assert all(name in shown.out and line in shown.out for name, line in COMMANDS.items())
        assert max(map(len, shown.out.splitlines())) <= 100


def test_help_costs_next_to_nothing() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.25


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from peftc.cli.main import main; main(['--help']); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "pydantic", "pluggy", "rich", "ruamel", "jsonschema"} & set(shown.split())


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"peftc {peftc.__version__}\n"


# usage ---------------------------------------------------------------------------------------------------------------


def test_without_a_command_the_help_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 2
    shown = capsys.readouterr()
    assert (shown.out, "usage:" in shown.err) == ("", True)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["validat\x1b"]) == 2
    shown = capsys.readouterr().err
    assert "Did you mean `validate`?" in shown
    assert "\x1b" not in shown


def test_an_unknown_option_names_the_nearest(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(["try", "--jsno"])
    assert stop.value.code == 2
    assert "Did you mean `--json`?" in capsys.readouterr().err


def test_options_are_not_abbreviated(command: SimpleNamespace) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(["try", "--jso"])
    assert stop.value.code == 2


# outcomes ------------------------------------------------------------------------------------------------------------


def test_what_a_command_returns_is_the_exit_code(command: SimpleNamespace) -> None:
    seen: list[argparse.Namespace] = []
    command.run = lambda args: seen.append(args) or 0
    assert main.main(["try", "--quiet"]) == 0
    assert (seen[0].quiet, seen[0].json) == (True, False)


def test_problems_go_to_stderr_and_fail(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise PeftcError(PROBLEM)

    command.run = fail
    assert main.main(["try"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[:2] == ["error[PC102]: `r` is \\x1b[31mwrong", "  where: f.yaml:2:3"]


def test_problems_as_json_go_to_stdout(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise PeftcError(PROBLEM)

    command.run = fail
    assert main.main(["try", "--json"]) == 1
    shown = capsys.readouterr()
    (told,) = json.loads(shown.out)["diagnostics"]
    assert (told["code"], told["where"]["line"], shown.err) == ("PC102", 2, "")


def test_warnings_are_shown_as_diagnostics(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def say(args: argparse.Namespace) -> int:
        warning = rules.BAD_VALUE("odd", fix="x", severity=Severity.WARNING)
        warn([warning])
        warn([warning])
        warnings.warn("plain", stacklevel=1)
        return 0

    command.run = say
    assert main.main(["try"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("warning[PC102]: odd") == 2
    assert "warning: plain\n" in shown
    assert "test_cli_main" not in shown


def test_warnings_outside_a_command_are_left_alone(command: SimpleNamespace) -> None:
    command.run = lambda args: 0
    main.main(["try"])
    with pytest.warns(PeftcWarning):
        warn([PROBLEM])


def test_an_interrupt_ends_with_130(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    command.run = interrupt
    assert main.main(["try"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_refusal_of_the_system_is_a_diagnostic(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command.run = lambda args: len((tmp_path / "missing").read_text())
    assert main.main(["try"]) == 1
    shown = capsys.readouterr().err
    assert "error[PC701]: No such file or directory" in shown
    assert str(tmp_path / "missing") in shown


def test_a_mistake_in_the_program_stays_a_traceback(command: SimpleNamespace) -> None:
    command.run = lambda args: 1 // 0
    with pytest.raises(ZeroDivisionError):
        main.main(["try"])


# as a process --------------------------------------------------------------------------------------------------------


def test_python_m_runs_it() -> None:
    assert run("--version").stdout == f"peftc {peftc.__version__}\n"
    assert run("nothing").returncode == 2


def test_ctrl_c_during_a_command_ends_with_130(tmp_path: Path) -> None:
    code = """
import sys, time, types
from peftc.cli import main
def run(args):
    print("started", flush=True)
    time.sleep(30)
sys.modules["peftc.cli.try"] = types.SimpleNamespace(HELP="Try it", add_arguments=lambda parser: None, run=run)
main.COMMANDS["try"] = "Try it"
raise SystemExit(main.main(["try"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "Interrupted.\n")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    process = subprocess.Popen([*PROGRAM, "schema", "spec"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_a_diagnostic() -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run([*PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error[PC701]: No space left on device")


def test_output_that_the_terminal_cannot_encode_is_escaped() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = run("methods", "--help", env=environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert run("validate", "é.yaml", env=environment).returncode == 1


# the console ---------------------------------------------------------------------------------------------------------


class Terminal:
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colour_needs_a_terminal_and_consent(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream: Any = Terminal()
    assert console.has_color(stream) is expected
    assert console.paint("x", "red", stream=stream) == ("\x1b[31mx\x1b[0m" if expected else "x")


def test_off_a_terminal_nothing_is_coloured(capsys: pytest.CaptureFixture[str]) -> None:
    console.show([PROBLEM])
    console.out(console.paint("x", "bold", "green"))
    console.out(console.table([("a", "b")], ("A", "B")))
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err


def test_a_table_aligns_its_columns() -> None:
    assert console.table([("a", "bb", "c"), ("dddd", "e", "f\x07")], ("X", "Y", "Z")).splitlines() == [
        "X     Y   Z",
        "a     bb  c",
        "dddd  e   f\\x07",
    ]
    assert console.table([]) == ""


def test_notes_are_silent_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("one")
    console.note("two", quiet=True)
    assert capsys.readouterr() == ("", "one\n")


def test_a_rich_console_follows_the_same_rules(capsys: pytest.CaptureFixture[str]) -> None:
    console.rich_console().print("[bold]x[/]")
    assert capsys.readouterr().out == "x\n"


def test_memory_that_runs_out_is_told_as_json_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise MemoryError("none left")

    monkeypatch.setattr(main, "_dispatch", fail)
    assert main.main(["methods", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"] and [d["code"] for d in told["diagnostics"]] == [rules.OUT_OF_MEMORY.code]
