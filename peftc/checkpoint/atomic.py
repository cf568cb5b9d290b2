"""Replacing files of a folder all at once: whoever reads the folder, whenever, finds the old files or the new ones.

New files are staged beside the folder. A single changed file is renamed into place; a new folder is renamed whole; otherwise
a copy of the folder, made of hard links and the new files, is exchanged with it in one system call (Linux). Of several
processes that save into one folder, one after the other compares and puts its files into place.

Where the exchange is not possible (a mount point, a parent that cannot be written, the current folder, a file system without
hard links, another system), files are renamed one by one with the `commit` file taken away first and put back last. A
process killed within that instant leaves a folder without its `commit` file, which no reader takes for an adapter.
"""

from __future__ import annotations

import ctypes
import errno
import filecmp
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import fcntl

#: What the name of a staging folder begins with.
STAGING = ".peftc-save-"

#: The way, not the disk, is the obstacle: another way may work.
_TRY_OTHERWISE = frozenset(
    {
        errno.EACCES,
        errno.EBUSY,
        errno.EINVAL,
        errno.EMLINK,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EROFS,
        errno.EXDEV,
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """What goes into one of several folders: what writes it, and names of files that go unless they are made anew."""

    write: Callable[[Path], None]
    obsolete: tuple[str, ...] = ()


def replace_folders(root: Path, parts: Mapping[str, Part], *, commit: str) -> None:
    """`replace_files` for a folder and folders below it, by their paths from there (`""` is itself): all of them at once.

    Where that is not possible, one folder after the other, in the order of `parts`, each all or nothing.
    """

    def write(stage: Path) -> None:
        for path, part in parts.items():
            (stage / path).mkdir(parents=True, exist_ok=True)
            part.write(stage / path)

    obsolete = [os.path.join(path, name) for path, part in parts.items() for name in part.obsolete]
    try:
        _replace_files(root, write, commit, frozenset(obsolete), apart=len(parts) > 1)
    except _NotTogether:
        for path, part in parts.items():
            replace_files(root / path, part.write, commit=commit, obsolete=part.obsolete)


def replace_files(folder: Path, write: Callable[[Path], None], *, commit: str, obsolete: Iterable[str] = ()) -> None:
    """Run `write` on an empty folder, then make what it wrote part of `folder`, all or nothing.

    Other files and subfolders of `folder` stay, and so do permissions. `obsolete` names files that go unless `write` made
    them anew. `folder` and its parents are made if they are missing; a symbolic link to a folder is followed. `write` may
    run a second time, elsewhere. Raises `OSError` and whatever `write` raises; the folder is then as it was.
    """
    _replace_files(folder, write, commit, frozenset(obsolete), apart=False)


class _NotTogether(Exception):
    """Files of several folders cannot be exchanged at once here."""


def _replace_files(
    folder: Path, write: Callable[[Path], None], commit: str, obsolete: frozenset[str], apart: bool
) -> None:
    target = Path(os.path.realpath(folder))
    if target.is_dir():
        _require_writable(target)  # an exchange would get around the permissions of the folder itself
    with _parents_of(target):
        places = [target.parent, target] if target.is_dir() else [target.parent]
        for place in places:
            try:
                with _staging(place) as stage:
                    _replace(target, stage, write, commit, obsolete, apart)
                return
            except OSError as error:
                if error.errno not in _TRY_OTHERWISE or place is places[-1]:
                    raise


def _replace(
    target: Path, stage: Path, write: Callable[[Path], None], commit: str, obsolete: frozenset[str], apart: bool
) -> None:
    new = stage / "new"
    new.mkdir()
    write(new)
    names = _files_in(new)
    for name in names:
        if (target / name).is_file():
            shutil.copymode(target / name, new / name)
        _flush(new / name)
    for folder in (*(path for path in new.rglob("*") if path.is_dir()), new):
        _flush(folder)
    if not target.exists() and _moved_whole(new, target):
        return
    with _turn(target):
        _put(target, stage, names, commit, obsolete, apart)


def _put(target: Path, stage: Path, names: list[str], commit: str, obsolete: frozenset[str], apart: bool) -> None:
    """Put the staged files into a folder. It is this process's turn: nothing is changed there meanwhile."""
    new = stage / "new"
    changed = [name for name in names if not _same(target / name, new / name)]
    gone = sorted(name for name in obsolete.difference(names) if (target / name).exists())
    if len(changed) + len(gone) <= 1:
        for name in changed:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, target / name)
        for name in gone:
            os.unlink(target / name)
    elif not _exchanged(target, stage, frozenset(names), obsolete):
        if apart:
            raise _NotTogether
        _one_by_one(target, stage, changed, gone, commit)
    _flush(target)


def _files_in(folder: Path) -> list[str]:
    """Paths of all files in a folder and below."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _moved_whole(new: Path, target: Path) -> bool:
    """Whether the new folder could take the place of one that does not exist."""
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process has made it meanwhile
            raise
        return False
    _flush(target.parent)
    return True


def _same(old: Path, new: Path) -> bool:
    return old.is_file() and not old.is_symlink() and filecmp.cmp(old, new, shallow=False)


# The exchange ---------------------------------------------------------------------------------------------------------


def _exchanged(target: Path, stage: Path, names: frozenset[str], obsolete: frozenset[str]) -> bool:
    """Whether `target` could be exchanged with a copy that has the new files."""
    if stage.parent != target.parent or _is_current(target):
        return False
    twin = stage / "folder"
    try:
        exchange = _exchange_call()
        twin.mkdir()
        _link_tree(target, twin, names | obsolete)
        for name in names:
            (twin / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(stage / "new" / name, twin / name)
        _copy_folder_facts(target, twin)
        for folder in {(twin / name).parent for name in names} | {twin}:
            _flush(folder)
        exchange(twin, target)
    except OSError as error:
        if error.errno not in _TRY_OTHERWISE:
            raise
        shutil.rmtree(twin, ignore_errors=True)
        return False
    _flush(target.parent)
    _bring_late_files(twin, target, obsolete)
    return True


def _exchange_call() -> Callable[[Path, Path], None]:
    """What exchanges two folders in one step. Raises `OSError` where the system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    at_fdcwd, rename_exchange = -100, 2

    def exchange(one: Path, other: Path) -> None:
        if call(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(other))

    return exchange


def _is_current(target: Path) -> bool:
    """Whether this process stands in the folder, which must then stay the folder that it is."""
    try:
        return Path.cwd().is_relative_to(target)
    except FileNotFoundError:  # the current folder was removed
        return False


def _link_tree(source: Path, copy: Path, leave_out: frozenset[str], path: str = "") -> None:
    """Rebuild a folder, which has this path in another, out of hard links; without files of some paths."""
    with os.scandir(source) as entries:
        for entry in entries:
            if path + entry.name in leave_out or entry.name.startswith(STAGING):
                continue
            if entry.is_dir(follow_symlinks=False):
                _require_writable(entry.path)  # or what is left of it could not be removed after the exchange
                (copy / entry.name).mkdir()
                _link_tree(source / entry.name, copy / entry.name, leave_out, f"{path}{entry.name}/")
                _copy_folder_facts(source / entry.name, copy / entry.name)
            else:
                os.link(entry.path, copy / entry.name, follow_symlinks=False)


def _require_writable(folder: Path | str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _copy_folder_facts(source: Path, copy: Path) -> None:
    """Owner, permissions and times."""
    old, new = source.stat(), copy.stat()
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        os.chown(copy, old.st_uid, old.st_gid)
    shutil.copystat(source, copy)


def _bring_late_files(old: Path, new: Path, leave_out: frozenset[str], path: str = "") -> None:
    """Move what another process put into the old folder after its copy was made."""
    with os.scandir(old) as entries:
        for entry in entries:
            if path + entry.name in leave_out:
                continue
            if not os.path.lexists(new / entry.name):
                with suppress(FileNotFoundError):  # it was a temporary file
                    os.rename(entry.path, new / entry.name)
            elif entry.is_dir(follow_symlinks=False):
                _bring_late_files(Path(entry.path), new / entry.name, leave_out, f"{path}{entry.name}/")


# One by one -----------------------------------------------------------------------------------------------------------


def _one_by_one(target: Path, stage: Path, changed: list[str], gone: list[str], commit: str) -> None:
    """Rename files in turn. Between the first and the last step the folder has no `commit` file."""
    old = stage / "old"
    away = sorted({commit, *changed, *gone}, key=lambda name: Path(name).name != commit)
    away = [name for name in away if os.path.lexists(target / name)]
    unchanged = [commit] if commit in away and commit not in changed and commit not in gone else []
    done: list[tuple[Path, Path]] = []
    try:
        for name in away:
            _move(target / name, old / name, done)
        for name in sorted(changed, key=lambda name: Path(name).name == commit):
            _move(stage / "new" / name, target / name, done)
        for name in unchanged:
            _move(old / name, target / name, done)
    except BaseException:  # also an interrupt: the folder must not stay half done
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


def _move(source: Path, destination: Path, done: list[tuple[Path, Path]]) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, destination)
    done.append((source, destination))


# Staging --------------------------------------------------------------------------------------------------------------


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """A locked folder inside `place` that is removed at the end, together with those that dead processes left."""
    _remove_stale(place)
    while True:
        stage = Path(tempfile.mkdtemp(prefix=STAGING, dir=place))
        lock = _lock(stage, wait=True)
        if stage.exists():
            break
        _unlock(lock)  # another process took it for stale before it was locked
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _unlock(lock)


def _remove_stale(place: Path) -> None:
    with suppress(OSError):
        for stage in place.glob(f"{STAGING}*"):
            lock = _lock(stage, wait=False)
            if lock is not None:
                shutil.rmtree(stage, ignore_errors=True)
                _unlock(lock)


def _lock(stage: Path, wait: bool) -> int | None:
    """Lock a staging folder for as long as this process lives; None if another process has it or locks do not work."""
    if sys.platform == "win32":
        return None
    handle = None
    try:
        handle = os.open(stage, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _unlock(handle)
        return None
    return handle


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    """One process after the other, where folders can be locked. The folder may be exchanged while another one waits."""
    lock = _lock(target, wait=True)
    while lock is not None and not _is_open_as(target, lock):
        _unlock(lock)
        lock = _lock(target, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _is_open_as(folder: Path, handle: int) -> bool:
    """Whether what is open is still the folder of that name. One that is gone counts as it: nobody else has it."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except FileNotFoundError:
        return True


def _unlock(handle: int | None) -> None:
    if handle is not None:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the lock as well
        os.close(handle)


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """The parents of a folder; those that had to be made are removed again if the body fails."""
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def _flush(path: Path) -> None:
    """Have a file or folder on the disk before the next step is."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(handle)
