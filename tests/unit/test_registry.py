"""The registry: plugins found without importing, loaded on first use, and pluggy's four traps closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftc import rules
from peftc.diagnostics import PeftcError, Rule
from peftc.plugin import hookimpl
from peftc.registry import manager
from peftc.registry.boundary import boundary
from peftc.registry.manager import Claim, Registry, installed
from tests.unit.fakes import FakeConfig, claim, plugin, record, registry

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


def test_the_default_registry_is_made_once() -> None:
    assert manager.default_registry() is manager.default_registry()
