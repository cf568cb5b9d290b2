"""Settings that every test shares: no network, few threads, no state left in the user's cache."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Machines that run the tests are shared and slow; and CI must not find a new example on a commit that has nothing to do with it.
settings.register_profile("peftc", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("peftc")

#: A collection for every 10,000 new objects, not 700: tests make models by the thousand, and few of them in cycles.
gc.set_threshold(10_000, 20, 20)

ROOT = Path(__file__).resolve().parent.parent
#: Tests of prompts, of generation, of other libraries with the alias, and of what is relied on in them: beginnings of paths.
#: Not those whose other side is the same on every release: torch, the reference's names, releases that are made up.
VERSIONS = (
    "tests/e2e/test_prompt",
    "tests/ecosystem/test_diffusers",
    "tests/ecosystem/test_sentence_transformers",
    "tests/ecosystem/test_transformers",
    "tests/ecosystem/test_trl",
    "tests/ecosystem/test_versions_asked",
    "tests/host/",
    "tests/runtime/test_prompt",
    "tests/unit/test_compat",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rewrite-golden` takes what the code does now as what it should do; review the difference."""
    parser.addoption("--rewrite-golden", action="store_true", help="write golden plans anew instead of comparing")
    parser.addoption("--record", metavar="NAME", help="write what a whole run came to into the table of tried releases")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m versions` no other file is imported."""
    if config.option.markexpr == "versions" and collection_path.is_file() and not _depends_on_releases(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that depend most on the releases of other libraries."""
    for item in items:
        if _depends_on_releases(item.path):
            item.add_marker(pytest.mark.versions)


def _depends_on_releases(file: Path) -> bool:
    return file.is_relative_to(ROOT) and file.relative_to(ROOT).as_posix().startswith(VERSIONS)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Record a run of the whole suite that came to its end, passed or not."""
    environment = config.getoption("record")
    if environment and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        from tests import record  # here: peftc is imported after the settings above

        if record.is_whole(config):
            record.write(record.run_of(environment, terminalreporter.stats))
        else:
            terminalreporter.write_line("Not recorded: only a run of all tests is.")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the person who runs the tests has set for their own work must not decide a test, nor their cache."""
    for name in ("PEFTC_BLOCK", "PEFTC_TRACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEFTC_CACHE", str(tmp_path_factory.getbasetemp() / "peftc-cache"))


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """What a test leaves behind in torch is its own failure, and not that of all tests after it."""
    yield
    torch: Any = sys.modules.get("torch")
    if torch is not None and not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        pytest.fail("gradients are off after this test")


@pytest.fixture(scope="module", autouse=True)
def _only_what_tests_make_is_collected() -> None:
    """Trainings and compilers collect garbage again and again, each time for as long as there are objects: leave out those of
    all that was imported, and of the modules of tests before. What these took of memory goes back to the system."""
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: it keeps what was freed, of large models too
    if trim is not None:
        trim(0)


@pytest.fixture(scope="session", autouse=True)
def _disk_not_waited_for() -> Iterator[None]:
    """Flushing to the disk guards against a loss of power, which no test of this process tries; it takes most of the time of a
    save. A handle that is none is still told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.getuid() == 0 else None
    if done is None or done.returncode != 0:
        pytest.skip("mounting a small disk needs a privileged user")
    yield place
    subprocess.run(["umount", str(place)], check=True)
