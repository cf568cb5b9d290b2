"""The registry: plugins found without importing, loaded on first use, and pluggy's four traps closed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftc import rules
from peftc.diagnostics import PeftcError, Rule
from peftc.plugin import hookimpl
from peftc.registry import manager
from peftc.registry.boundary import boundary, guarded
from peftc.registry.manager import Claim, Registry, installed
from peftc.tuner.method import TunerMethod
from tests.unit.fakes import FakeConfig, FakeTuner, claim, plugin, record, registry

MODULE = """
from tests.unit.fakes import plugin, record
peftc_tuner = plugin(record()).peftc_tuner
"""


def distribution(folder: Path, name: str, module: str, source: str, entry: str = "fake") -> None:
    """Put an installed distribution with one plugin into the folder."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[peftc.tuners]\n{entry} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that distributions can be put into."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def told(made: Registry, peft_type: str = "FAKE") -> Rule:
    """The rule that is named when the type is asked for."""
    with pytest.raises(PeftcError) as caught:
        made.get(peft_type)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.fix
    return next(r for r in vars(rules).values() if isinstance(r, Rule) and r.code == diagnostic.code)


def test_an_installed_plugin_is_known_and_not_imported(site: Path) -> None:
    distribution(site, "fakedist", "fake_lazy", MODULE)
    made = Registry(blocked=frozenset())
    assert "FAKE" in made.names
    assert "fake_lazy" not in sys.modules
    assert made.get("FAKE").config is FakeConfig
    assert "fake_lazy" in sys.modules


def test_two_claims_to_one_name_are_an_error_and_neither_runs(site: Path) -> None:
    distribution(site, "first", "fake_first", MODULE)
    distribution(site, "second", "fake_second", MODULE)
    made = Registry(blocked=frozenset())
    assert told(made) is rules.PLUGIN_CONFLICT
    assert not {"fake_first", "fake_second"} & set(sys.modules)


def test_a_claim_to_a_bundled_name_does_not_take_it_over(site: Path) -> None:
    bundled = installed()[0]
    distribution(site, "thief", "fake_thief", MODULE, entry=bundled.name)
    assert told(Registry(blocked=frozenset()), bundled.peft_type) is rules.PLUGIN_CONFLICT


def test_one_distribution_seen_twice_is_one_claim(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(site, "twice", "fake_twice", MODULE)
    other = tmp_path / "other"
    other.mkdir()
    distribution(other, "twice", "fake_twice", MODULE)
    monkeypatch.syspath_prepend(str(other))
    assert len(Registry(blocked=frozenset()).claims_for("FAKE")) == 1


def test_a_plugin_that_raises_on_import_breaks_itself_alone(site: Path) -> None:
    distribution(site, "bad", "fake_bad", "raise ZeroDivisionError('oh')")
    made = Registry(blocked=frozenset())
    with pytest.raises(PeftcError, match="ZeroDivisionError: oh") as caught:
        made.get("FAKE")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "fake_bad.py:1: raise ZeroDivisionError('oh')" in caught.value.diagnostics[0].fix
    assert told(made) is rules.PLUGIN_BROKEN
    for name in made.names:
        if name != "FAKE":
            assert made.get(name).peft_type == name


def test_a_broken_plugin_is_not_imported_again(site: Path) -> None:
    distribution(site, "count", "fake_count", "import sys\nsys.fake_count = getattr(sys, 'fake_count', 0) + 1\n1 / 0")
    made = Registry(blocked=frozenset())
    assert (told(made), told(made)) == (rules.PLUGIN_BROKEN, rules.PLUGIN_BROKEN)
    assert sys.fake_count == 1  # type: ignore[attr-defined]
    del sys.fake_count  # type: ignore[attr-defined]


def test_a_misspelt_hook_is_an_error() -> None:
    @hookimpl
    def peftc_tunner() -> object:
        return record()

    made = Registry((), blocked=frozenset())
    with pytest.raises(PeftcError, match="peftc_tunner") as caught:
        made.register(SimpleNamespace(peftc_tunner=peftc_tunner), "fake")
    assert caught.value.diagnostics[0].code == rules.PLUGIN_BROKEN.code


def test_a_hook_without_the_mark_is_an_error() -> None:
    with pytest.raises(PeftcError, match="@hookimpl"):
        Registry((), blocked=frozenset()).register(SimpleNamespace(peftc_tuner=record), "fake")


def test_a_hook_that_raises_is_an_error() -> None:
    @hookimpl
    def peftc_tuner() -> object:
        raise KeyError("inside")

    with pytest.raises(PeftcError, match="KeyError: 'inside'"):
        Registry((), blocked=frozenset()).register(SimpleNamespace(peftc_tuner=peftc_tuner), "fake")


@pytest.mark.parametrize("how", ["raise SystemExit(7)", "class B(BaseException): pass\nraise B('x')"])
def test_a_plugin_that_would_end_the_process_breaks_itself_alone(how: str, site: Path) -> None:
    distribution(site, "bad", "fake_ends", how)
    made = Registry(blocked=frozenset())
    assert told(made) is rules.PLUGIN_BROKEN
    assert made.find_name("NoSuchNameAnywhere") is None  # which asks every plugin


def test_a_hook_that_would_end_the_process_is_an_error() -> None:
    @hookimpl
    def peftc_tuner() -> object:
        raise SystemExit(3)

    with pytest.raises(PeftcError, match="SystemExit: 3"):
        Registry((), blocked=frozenset()).register(SimpleNamespace(peftc_tuner=peftc_tuner), "fake")


def test_an_interrupt_of_the_user_goes_through() -> None:
    @hookimpl
    def peftc_tuner() -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Registry((), blocked=frozenset()).register(SimpleNamespace(peftc_tuner=peftc_tuner), "fake")


@pytest.mark.parametrize("field", [field.name for field in fields(TunerMethod)])
@pytest.mark.parametrize("value", [5.5, (5, None), {5: 5}], ids=["a number", "a tuple", "a mapping"])
def test_every_field_of_a_record_is_looked_at(field: str, value: object) -> None:
    made = record()
    object.__setattr__(made, field, value)
    with pytest.raises(PeftcError) as caught:
        Registry((), blocked=frozenset()).register(plugin(made), "fake")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == rules.PLUGIN_INVALID.code
    assert field in diagnostic.what or field == "peft_type"


@pytest.mark.parametrize("kinds", [None, "linear", frozenset({5})])
def test_the_kinds_that_a_tuner_supports_are_looked_at(kinds: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTuner, "supports", kinds)
    with pytest.raises(PeftcError, match=r"`FakeTuner\.supports` is"):
        Registry((), blocked=frozenset()).register(plugin(record()), "fake")


@pytest.mark.parametrize(
    ("made", "name", "says"),
    [
        (record(), "another", "the entry point"),
        ("not a record", "fake", "not a `TunerMethod`"),
        (record(config=dict), "fake", "not a subclass of `PeftConfig`"),
        (record(peft_type="OTHER"), "other", "is `FAKE`, not `OTHER`"),
        (record(prefix=""), "fake", "needs a `prefix`"),
        (record(layer_names=("v",)), "fake", "do not begin with the prefix"),
    ],
)
def test_a_record_that_breaks_the_contract_is_refused(made: object, name: str, says: str) -> None:
    with pytest.raises(PeftcError, match=says) as caught:
        Registry((), blocked=frozenset()).register(plugin(made), name)
    assert caught.value.diagnostics[0].code == rules.PLUGIN_INVALID.code


def test_an_unknown_type_names_the_nearest_and_how_to_install_one() -> None:
    with pytest.raises(PeftcError) as caught:
        registry().get("FAKEE")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == rules.UNKNOWN_TYPE.code
    assert "Did you mean `FAKE`?" in diagnostic.fix
    assert "entry point `fakee`" in diagnostic.fix


def test_a_type_is_asked_for_in_its_own_case() -> None:
    assert told(registry(), "fake") is rules.UNKNOWN_TYPE


def test_a_blocked_plugin_is_hidden_and_said_to_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTC_BLOCK", " FAKE , other")
    made = Registry([claim("fake"), claim("third")])
    assert made.names == ("THIRD",)
    assert told(made) is rules.PLUGIN_BLOCKED


def test_blocking_does_not_hide_that_two_claim_a_name_from_those_who_unblock() -> None:
    claims = [claim("fake", "one"), claim("fake", "two")]
    assert told(Registry(claims, blocked=frozenset())) is rules.PLUGIN_CONFLICT


def test_one_distribution_of_two_can_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [claim("fake", "one", "First"), claim("fake", "two", "second")]
    monkeypatch.setenv("PEFTC_BLOCK", "fake@first")
    made = Registry(claims)
    assert [c.distribution for c in made.claims_for("FAKE")] == ["second"]
    assert made.names == ("FAKE",)
    with pytest.raises(PeftcError, match=r"PEFTC_BLOCK=fake@second"):
        Registry(claims, blocked=frozenset()).get("FAKE")
    monkeypatch.setenv("PEFTC_BLOCK", "fake@first, fake@second")
    assert told(Registry(claims)) is rules.PLUGIN_BLOCKED


def test_a_conflict_with_a_bundled_method_says_how_to_keep_that(site: Path) -> None:
    bundled = installed()[0]
    distribution(site, "thief", "fake_thief_two", MODULE, entry=bundled.name)
    with pytest.raises(PeftcError, match=f"PEFTC_BLOCK={bundled.name}@thief"):
        Registry(blocked=frozenset()).get(bundled.peft_type)
    assert Registry(blocked=frozenset({f"{bundled.name}@thief"})).get(bundled.peft_type).peft_type == bundled.peft_type


@pytest.mark.parametrize(
    ("file", "content"), [("METADATA", b"\xff\xfe\x00"), ("METADATA", b"Version: 1.0\n"), ("entry_points.txt", b"\xff")]
)
def test_damaged_metadata_of_one_distribution_hides_no_other(site: Path, file: str, content: bytes) -> None:
    distribution(site, "damaged", "fake_damaged", MODULE, entry="fakedamaged")
    (site / "damaged-1.0.dist-info" / file).write_bytes(content)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        names = {c.name for c in installed()}
    assert len(names) > 10
    assert bool(shown) == (file == "entry_points.txt")


def test_a_public_name_of_a_broken_plugin_says_why_it_is_missing() -> None:
    made = Registry([Claim("fake", "no_such_module_anywhere", "d", "1")], blocked=frozenset())
    assert made.find_name("FakeConfig") is None
    assert "no_such_module_anywhere" in str(made.reason_missing("FakeConfig"))
    assert made.reason_missing("OtherConfig") is None
    assert [d.code for d in made.out_of_order] == [rules.PLUGIN_BROKEN.code]


@pytest.mark.parametrize("source", ["raise SystemExit(5)", "1 / 0", MODULE])
def test_names_and_commands_of_others_work_beside_a_plugin_that_does_not(source: str, site: Path) -> None:
    """A plugin claims a bundled type: it is told by commands, and by the import of the type's own names."""
    bundled = next(c for c in installed() if c.distribution == "peftc")
    distribution(site, "rival", "fake_rival", source, entry=bundled.name)
    name = Registry(blocked=frozenset({f"{bundled.name}@rival"})).get(bundled.peft_type).config.__name__
    code = (
        "import sys\nfrom peftc.cli.main import main\n"
        "import peftc\nassert not hasattr(peftc, 'NoSuchName')\n"
        f"try:\n    from peftc import {name}\nexcept ImportError as error:\n    print(error)\n"
        "sys.exit(main(['methods']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert f"`PEFTC_BLOCK={bundled.name}@rival`" in run.stdout  # from the import
    assert f"`PEFTC_BLOCK={bundled.name}@rival`" in run.stderr  # from the command
    assert sum(c.peft_type in run.stdout for c in installed() if c.distribution == "peftc") > 10


def test_tracing_prints_hook_calls() -> None:
    bundled = installed()[0]
    code = f"from peftc.registry.manager import Registry; Registry().get({bundled.peft_type!r})"
    environment = {"PEFTC_TRACE": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "peftc_tuner" in run.stderr
    run = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_public_names_are_found_by_role() -> None:
    made = registry()
    found = {name: made.find_name(name) for name in ("FakeConfig", "FakeModel", "FakeLayer", "FakeThing", "NoConfig")}
    roles = {name: None if hit is None else hit[1] for name, hit in found.items()}
    assert roles == {
        "FakeConfig": "config", "FakeModel": "model", "FakeLayer": "layer", "FakeThing": None, "NoConfig": None
    }  # fmt: skip


def test_a_search_for_a_public_name_goes_on_past_a_broken_plugin() -> None:
    made = Registry([Claim("fakeq", "no_such_module_anywhere", "d", "1")], blocked=frozenset())
    made.register(plugin(record()), "fake")
    assert made.find_name("FakeConfig") is not None


def test_every_installed_plugin_loads_and_says_what_it_is() -> None:
    made = Registry(blocked=frozenset())
    assert made.names
    for name in made.names:
        method = made.get(name)
        assert made.method_of(method.config(**(method.examples[0] if method.examples else {}))) is method
        assert method.summary.endswith(".")


def test_the_boundary_names_plugin_function_and_module() -> None:
    with pytest.raises(PeftcError) as caught, boundary("FAKE", "slots", "model.layer"):
        raise RuntimeError("inside")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == rules.PLUGIN_RAISED.code
    assert diagnostic.where.path == "model.layer"
    assert "`slots` of FAKE raised RuntimeError: inside" in diagnostic.what


def test_what_a_plugin_says_itself_passes_the_boundary() -> None:
    own = PeftcError(rules.BAD_TARGET("x", fix="y"))
    with pytest.raises(PeftcError) as caught, boundary("FAKE", "check"):
        raise own
    assert caught.value is own


def test_a_function_that_gives_another_kind_of_value_is_named() -> None:
    def output() -> object:
        return None

    with pytest.raises(PeftcError, match="`output` of FAKE gives a `NoneType`, not a `dict`"):
        guarded(output, "FAKE", "model.layer", dict)()


def test_the_default_registry_is_made_once() -> None:
    assert manager.default_registry() is manager.default_registry()
