"""What a command is asked for, looked at before anything heavy is imported: which base is meant, and whether the result has a
place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from peftc import rules
from peftc.config.files import read_config
from peftc.config.sections import section_of_word
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.graph.base_ref import BaseRef


def base_of_adapter(folder: str | Path) -> BaseRef:
    """The base that an adapter names, in a folder or on the hub. Raises `PeftcError` if it names none."""
    config = read_config(folder)
    if not config.base_model_name_or_path:
        what = f"`{folder}` does not say which base model it belongs to"
        raise PeftcError(rules.BASE_MISSING(what, fix="Name it with `--base`.", where=Where(file=str(folder))))
    section = section_of_word(config.base_model_name_or_path)
    return BaseRef(**section, revision=config.revision if "model" in section else None, task_type=config.task_type)


def require_new(folder: Path) -> None:
    """Raise `PeftcError` if the path is taken by anything but an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = f"`{folder}` is there and not empty"
        raise PeftcError(rules.FOLDER_TAKEN(what, fix="Name a new folder.", where=Where(file=str(folder))))


def refuse_other_base(found: Iterable[Diagnostic]) -> None:
    """Raise what was found of a base that is not the adapter's, if anything, with the option that goes on all the same."""
    told = [replace(one, fix=f"{one.fix} `--any-base` goes on all the same.") for one in found]
    if told:
        raise PeftcError(told)
