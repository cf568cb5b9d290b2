"""Saving is all or nothing: killed at any step, refused by the system, in unusual folders, beside other people's files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from peftc.checkpoint import atomic
from tests.unit import saving_driver
from tests.unit.saving_driver import FOREIGN, prepare, save, state

linux = pytest.mark.skipif(sys.platform != "linux", reason="exchanging folders is a call of Linux")


def driver(root: Path, *arguments: str) -> dict[str, Any]:
    """What the driver found, in a process of its own: forks, limits and other users stay out of pytest's."""
    command = [sys.executable, saving_driver.__file__, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# killed -------------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(("mode", "old"), [("exchange", "0"), ("new", "absent")])
def test_killed_at_any_step_leaves_the_old_folder_or_the_new_one(root: Path, mode: str, old: str) -> None:
    found = driver(root, "steps", mode)
    assert set(found["states"]) == {old, "1"}
    assert found["steps"] > 15
    assert found["left"] == []  # the next save removed what the dead ones had staged


def test_killed_where_no_exchange_is_possible_never_leaves_a_mixture(root: Path) -> None:
    found = driver(root, "steps", "inside")
    assert set(found["states"]) == {"0", "none", "1"}
    assert found["left"] == []


@linux
def test_killed_at_random_again_and_again(root: Path) -> None:
    found = driver(root, "random", "40", "7")
    assert found["mixed"] == []
    assert found["different"] == 40  # each child had saved something
    assert found["left"] == []


@linux
def test_the_kill_test_can_fail(root: Path, tmp_path: Path) -> None:
    """Renaming files one by one without taking the commit file away first is what the tests above must notice."""
    naive = tmp_path / "naive.py"
    naive.write_text(
        "import os, sys\n"
        "from tests.unit import saving_driver\n"
        "def naive(folder, write, *, commit, obsolete=()):\n"
        "    stage = folder.parent / 'stage'\n"
        "    stage.mkdir(parents=True, exist_ok=True)\n"
        "    write(stage)\n"
        "    folder.mkdir(exist_ok=True)\n"
        "    for name in os.listdir(stage):\n"
        "        os.rename(stage / name, folder / name)\n"
        "    (folder / 'stale').unlink(missing_ok=True)\n"
        "saving_driver.atomic.replace_files = naive\n"
        "saving_driver.main()\n"
    )
    command = [sys.executable, str(naive), "steps", "exchange"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, check=True
    )
    assert "mixed" in json.loads(done.stdout)["states"]


# refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "status"),
    [("file size", errno.EFBIG), ("folder", errno.EACCES), ("both", errno.EACCES), ("new in parent", errno.EACCES)],
)
def test_a_refused_save_changes_nothing(root: Path, case: str, status: int) -> None:
    assert driver(root, "refused", case) == {"status": status, "state": "0", "left": [], "other": False}


@pytest.mark.parametrize("case", ["parent", "subfolder"])
def test_a_save_finds_another_way(root: Path, case: str) -> None:
    """The parent cannot be written, or a foreign subfolder could not be rebuilt: files are replaced inside the folder."""
    assert driver(root, "refused", case) == {"status": 0, "state": "1", "left": [], "other": False}


def test_a_full_disk_changes_nothing(small_disk: Path) -> None:
    target = prepare(small_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save(target, 1, size=100_000)
    assert state(target) == "0"
    assert no_staging(small_disk)


def test_a_mount_point_is_saved_into(small_disk: Path) -> None:
    save(small_disk, 0)
    save(small_disk, 1)
    assert state(small_disk) == "1"
    assert no_staging(small_disk.parent)


@pytest.mark.parametrize("fails", range(1, 7))
def test_an_error_between_two_renames_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    target = prepare(tmp_path)
    monkeypatch.chdir(target)
    seen = 0

    def replace(source: Path, destination: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.rename(source, destination)

    monkeypatch.setattr(atomic.os, "replace", replace)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        save(target, 1)
    assert state(target) == "0"
    assert (target / "stale").exists()
    assert no_staging(tmp_path)


def test_an_error_while_writing_removes_the_parents_that_were_made(tmp_path: Path) -> None:
    def write(staged: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomic.replace_files(tmp_path / "a" / "b" / "c", write, commit="config")
    assert list(tmp_path.iterdir()) == []


# other files and unusual folders ------------------------------------------------------------------------------------


def no_staging(place: Path) -> bool:
    return not list(place.rglob(f"{atomic.STAGING}*"))


def unlinkable(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def no_call() -> Callable[[Path, Path], None]:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("without", ["nothing", "exchange", "hard links"])
def test_foreign_files_and_permissions_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    target = prepare(tmp_path)
    target.chmod(0o751)
    (target / "weights").chmod(0o640)
    (target / "link").symlink_to("README.md")
    before = {name: (target / name).stat().st_ino for name in FOREIGN}
    if without == "exchange":
        monkeypatch.setattr(atomic, "_exchange_call", no_call)
    if without == "hard links":
        monkeypatch.setattr(atomic.os, "link", unlinkable)
    save(target, 1)
    assert state(target) == "1"
    assert {name: (target / name).stat().st_ino for name in FOREIGN} == before  # open files stay the same files
    assert os.readlink(target / "link") == "README.md"
    assert target.stat().st_mode & 0o777 == 0o751
    assert (target / "weights").stat().st_mode & 0o777 == 0o640
    assert not (target / "stale").exists()
    assert no_staging(tmp_path)


def test_one_changed_file_is_replaced_in_place(tmp_path: Path) -> None:
    target = prepare(tmp_path)
    (target / "stale").unlink()
    save(target, 0)
    folder, config = target.stat().st_ino, (target / "config").stat().st_ino

    def write(staged: Path) -> None:
        for name in saving_driver.FILES:
            (staged / name).write_text("5" if name == "weights" else "0 ")

    atomic.replace_files(target, write, commit="config")
    assert (target / "weights").read_text() == "5"
    assert (target.stat().st_ino, (target / "config").stat().st_ino) == (folder, config)


def test_one_obsolete_file_goes(tmp_path: Path) -> None:
    target = prepare(tmp_path)
    save(target, 0)
    assert state(target) == "0"
    assert not (target / "stale").exists()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    target = prepare(tmp_path)
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(target)
    save(link, 1)
    assert link.is_symlink()
    assert state(target) == "1"


def test_the_current_folder_stays_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = prepare(tmp_path)
    monkeypatch.chdir(target)
    save(Path("."), 1)
    assert Path("config").read_text().split() == ["1"]
    assert state(target) == "1"


def test_a_subfolder_is_saved_alone(tmp_path: Path) -> None:
    target = prepare(tmp_path)
    inode = target.stat().st_ino
    save(target / "other", 7)
    save(target / "other", 8)
    assert (state(target / "other"), state(target)) == ("8", "0")
    assert target.stat().st_ino == inode


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(OSError, match=os.strerror(errno.ENOTDIR)):
        save(tmp_path / "adapter", 1)
    assert (tmp_path / "adapter").read_text() == "a file"
    assert no_staging(tmp_path)


@linux
def test_a_file_that_another_process_adds_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks write their random state into the same folder while the first one saves the adapter."""
    target = prepare(tmp_path)
    found = atomic._exchange_call()

    def exchange(one: Path, other: Path) -> None:
        (other / "rng_state_1.pth").write_text("late")
        (other / "runs" / "late").write_text("late")
        found(one, other)

    monkeypatch.setattr(atomic, "_exchange_call", lambda: exchange)
    save(target, 1)
    assert state(target) == "1"
    assert (target / "rng_state_1.pth").read_text() == (target / "runs" / "late").read_text() == "late"


def test_a_folder_that_another_process_makes_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "adapter"

    def write(staged: Path) -> None:
        for name in saving_driver.FILES:
            (staged / name).write_text("1 ")
        target.mkdir()
        (target / "rng_state_1.pth").write_text("early")

    atomic.replace_files(target, write, commit="config")
    assert state(target) == "1"
    assert (target / "rng_state_1.pth").read_text() == "early"


def test_the_staging_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with atomic._staging(tmp_path) as other:
        save(tmp_path / "adapter", 1)
        assert other.exists()
    assert no_staging(tmp_path)


# several processes, several folders ---------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("changed", ["one", "all"])
def test_a_save_waits_while_another_process_puts_its_files_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """What it compared with must still be there when it renames: otherwise one file of each may stay."""
    target = prepare(tmp_path)
    put, children = atomic._put, []

    def slowly(*args: Any, **kwargs: Any) -> None:
        if not children:
            children.append(os.fork())
            if not children[0]:
                monkeypatch.setattr(atomic, "_put", put)
                with suppress(BaseException):
                    save(target, 2)
                os._exit(0)
            time.sleep(0.2)  # the other one is done with writing
        put(*args, **kwargs)

    monkeypatch.setattr(atomic, "_put", slowly)
    if changed == "one":
        atomic.replace_files(target, lambda staged: _one(staged, target), commit="config")
    else:
        save(target, 1)
    os.waitpid(children[0], 0)
    assert state(target) == "2"
    assert no_staging(tmp_path)


def _one(staged: Path, target: Path) -> None:
    for name in saving_driver.FILES:
        shutil.copy(target / name, staged / name)
    (staged / "config").write_text("1 ")


@linux
def test_of_two_processes_that_save_again_and_again_one_whole_result_is_left(root: Path) -> None:
    found = driver(root, "together", "8", "12")
    assert found["mixed"] == []
    assert found["left"] == []


def parts(generation: int, *paths: str) -> dict[str, atomic.Part]:
    def write(staged: Path) -> None:
        for name in saving_driver.FILES:
            (staged / name).write_text(f"{generation} ")

    return {path: atomic.Part(write, ("stale",)) for path in paths}


@linux
def test_several_folders_are_exchanged_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "adapters"
    atomic.replace_folders(root, parts(0, "", "a", "b/c"), commit="config")
    (root / "a" / "mine").write_text("stays")
    (root / "b" / "c" / "stale").write_text("goes")
    found, seen = atomic._exchange_call(), []

    def exchange(one: Path, other: Path) -> None:
        seen.append([state(root / path) for path in ("", "a", "b/c")])
        found(one, other)
        seen.append([state(root / path) for path in ("", "a", "b/c")])

    monkeypatch.setattr(atomic, "_exchange_call", lambda: exchange)
    atomic.replace_folders(root, parts(1, "", "a", "b/c", "new"), commit="config")
    assert seen == [["0"] * 3, ["1"] * 3]
    assert state(root / "new") == "1"
    assert (root / "a" / "mine").read_text() == "stays"
    assert not (root / "b" / "c" / "stale").exists()
    assert no_staging(tmp_path)


@linux
def test_several_folders_one_after_the_other_where_the_root_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "adapters"
    atomic.replace_folders(root, parts(0, "", "a"), commit="config")
    monkeypatch.chdir(root)
    atomic.replace_folders(root, parts(1, "", "a"), commit="config")
    assert [state(root / path) for path in ("", "a")] == ["1", "1"]
    assert no_staging(tmp_path)
