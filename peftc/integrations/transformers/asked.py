"""What a command is asked for, looked at before anything heavy is imported: which base is meant, and whether the result has a
place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftc import rules
from peftc.checkpoint.names import BASE_NAME, QUANTIZATION
from peftc.config.files import read_config
from peftc.config.json_text import parse_json
from peftc.config.reader import read_text
from peftc.config.sections import section_of_word
from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.graph.base_ref import BaseRef
from peftc.graph.locate import locate
from peftc.graph.quantised import packed_config
from peftc.limits import MAX_CARD


def base_of_adapter(folder: str | Path) -> BaseRef:
    """The base that an adapter names, in a folder or on the hub, quantised as it was in training where a folder here says how.
    Raises `PeftcError` if it names none."""
    config = read_config(folder)
    if not config.base_model_name_or_path:
        what = f"`{folder}` does not say which base model it belongs to"
        raise PeftcError(rules.BASE_MISSING(what, fix="Name it with `--base`.", where=Where(file=str(folder))))
    section = section_of_word(config.base_model_name_or_path)
    revision = config.revision if "model" in section else None
    ref = BaseRef(**section, revision=revision, task_type=config.task_type)
    said = _quantised_in(Path(folder))
    return ref if said is None or packed_config(locate(ref)) is not None else replace(ref, quantization=said)


def _quantised_in(folder: Path) -> Mapping[str, Any] | None:
    """How the base was quantised that an adapter was saved on; None if it was not, or nothing says so."""
    file = folder / BASE_NAME
    if not file.is_file():
        return None
    try:
        data = parse_json(read_text(str(file), MAX_CARD), str(file)).data
    except PeftcError:  # a remark in a file, which anyone may have written
        return None
    found = data.get(QUANTIZATION) if isinstance(data, Mapping) else None
    return found if isinstance(found, dict) else None


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
