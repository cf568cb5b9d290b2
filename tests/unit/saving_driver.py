"""Saves that are killed, limited or refused, in forked children of one process; run as a script by the tests of saving.

A save writes three files that all carry one generation number. A folder is *whole* if they carry the same one, and if the
foreign files in it are as they were. Prints what was found as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftc.checkpoint import atomic

FILES = ("weights", "config", "plan")
FOREIGN = {"README.md": "mine", "runs/events": "log", "runs/deep/more": "deeper"}


def save(target: Path, generation: int, size: int = 1) -> None:
    """One save, the way `save_adapter` does it."""

    def write(staged: Path) -> None:
        for name in FILES:
            (staged / name).write_text(f"{generation} " * size)

    atomic.replace_files(target, write, commit="config", obsolete=("stale",))


def prepare(place: Path) -> Path:
    """A folder with a first save and foreign files in it."""
    target = place / "adapter"
    save(target, 0)
    for name, text in FOREIGN.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    (target / "stale").write_text("0")
    return target


def state(target: Path) -> str:
    """`"0"` or `"1"` for a whole folder of that generation, `"none"` without the commit file, `"mixed"` otherwise."""
    if not target.exists():
        return "absent"
    if any((target / name).read_text() != text for name, text in FOREIGN.items() if (target / "README.md").exists()):
        return "mixed"
    if not (target / "config").exists():
        return "none"
    found = {(target / name).read_text().split()[0] if (target / name).exists() else "gone" for name in FILES}
    return found.pop() if len(found) == 1 else "mixed"


def in_child(act: Callable[[], None]) -> int:
    """Run a function in a fork. Its exit status, negative for a signal; an `OSError` gives its number."""
    child = os.fork()
    if child == 0:
        status = 200
        try:
            act()
            status = 0
        except OSError as error:
            status = error.errno or 201
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(step: int) -> None:
    """Kill this process at its n-th call that touches the file system."""
    seen = 0
    calls = (
        "open",
        "os.rename",
        "os.link",
        "os.mkdir",
        "os.remove",
        "os.rmdir",
        "os.chmod",
        "os.scandir",
        "fcntl.flock",
    )

    def watch(event: str, arguments: object) -> None:
        nonlocal seen
        if event in calls or event.startswith(("ctypes.", "shutil.", "tempfile.")):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_at_every_step(place: Path, mode: str) -> dict[str, Any]:
    """A second save is killed at its first call into the file system, then at its second, until one comes through."""
    states: list[str] = []
    left: list[str] = []
    for step in range(1, 1000):
        folder = place / str(step)
        folder.mkdir()
        target = prepare(folder) if mode != "new" else folder / "adapter"

        def act(target: Path = target, step: int = step) -> None:
            if mode == "inside":
                os.chdir(target)
            _kill_at(step)
            save(target, 1)

        status = in_child(act)
        states.append(state(target))
        save(target, 2)
        if state(target) != "2":
            states.append(f"after step {step}: {state(target)}")
        left += [str(path) for path in folder.rglob(f"{atomic.STAGING}*")]
        shutil.rmtree(folder)
        if status == 0:
            return {"steps": step, "states": states, "left": left}
    raise AssertionError("no save came through")


def killed_at_random(place: Path, times: int, seed: int) -> dict[str, Any]:
    """One folder, saved again and again by children that are killed after a random time."""
    target = prepare(place)
    chance = random.Random(seed)
    states: list[str] = []
    for number in range(1, times + 1):
        child = os.fork()
        if child == 0:
            generation = number * 1_000_000
            while True:
                generation += 1
                save(target, generation, size=2_000)
        while int((target / "config").read_text().split()[0]) < number * 1_000_000:
            time.sleep(0.001)  # until it has saved once
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states.append(state(target))
    save(target, 1)
    left = [str(path) for path in place.rglob(f"{atomic.STAGING}*")]
    return {"mixed": [s for s in states if not s.isdecimal()], "different": len(set(states)), "left": left}


def saved_together(place: Path, rounds: int, saves: int) -> dict[str, Any]:
    """Two processes save into one folder, each again and again: the same config and plan each time, with other weights."""
    target = prepare(place)
    states: list[str] = []
    for _ in range(rounds):
        children = []
        for generation in (1, 2):
            children.append(os.fork())
            if children[-1] == 0:
                for number in range(saves):
                    _save_weights(target, generation, number)
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        states.append(state(target))
    left = [str(path) for path in place.rglob(f"{atomic.STAGING}*")]
    return {"mixed": [s for s in states if s not in ("1", "2")], "left": left}


def _save_weights(target: Path, generation: int, number: int) -> None:
    def write(staged: Path) -> None:
        for name in FILES:
            (staged / name).write_text(f"{generation} {number if name == 'weights' else ''}")

    atomic.replace_files(target, write, commit="config")


def become_nobody(target: Path, *modes: tuple[Path, int]) -> None:
    """Give the folder to an unprivileged user, set permissions, and be that user (who is not root already)."""
    nobody = 65534
    if os.getuid() == 0:
        for path in (target, *target.rglob("*")):
            os.chown(path, nobody, nobody)
    for path, mode in modes:
        path.chmod(mode)
    if os.getuid() == 0:
        os.setgid(nobody)
        os.setuid(nobody)


def refuse(place: Path, target: Path, case: str) -> Path:
    """Have the system refuse a save in some way. Returns where to save."""
    match case:
        case "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        case "folder":
            become_nobody(target, (target, 0o555))
        case "parent":
            become_nobody(target, (place, 0o555))
        case "both":
            become_nobody(target, (target, 0o555), (place, 0o555))
        case "new in parent":
            become_nobody(target, (place, 0o555))
            return place / "other" / "adapter"
        case "subfolder":
            become_nobody(target, (target / "runs", 0o555))
    return target


def refused(place: Path, case: str) -> dict[str, Any]:
    """What a save that is refused leaves."""
    place.chmod(0o777)
    target = prepare(place)
    status = in_child(lambda: save(refuse(place, target, case), 1, size=10_000))
    place.chmod(0o777)
    left = [str(path) for path in place.rglob(f"{atomic.STAGING}*")]
    return {"status": status, "state": state(target), "left": left, "other": (place / "other").exists()}


def refused_adapter(place: Path, case: str) -> dict[str, Any]:
    """What a user is told when a real adapter cannot be saved, or read, and what is then on the disk."""
    import torch

    from peftc.checkpoint import open_adapter, save_adapter
    from peftc.config.base import PeftConfig
    from peftc.diagnostics import PeftcError

    place.chmod(0o777)
    target, told = place / "adapter", place / "told"
    save_adapter(target, {"a": torch.ones(4)}, PeftConfig())
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    report = told.open("w")  # while it may still be made

    def act() -> None:
        try:
            if case == "read":
                become_nobody(target, (target / "adapter_model.safetensors", 0))
                open_adapter(target)
            else:
                save_adapter(refuse(place, target, case), {"a": torch.ones(10_000)}, PeftConfig())
        except PeftcError as error:
            json.dump({"codes": [d.code for d in error.diagnostics], "text": str(error)[:600]}, report)
            report.flush()

    in_child(act)
    place.chmod(0o777)
    same = {path.name: path.read_bytes() for path in target.iterdir()} == before
    left = [str(path) for path in place.rglob(f"{atomic.STAGING}*")]
    return {**json.loads(told.read_text() or "{}"), "same": same, "left": left}


def new_folder(place: Path, name: str) -> Path:
    """A folder below another one."""
    (place / name).mkdir()
    return place / name


def main() -> None:
    """`saving_driver.py TASK [ARGUMENT...]`"""
    task, *arguments = sys.argv[1:]
    result: dict[str, Any]
    os.fsync = lambda fd: None  # it guards against a loss of power, which these tests do not try, and is slow
    place = Path(tempfile.mkdtemp(prefix="peftc-driver-"))
    place.chmod(0o755)
    try:
        if task == "steps":
            result = killed_at_every_step(place, arguments[0])
        elif task == "random":
            result = killed_at_random(place, int(arguments[0]), int(arguments[1]))
        elif task == "together":
            result = saved_together(place, int(arguments[0]), int(arguments[1]))
        elif task == "adapter":
            result = {case: refused_adapter(new_folder(place, case), case) for case in arguments}
        else:
            result = refused(place, arguments[0])
        print(json.dumps(result))
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
