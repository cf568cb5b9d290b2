"""Documents, configs and plugins that are wrong: each ends in its diagnostic, at its place, with nothing half done.

Every case comes with a small defect put into peftc, under which the diagnostic does not come: so the case can fail.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftc import rules
from peftc.cli import main as cli_main
from peftc.cli import schema as cli_schema
from peftc.config import files, hub, json_text, problems, reader, sections, spec, yaml_text
from peftc.config.base import CONFIG_NAME
from peftc.config.files import read_config, write_config
from peftc.config.reader import read_document
from peftc.config.spec import load_spec
from peftc.diagnostics import Diagnostic, PeftcError, PeftcWarning, Rule
from peftc.registry import boundary as boundary_module
from peftc.registry import contract, door, manager
from peftc.registry.manager import Registry
from peftc.schema import structure
from peftc.schema.validate import check_document
from tests.defects import put_defect
from tests.unit.chosen import plain_method
from tests.unit.fakes import FakeConfig, claim, plugin, record, registry

TYPE = plain_method().peft_type
SMALL = "version: 1\nbase: owner/model\nadapters: {default: {peft_type: FAKE}}\n"

Act = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """Something bad, what is said about it, where, and the defect that would keep it from being said."""

    rule: Rule
    act: Act
    says: str
    where: str
    module: ModuleType
    before: str
    after: str


def document(text: str | bytes, name: str = "doc.yaml") -> Act:
    """Read a file with this content; what it says of a document that it could read is raised as well."""

    def act(place: Path) -> Any:
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (place / name).write_bytes(raw)
        read = read_document(place / name)
        if read.problems:
            raise PeftcError(read.problems)
        return read

    return act


def checked(*changes: tuple[str, str]) -> Act:
    """Check the small spec after these replacements."""
    text = SMALL
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return lambda place: check_document(document(text)(place), registry()).diagnostics


def adapter(**options: Any) -> Act:
    """Read an `adapter_config.json` of an installed method."""

    def act(place: Path) -> Any:
        (place / CONFIG_NAME).write_text(json.dumps({"peft_type": TYPE, **options}))
        return read_config(place)

    return act


def asked(*claims: Any, name: str = "FAKE", blocked: frozenset[str] = frozenset()) -> Act:
    """Ask a registry with these claims for a type."""
    return lambda place: Registry(claims, blocked=blocked).get(name)


def command(*words: str) -> Act:
    """Run the program in the place."""

    def act(place: Path) -> Any:
        with _inside(place):
            cli_main.main(words)

    return act


@contextmanager
def _inside(place: Path) -> Iterator[None]:
    old = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(old)


def without_memory(place: Path) -> Any:
    """Run the program, out of memory in whatever it does."""

    def fail(words: list[str]) -> int:
        raise MemoryError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_main, "_dispatch", fail)
        cli_main.main(["methods"])


# what is bad ---------------------------------------------------------------------------------------------------------


def huge(place: Path) -> Any:
    """A file of 100 MB, all holes."""
    with open(place / "huge.yaml", "wb") as stream:
        stream.truncate(100 * 10**6)
    return read_document(place / "huge.yaml")


def onto_a_file(place: Path) -> Any:
    (place / "taken").write_text("mine")
    return write_config(FakeConfig(), place / "taken")


def stale_schema(place: Path) -> Any:
    (place / "plan.schema.json").write_text("{}")
    return cli_schema._check(place, {"plan.schema.json": "{ }"}, [], "peftc schema --write", quiet=True)


def own_check_fails(place: Path) -> Any:
    return check_document(document(SMALL.replace("FAKE", "FAKE, rate: 0.99"))(place), registry()).diagnostics


def broken_hook(place: Path) -> Any:
    return Registry((), blocked=frozenset()).register(plugin(record(prefix="")), "fake")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MANY = "[" + "1,\n" * 20_001 + "]"

CASES = {
    # files
    "no file": Case(rules.UNREADABLE, lambda place: read_document(place / "none.yaml"), "No such file", "none.yaml", reader, "raise PeftcError(_unreadable(file, error)) from None", "raise"),
    "a misspelt file": Case(rules.UNREADABLE, lambda place: [document("a: 1")(place), read_document(place / "dco.yaml")], "Did you mean `doc.yaml`?", "dco.yaml", reader, "did_you_mean(Path(file).name, _siblings(Path(file)))", "''"),
    "a folder": Case(rules.UNREADABLE, read_document, "is a folder", "", reader, '"a folder" if stat.S_ISDIR(mode) else ', ""),
    "a device": Case(rules.UNREADABLE, lambda place: read_document("/dev/null"), "not a regular file", "/dev/null", reader, "not stat.S_ISREG(status.st_mode)", "False"),
    "a NUL in the name": Case(rules.UNREADABLE, lambda place: read_document(place / "a\0b"), "NUL", "", reader, "except ValueError:", "except KeyError:"),
    "no folder": Case(rules.UNREADABLE, lambda place: [(place / "adapter").mkdir(), read_config(place / "adaptr")], "Did you mean `adapter`?", "adaptr", files, "did_you_mean(path.name, _folders_beside(path))", "''"),
    "a folder without a config": Case(rules.UNREADABLE, read_config, "No such file", CONFIG_NAME, files, "return str(path / (subfolder or \"\") / CONFIG_NAME)", "return os.devnull"),
    "100 MB": Case(rules.TOO_LARGE, huge, "95.4 MiB; at most 1 MiB", "huge.yaml", reader, "parse_yaml(read_text(file, MAX_YAML), file)", "parse_yaml(read_text(file, 1 << 40), file)"),
    "not UTF-8": Case(rules.SYNTAX, document(b"a: 1\nb: caf\xe9\n"), "byte 0xe9", "doc.yaml:2:7", reader, 'raw.decode("utf-8-sig")', 'raw.decode("latin-1")'),
    "UTF-16": Case(rules.SYNTAX, document("a: 1\n".encode("utf-16")), "not UTF-8", "doc.yaml:1:1", reader, 'raw.decode("utf-8-sig")', 'raw.decode("utf-16")'),
    "a control character": Case(rules.SYNTAX, document('{"a": 1}\x7f\n', "doc.json"), "U+007F", "doc.json:1:9", reader, "for match in _CONTROL.finditer(text):", "for match in ():"),
    # YAML
    "YAML syntax": Case(rules.SYNTAX, document("a: [1, 2\nb: 3\n"), "Not valid YAML", "doc.yaml:2:", yaml_text, "builder.found.add(_syntax(error, file))", "pass"),
    "a tab": Case(rules.SYNTAX, document("a:\n\tb: 1\n"), "not with tabs", "doc.yaml:2:1", yaml_text, "\"Indent with spaces, not with tabs.\"", "''"),
    "an impossible escape": Case(rules.SYNTAX, document('a: "\\UFFFFFFFF"\n'), "Not valid YAML", "doc.yaml", yaml_text, "except (ValueError, OverflowError) as error:", "except KeyError as error:"),
    "half a surrogate pair": Case(rules.SYNTAX, document('a: "\\ud800"\n'), "surrogate", "doc.yaml:1:4", yaml_text, 'decode("utf-16-le")', 'decode("utf-16-le", "ignore")'),
    "a duplicate key": Case(rules.DUPLICATE_KEY, document("a: 1\nb: {c: 1, c: 2}\n"), "the first is on line 2", "doc.yaml:2:11 at `$.b.c`", yaml_text, "if value in parent.lines:", "if False:"),
    "a tag": Case(rules.YAML_FEATURE, document("a: !!python/object:os.system x\n"), "tag", "doc.yaml:1:4 at `$.a`", yaml_text, "if tag is not None:", "if False:"),
    "a merge key": Case(rules.YAML_FEATURE, document("a: &a {x: 1}\nb:\n  <<: *a\n"), "merge key", "doc.yaml:3:3", yaml_text, 'if value == "<<":', "if False:"),
    "a directive": Case(rules.YAML_FEATURE, document("%YAML 1.1\n---\na: no\n"), "Directive `%YAML 1.1`", "doc.yaml:1:1", yaml_text, 'if line.startswith("%"):', "if False:"),
    "two documents": Case(rules.YAML_FEATURE, document("a: 1\n---\nb: 2\n"), "second document", "doc.yaml:2:1", yaml_text, "if self._documents > 1:", "if False:"),
    "a list as a key": Case(rules.YAML_FEATURE, document("? [a]\n: 1\n"), "list or mapping cannot be a key", "doc.yaml:1:3", yaml_text, "if not isinstance(value, str):\n            shown", "if False:\n            shown"),
    "a number as a key": Case(rules.YAML_FEATURE, document("1: a\n"), "`1` cannot be a key", "doc.yaml:1:1", yaml_text, "if not isinstance(value, str):\n            shown", "if False:\n            shown"),
    "an alias of nothing": Case(rules.YAML_FEATURE, document("a: *b\n"), "Alias `*b`", "doc.yaml:1:4", yaml_text, 'self._refuse(f"Alias', '(lambda *a: None)(f"Alias'),
    "an alias of itself": Case(rules.YAML_FEATURE, document("a: &a [*a]\n"), "Alias `*a`", "doc.yaml:1:8", yaml_text, 'self._refuse(f"Alias', '(lambda *a: None)(f"Alias'),
    "an alias bomb": Case(rules.TOO_LARGE, document(BOMB), "too many values", "doc.yaml:5:", yaml_text, "self._count(nodes, position)", "pass"),
    "many values": Case(rules.TOO_LARGE, document(MANY), "too many values", "doc.yaml:", yaml_text, "if self._nodes > MAX_NODES:", "if False:"),
    "deep nesting": Case(rules.TOO_LARGE, document("[" * 10_000), "Nesting", "doc.yaml:1:65", yaml_text, "if len(self._stack) >= MAX_DEPTH:", "if len(self._stack) >= 2 * MAX_DEPTH:"),
    "deep blocks": Case(rules.TOO_LARGE, document("- " * 10_000 + "a\n"), "Nesting", "doc.yaml:1:129", yaml_text, "if len(self._stack) >= MAX_DEPTH:", "if len(self._stack) >= 2 * MAX_DEPTH:"),
    "no number": Case(rules.NOT_FINITE, document("a: .nan\n"), "`.nan`", "doc.yaml:1:4 at `$.a`", yaml_text, " or _NOT_FINITE.fullmatch(text)", ""),
    "infinity by size": Case(rules.NOT_FINITE, document("a: 1e999\n"), "`1e999`", "doc.yaml:1:4 at `$.a`", yaml_text, "_FLOAT.fullmatch(text) or ", ""),
    # JSON
    "JSON syntax": Case(rules.SYNTAX, document('{"a": 1,}', "doc.json"), "Not valid JSON", "doc.json:1:9", json_text, 'found.add(rules.SYNTAX(f"Not', 'found.add(rules.SYNTAX("" and f"Not'),
    "a duplicate JSON key": Case(rules.DUPLICATE_KEY, document('{"a": {"b": 1,\n "b": 2}}', "doc.json"), "the first is on line 1", "doc.json:2:2 at `$.a.b`", json_text, "len(data) != len(pairs)", "False"),
    "NaN": Case(rules.NOT_FINITE, document('{"a": [NaN]}', "doc.json"), "`NaN`", "doc.json:1:8 at `$.a[0]`", json_text, "        self.suspicious = True\n        return math.nan", "        return math.nan"),
    "infinity in JSON": Case(rules.NOT_FINITE, document('{"a": -1e999}', "doc.json"), "`-1e999`", "doc.json:1:7", json_text, "self.suspicious |= not math.isfinite(value)", "pass"),
    "a number of 5,000 digits": Case(rules.NUMBER_BEYOND, document('{"a": ' + "9" * 5000 + "}", "doc.json"), "5,000 digits", "doc.json:1:7", json_text, "if is_beyond(text):", "if False:"),
    "a number of 65 bits": Case(rules.NUMBER_BEYOND, document("a: 0x1" + "0" * 16 + "\n"), "does not fit into 64 bits", "doc.yaml:1:4 at `$.a`", yaml_text, "if is_beyond(text, base):", "if False:"),
    "a hexadecimal number of 6,000 digits": Case(rules.NUMBER_BEYOND, document("a: 0x" + "F" * 6000 + "\n"), "6,002 digits", "doc.yaml:1:4 at `$.a`", yaml_text, "if is_beyond(text, base):", "if False:"),
    "1,000 misspelt keys": Case(rules.MORE_PROBLEMS, checked(("FAKE", "FAKE, " + ", ".join(f"k{i}: 1" for i in range(1000)))), "950 more problems", "doc.yaml", problems, "yield Problem((), further(len(found) - MOST_TOLD))", "pass"),
    "half a pair in JSON": Case(rules.SYNTAX, document('{"a": "\\ud800"}', "doc.json"), "surrogate", "doc.json:1:7", json_text, "suspicious=bool(_SURROGATE.search(text))", "suspicious=False"),
    "deep JSON": Case(rules.TOO_LARGE, document("[" * 100_000, "doc.json"), "Nesting", "doc.json:1:65", json_text, "if depth > MAX_DEPTH:", "if False:"),
    # specs and configs
    "a misspelt key": Case(rules.UNKNOWN_KEY, checked(("FAKE", "FAKE, inner: {dept: 1}")), "Did you mean `depth`?", "doc.yaml:3:47 at `$.adapters.default.inner.dept`", problems, "did_you_mean(name, options)", "''"),
    "remote code": Case(rules.UNKNOWN_KEY, checked(("owner/model", "{model: a/b, trust_remote_code: true}")), "never switched on by a file", "doc.yaml:2:20", spec, "problem.location[-1] in _CODE_KEYS", "False"),
    "an option for Python": Case(rules.UNKNOWN_KEY, checked(("FAKE", "FAKE, runtime: 1")), "cannot stand in a file", "doc.yaml:3:39", spec, "if stray:", "if False:"),
    "a wrong type": Case(rules.BAD_VALUE, checked(("FAKE", 'FAKE, r: "8"')), '`r` cannot be `"8"`', "doc.yaml:3:42 at `$.adapters.default.r`", problems, 'what, fix = f"`{name}` cannot be', 'what, fix = f"`{name}` is not'),
    "a rank under 1": Case(rules.BAD_VALUE, checked(("FAKE", "FAKE, r: 0")), "greater than or equal to 1", "doc.yaml:3:42 at `$.adapters.default.r`", spec, "found.extend(map(_explain_code,", "list(map(_explain_code,"),
    "a count that is none": Case(rules.BAD_VALUE, checked(("version: 1\n", "version: 1\nchecks: {expect_trainable: 9.2Q}\n")), "text such as `9.2M`", "doc.yaml:2:28", sections, "isinstance(value, str) and _bounds(value) is None", "False"),
    "a missing key": Case(rules.MISSING_KEY, checked(("base: owner/model\n", "")), "`base` is missing", "doc.yaml:1:1 at `$.base`", problems, 'if first["type"] == "missing":', "if False:"),
    "no base named": Case(rules.MISSING_KEY, checked(("owner/model", "{dtype: float32}")), "No base model is named", "doc.yaml:2:7", spec, "if not given:", "if False:"),
    "no type": Case(rules.MISSING_KEY, checked(("peft_type: FAKE", "peft_typ: FAKE")), "`peft_typ` may be meant", "doc.yaml:3:21", files, 'nearest("peft_type", data, limit=1)', "()"),
    "an empty document": Case(rules.WRONG_DOCUMENT, checked((SMALL, "# nothing\n")), "is empty", "doc.yaml:1:1", spec, '"The document is empty" if data is None else ', ""),
    "another version": Case(rules.WRONG_DOCUMENT, checked(("version: 1", "version: 2")), "Version `2`", "doc.yaml:1:10", spec, "value != VERSION or ", ""),
    "an adapter that is a word": Case(rules.WRONG_DOCUMENT, checked(("{peft_type: FAKE}", "FAKE")), "object of options", "doc.yaml:3:21", files, "A config is an object of options", "It is not right"),
    "two bases": Case(rules.CONTRADICTION, checked(("owner/model", "{model: a/b, path: ./c}")), "`model` and `path`", "doc.yaml:2:20", spec, "for name in given[1:]:", "for name in ():"),
    "a file without its distribution": Case(rules.CONTRADICTION, checked(("owner/model", "{model: a/b, file: c}")), "without `distribution`", "doc.yaml:2:20", spec, '("file", "distribution"), ', ""),
    "steps and epochs": Case(rules.CONTRADICTION, checked(("version: 1\n", "version: 1\ntrain: {data: d, steps: 1, epochs: 2}\n")), "how long to train", "doc.yaml:2:18", spec, 'train.get("steps") is not None', "False"),
    "tasks that differ": Case(rules.CONTRADICTION, checked(("owner/model", "{model: a/b, task_type: CAUSAL_LM}"), ("FAKE", "FAKE, task_type: SEQ_CLS")), "serves one task", "doc.yaml:3:50", spec, "if task != first:", "if False:"),
    "active twice": Case(rules.CONTRADICTION, checked(("version: 1\n", "version: 1\nactive: [default, default]\n")), "twice", "doc.yaml:2:19", spec, "elif name in named:", "elif False:"),
    "what the method refuses": Case(rules.CONTRADICTION, checked(("FAKE", "FAKE, mode: two, rate: 0.5")), "no meaning in mode two", "doc.yaml:3:56", spec, "[*method.problems(config), *start_problems", "[*start_problems"),
    "an active adapter that is not there": Case(rules.UNKNOWN_ADAPTER, checked(("version: 1\n", "version: 1\nactive: [defautl]\n")), "Did you mean `default`?", "doc.yaml:2:10", spec, "did_you_mean(name, adapters)", "''"),
    "a name with a path": Case(rules.ADAPTER_NAME, checked(("default", '"../x"')), "`../x` cannot be", "doc.yaml:3:12", spec, "if not _NAME.fullmatch(name):", "if False:"),
    "an unknown type": Case(rules.UNKNOWN_TYPE, checked(("FAKE", "FAKEE")), "Did you mean `FAKE`?", "doc.yaml:3:33", manager, "did_you_mean(key.upper(), self.names)", "''"),
    "an entry twice": Case(rules.DUPLICATE_MEMBER, checked(("FAKE", "FAKE, target_modules: [a, a]")), "`\"a\"` is listed twice", "doc.yaml:3:59", structure, "if text in seen:", "if False:"),
    # files of others
    "a key of another version": Case(rules.DROPPED_KEY, adapter(inference_mod=True), "Did you mean `inference_mode`?", CONFIG_NAME, files, "hint = did_you_mean(name, options)", "hint = ''"),
    "a run config": Case(rules.DROPPED_KEY, adapter(runtime_config={"a": 1}), "describes a run", CONFIG_NAME, files, "if data.get(_RUN_KEY) is not None", "if False"),
    "a wrong value": Case(rules.BAD_VALUE, adapter(inference_mode="yes"), "`inference_mode` cannot be `\"yes\"`", CONFIG_NAME, files, "return None, [*warnings, *problems(error, data, models_below(model))]", "return None, warnings"),
    "a repository that cannot be had": Case(rules.HUB_UNAVAILABLE, lambda place: read_config("owner/no-such-adapter"), "HF_HUB_OFFLINE", "", hub, "raise PeftcError(_explain(repository, name, error)) from error", "raise"),
    "a file where the folder should be": Case(rules.CANNOT_WRITE, onto_a_file, "cannot be written", "taken", files, "raise PeftcError(rules.CANNOT_WRITE(what, fix=fix, where=Where(file=str(file)))) from error", "raise"),
    "a schema out of date": Case(rules.SCHEMA_DRIFT, stale_schema, "is not what the configs say", "plan.schema.json", cli_schema, "if committed == text:", "if True:"),
    # plugins
    "two claims": Case(rules.PLUGIN_CONFLICT, asked(claim("fake", "one"), claim("fake", "two")), "one from somebody 1.0; two from", "", door, "if len(claims) > 1:", "if False:"),
    "a blocked plugin": Case(rules.PLUGIN_BLOCKED, asked(claim("fake"), blocked=frozenset({"fake"})), "out of PEFTC_BLOCK", "", door, "if not claims and hidden:", "if False:"),
    "a plugin that is not there": Case(rules.PLUGIN_BROKEN, asked(claim("fake", "no_such_module")), "ModuleNotFoundError", "", door, "raise PeftcError(rules.PLUGIN_BROKEN(what, fix=fix)) from error", "raise"),
    "a record without a prefix": Case(rules.PLUGIN_INVALID, broken_hook, "needs a `prefix`", "", contract, "and not (method.prefix and method.layer_names):", "and False:"),
    "a plugin that raises": Case(rules.PLUGIN_RAISED, own_check_fails, "RuntimeError: a mistake in the plugin", "doc.yaml:3:21", boundary_module, "return PeftcError(_of_plugin(peft_type, function, path, told, plugins or passed))", "return error"),
    # the frame
    "no memory": Case(rules.OUT_OF_MEMORY, without_memory, "can't allocate memory", "", cli_main, 'report([_out_of_memory(error)], as_json="--json" in words)', "FAILED"),
    "a refusal of the system": Case(rules.SYSTEM_REFUSED, command("schema", "plan", "--write", "--dir", "/dev/null/x"), "Not a directory", "", cli_main, "console.show([_system_refused(error)])", "pass"),
}  # fmt: skip


def provoke(act: Act, place: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """All that is reported, as text: as an error, as warnings, in a result, or on stderr."""
    with pytest.WarningsRecorder(_ispytest=True) as shown:
        try:
            result = act(place)
        except PeftcError as error:
            return [str(d) for d in error.diagnostics]
    told = [str(w.message.diagnostic) for w in shown if isinstance(w.message, PeftcWarning)]
    told += [str(d) for d in result if isinstance(d, Diagnostic)] if isinstance(result, tuple) else []
    return [*told, *filter(None, [capsys.readouterr().err])]


def hits(case: Case, told: list[str]) -> list[str]:
    return [text for text in told if f"[{case.rule.code}]" in text and case.says in text and case.where in text]


@pytest.mark.parametrize("name", CASES)
def test_it_ends_in_its_diagnostic(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    case = CASES[name]
    start = time.process_time()
    told = provoke(case.act, tmp_path, capsys)
    assert len(hits(case, told)) == 1, told
    assert "fix:" in hits(case, told)[0]
    assert time.process_time() - start < 8  # a bomb must not go off


@pytest.mark.parametrize("name", CASES)
def test_a_defect_would_be_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = CASES[name]
    put_defect(monkeypatch, case.module, case.before, case.after)
    try:
        told = provoke(case.act, tmp_path, capsys)
    except Exception:  # with the defect anything may happen, except for the diagnostic
        return
    assert hits(case, told) == []


# what needs more than a table ----------------------------------------------------------------------------------------


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that an unprivileged user can look into."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody whom permissions stop, also when the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of another kind")
def test_what_may_not_be_read(open_place: Path) -> None:
    secret = open_place / "secret"
    secret.mkdir()
    (open_place / "spec.yaml").write_text(SMALL)
    (open_place / "spec.yaml").chmod(0)
    secret.chmod(0)
    for act in (
        lambda: read_document(open_place / "spec.yaml"),
        lambda: read_config(secret),
        lambda: read_config(secret / "x"),
    ):
        with unprivileged(), pytest.raises(PeftcError, match="Permission denied") as caught:
            act()
        assert [d.code for d in caught.value.diagnostics] == [rules.UNREADABLE.code]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of another kind")
def test_where_nothing_may_be_written(open_place: Path) -> None:
    with unprivileged(), pytest.raises(PeftcError, match="Permission denied") as caught:
        write_config(FakeConfig(), open_place)
    assert [d.code for d in caught.value.diagnostics] == [rules.CANNOT_WRITE.code]
    assert list(open_place.iterdir()) == []


def test_every_duplicate_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(PeftcError) as caught:
        document("a: 1\nb: {c: 1, c: 2, c: 3}\na: 4\n")(tmp_path)
    assert [str(d.where).split("/")[-1] for d in caught.value.diagnostics] == [
        "doc.yaml:2:11 at `$.b.c`",
        "doc.yaml:2:17 at `$.b.c`",
        "doc.yaml:3:1 at `$.a`",
    ]


def test_what_is_refused_in_one_document_comes_at_once(tmp_path: Path) -> None:
    text = "%YAML 1.1\n---\na: !x 1\nb: {<<: {c: 1}}\n2: .inf\na: *no\n"
    with pytest.raises(PeftcError) as caught:
        document(text)(tmp_path)
    feature = rules.YAML_FEATURE.code
    assert [(d.code, d.where.line) for d in caught.value.diagnostics] == [
        (feature, 1),
        (feature, 3),
        (feature, 4),
        (feature, 5),
        (rules.NOT_FINITE.code, 5),
        (rules.DUPLICATE_KEY.code, 6),
        (feature, 6),
    ]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(PeftcError, match="not a regular file"):
        read_document(tmp_path / "pipe.yaml")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "open", None, raising=False)
    with pytest.raises(PeftcError, match="MiB"):
        huge(tmp_path)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n" * 10)
    with pytest.raises(PeftcError, match="at most"):
        monkeypatch.setattr(reader.os, "stat", lambda _: os.stat_result((0o100644, *[0] * 9)))
        reader.read_text(str(tmp_path / "a.yaml"), 20)


def test_a_duplicate_key_hides_no_other_problem(tmp_path: Path) -> None:
    text = "version: 1\nversion: 1\nbse: x\nadapters: {a: {peft_type: NOTHING_LIKE_IT}}\n"
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(PeftcError) as caught:
        load_spec(tmp_path / "spec.yaml")
    codes = {d.code for d in caught.value.diagnostics}
    assert codes >= {rules.DUPLICATE_KEY.code, rules.UNKNOWN_KEY.code, rules.UNKNOWN_TYPE.code}
