"""The alias `peft`: what imports of it give, what its metadata say, and when it is refused. Nothing here needs torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import peftc
from peftc import compat, rules
from peftc.compat import __main__ as launcher
from peftc.diagnostics import PeftcError
from peftc.host import clients
from peftc.registry.manager import default_registry
from tests.defects import put_defect


@pytest.fixture
def without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported `peft`, nor a library that looks for it once."""
    wanted = ("peft", "transformers", "diffusers")
    for name in [name for name in sys.modules if name.split(".")[0] in wanted]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def alias(without_peft: None) -> Iterator[ModuleType]:
    compat.install()
    yield importlib.import_module("peft")
    compat.uninstall()


def test_names_are_the_same_objects(alias: ModuleType) -> None:
    from peft import PeftConfig, TaskType

    assert (PeftConfig, TaskType) == (peftc.PeftConfig, peftc.TaskType)
    assert importlib.import_module("peft.config").PeftConfig is peftc.PeftConfig
    assert alias.config is importlib.import_module("peft.config")


def test_methods_come_from_their_records(alias: ModuleType) -> None:
    for peft_type in default_registry().names:
        method = default_registry().get(peft_type)
        name = method.config.__name__
        package = importlib.import_module(f"peft.tuners.{peft_type.lower()}")
        assert getattr(alias, name) is getattr(alias.tuners, name) is getattr(package, name) is method.config
        importlib.import_module(f"{package.__name__}.config")
        assert getattr(package.config, name) is method.config
        assert alias.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] is method.config
        assert name in dir(package)
        for option in method.default_targets:
            mapping = f"TRANSFORMERS_MODELS_TO_{peft_type.replace('_', '')}_{option.upper()}_MAPPING"
            assert getattr(alias.utils.constants, mapping)["llama"]


def test_the_metadata_are_a_distributions(alias: ModuleType) -> None:
    version = importlib.metadata.version("peft")
    assert version == importlib.metadata.metadata("peft")["Version"] == alias.__version__ == compat.VERSION
    assert importlib.metadata.metadata("peft")["Name"] == "peft"
    assert "peft" in importlib.metadata.packages_distributions()["peft"]
    assert importlib.metadata.distribution("peft").files is None
    assert importlib.util.find_spec("peft") is alias.__spec__
    assert importlib.metadata.version("peftc")


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("from peft import PeftConfi", "has no `PeftConfi`. Did you mean `PeftConfig`"),
        ("from peft import onload_layers", " AutoPeftModel, "),
        ("import peft.conf", "`peft` in it has no `conf`. Did you mean `config`?"),
        ("import peft.config.deep", "`peft.config` in it has no `deep`"),
        ("import peft.nothing.deep", "`peft` in it has no `nothing`"),
        ("import peft.tuners.no_method.layer", "`peft.tuners` in it has no `no_method`"),
        ("from peft.config import fsdp_auto_wrap_policy", "It is in `peft.utils.other`"),
    ],
)
def test_what_is_lacking_is_told(alias: ModuleType, statement: str, says: str) -> None:
    with pytest.raises(ImportError, match="is peftc's alias here") as raised:
        exec(statement)
    assert says in str(raised.value)


def test_an_attribute_that_is_lacking_is_told(alias: ModuleType) -> None:
    with pytest.raises(AttributeError, match="has no `nothing`"):
        _ = alias.utils.nothing
    with pytest.raises(AttributeError, match="__file__"):
        _ = alias.__file__


def test_a_patch_of_the_alias_is_a_patch_of_peftc(alias: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module("peftc.compat.helpers")
    original = home.str_to_bool
    with monkeypatch.context() as patch:
        patch.setattr("peft.utils.other.str_to_bool", len)
        assert home.str_to_bool is len
    assert home.str_to_bool is original
    alias.utils.own = 1
    assert "own" in dir(alias.utils)
    del alias.utils.own


def test_installing_twice_and_taking_it_out(without_peft: None) -> None:
    before = list(sys.meta_path)
    compat.install()
    compat.install()
    try:
        assert len(sys.meta_path) == len(before) + 1 and compat.installed()
        importlib.import_module("peft.utils.constants")
    finally:
        compat.uninstall()
    assert sys.meta_path == before and not compat.installed()
    assert not [name for name in sys.modules if name.split(".")[0] == "peft"]


# refusals -------------------------------------------------------------------------------------------------------------


def test_the_real_one_imported_before_is_refused(without_peft: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("peft")
    real.__version__ = "0.21.2"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft", real)
    before = list(sys.meta_path)

    def says_so() -> None:
        with pytest.raises(PeftcError) as raised:
            compat.install()
        assert [d.code for d in raised.value.diagnostics] == [rules.REAL_PEFT_IMPORTED.code]
        assert "`peft` 0.21.2" in str(raised.value) and sys.meta_path == before

    says_so()
    put_defect(monkeypatch, compat, "if not _is_alias(module)", "if _is_alias(module)")
    with pytest.raises(pytest.fail.Exception):
        says_so()
    compat.uninstall()


def test_a_part_of_the_real_one_that_is_left_is_seen(alias: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the alias was put in place: a module that somebody else brought in."""
    assert compat.conflicts() == []
    monkeypatch.setitem(sys.modules, "peft.utils.other", ModuleType("peft.utils.other"))
    assert [d.code for d in compat.conflicts()] == [rules.REAL_PEFT_IMPORTED.code]
    with pytest.raises(PeftcError, match=rules.REAL_PEFT_IMPORTED.code):
        compat.install()


def test_another_copy_of_peftc_with_its_alias_in_place_is_told(tmp_path: Path) -> None:
    """As after a second installation was put on the path and imported anew in a notebook."""
    (tmp_path / "peftc").symlink_to(Path(peftc.__file__).parent)
    program = f"""
import sys, peftc.compat
peftc.compat.install()
import peft
for name in [name for name in sys.modules if name.split(".")[0] == "peftc"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
from peftc.diagnostics import PeftcError
import peftc.compat
try:
    peftc.compat.install()
except PeftcError as error:
    print(error)
"""
    done = python("-c", program, folder=tmp_path)
    assert f"error[{rules.ALIAS_TWICE.code}]" in done.stdout and "pip uninstall peftc" in done.stdout, done.stderr


def test_a_library_that_found_no_peft_is_named(without_peft: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ModuleType("transformers.trainer_utils")
    found.PeftModel = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.trainer_utils", found)
    monkeypatch.setitem(sys.modules, "diffusers.utils.import_utils", ModuleType("diffusers.utils.import_utils"))

    def says_so() -> None:
        with pytest.raises(PeftcError) as raised:
            compat.install()
        assert [d.code for d in raised.value.diagnostics] == [rules.ALIAS_TOO_LATE.code]
        assert "diffusers.utils.import_utils" in str(raised.value)

    says_so()
    put_defect(monkeypatch, clients, "if name in sys.modules and", "if name not in sys.modules and")
    with pytest.raises(pytest.fail.Exception):
        says_so()
    compat.uninstall()


def test_cached_answers_of_transformers_are_cleared(without_peft: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import cache

    asked = ModuleType("transformers.utils.import_utils")
    asked.is_peft_available = cache(lambda: importlib.util.find_spec("peft").origin)  # type: ignore[attr-defined,union-attr]
    monkeypatch.setitem(sys.modules, asked.__name__, asked)
    before = asked.is_peft_available()
    compat.install()
    try:
        assert asked.is_peft_available() == "peftc.compat" != before
    finally:
        compat.uninstall()
    assert asked.is_peft_available() == before


# the launcher ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, warnings
import peft, beside
print(peft.__version__.partition("+")[2][:5], __name__, sys.argv[1:], "torch" in sys.modules)
warnings.warn("seen")
sys.exit(7)
"""


def python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "program.py").write_text(PROGRAM)
    (tmp_path / "inner" / "beside.py").write_text("")
    return tmp_path


@pytest.mark.parametrize("start", [["-m", "peftc", "run"], ["-m", "peftc.compat"]], ids=["command", "module"])
def test_a_script_runs_with_the_alias(start: list[str], folder: Path) -> None:
    done = python(*start, "inner/program.py", "--json", "-q", "-h", folder=folder)
    assert (done.returncode, done.stdout) == (7, "peftc __main__ ['--json', '-q', '-h'] False\n"), done.stderr
    assert "program.py:5: UserWarning: seen" in done.stderr


def test_a_module_runs_with_the_alias(folder: Path) -> None:
    done = python("-m", "peftc", "run", "-m", "program", "x", folder=folder / "inner")
    assert (done.returncode, done.stdout) == (7, "peftc __main__ ['x'] False\n"), done.stderr


def test_an_exception_of_the_program_is_shown_as_python_shows_it(folder: Path) -> None:
    (folder / "broken.py").write_text("from peft import PeftConfig\nPeftConfig(unknown=1)\n")
    done = python("-m", "peftc", "run", "broken.py", folder=folder)
    assert done.returncode == 1
    assert 'broken.py", line 2' in done.stderr and "PC101" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inner/progam.py"], "Did you mean `program.py`?"),
        (["nowhere/x.py"], "Check the path"),
        (["-m", "no.module"], "There is no module `no.module`"),
        (["-m", "json.nothing"], "There is no module `json.nothing`"),
    ],
    ids=["typo", "folder", "module", "submodule"],
)
def test_a_missing_program_is_told(
    words: list[str],
    says: str,
    folder: Path,
    without_peft: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert launcher.main(words) == 1
        said = capsys.readouterr().err
        assert rules.SCRIPT_MISSING.code in said and says in said
    finally:
        compat.uninstall()


def test_nothing_to_run_is_wrong_usage(folder: Path) -> None:
    assert launcher.main([]) == launcher.main(["-m"]) == 2
    done = python("-m", "peftc", "run", folder=folder)
    assert done.returncode == 2 and "TARGET" in done.stderr
