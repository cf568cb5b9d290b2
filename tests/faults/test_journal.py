"""The journal itself: every undo runs, the first error is raised, and an operation inside another is undone with that."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_trained, keep_values, note, whole


class Thing:
    """Something with attributes."""

    def __init__(self) -> None:
        self.a = 1


def interrupted() -> None:
    raise KeyboardInterrupt


def test_every_undo_runs_and_the_first_error_is_raised() -> None:
    done: list[str] = []

    @whole
    def operation() -> None:
        note(done.append, "first")
        note(interrupted)
        note(done.append, "last")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        operation()
    assert done == ["last", "first"]
    assert caught.value.__notes__ == ["Not all could be undone: KeyboardInterrupt: "]


def test_an_undo_that_is_interrupted_once_is_run_again() -> None:
    tries: list[int] = []

    def undo() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt

    @whole
    def operation() -> None:
        note(undo)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        operation()
    assert len(tries) == 2
    assert getattr(caught.value, "__notes__", []) == []


def test_what_an_inner_operation_did_is_undone_by_the_outer_one() -> None:
    thing, entries = Thing(), {"a": 1, "b": 2}

    @whole
    def inner() -> None:
        keep(thing)
        keep_entries(entries)
        thing.a, thing.b = 2, 3  # type: ignore[attr-defined]
        entries.pop("a")

    @whole
    def outer() -> None:
        inner()
        keep_entry(entries, "c")
        entries["c"] = 3
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        outer()
    assert thing.__dict__ == {"a": 1}
    assert list(entries.items()) == [("a", 1), ("b", 2)]  # in their order


def test_an_inner_operation_that_failed_and_was_forgiven_is_undone_alone() -> None:
    entries = {"a": 1}

    @whole
    def inner() -> None:
        keep_entry(entries, "b")
        entries["b"] = 2
        raise ValueError("no")

    @whole
    def outer() -> None:
        keep_entry(entries, "a")
        entries["a"] = 5
        with pytest.raises(ValueError, match="no"):
            inner()

    outer()
    assert entries == {"a": 5}


def test_tensors_get_their_values_and_flags_back_and_gradients_are_as_before() -> None:
    tensor = torch.nn.Parameter(torch.ones(3))

    @whole
    def operation() -> None:
        torch.set_grad_enabled(False)  # as a context that is cut off leaves it
        torch.device("meta").__enter__()
        keep_values(tensor)
        tensor.zero_()
        keep_trained(tensor, False)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        operation()
    assert torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu"
    assert tensor.requires_grad
    assert torch.equal(tensor, torch.ones(3))


def test_nothing_is_kept_without_an_operation() -> None:
    entries = {"a": 1}
    keep_entry(entries, "a")
    note(interrupted)
    entries["a"] = 2
    assert entries == {"a": 2}


#: The collector runs wherever it can, and what it finds is an operation of its own whose traces are written over.
COLLECTED = """
import gc
from peftc.runtime.journal import whole

@whole
def operation(): pass

class Cycle:
    def __init__(self): self.me = self
    def __del__(self):
        operation()
        kept.append([{"a": n} for n in range(20)] + [(object(),) * n for n in range(9) for _ in range(20)])
        del kept[:-3]

kept = []
for threshold in range(1, 60):
    gc.set_threshold(threshold)
    for _ in range(300):
        Cycle()
        operation()
"""


def test_operations_may_end_while_others_are_collected() -> None:
    # a block of `disable_adapter` that was never left is ended by the collector, in the middle of another operation
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COLLECTED], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
