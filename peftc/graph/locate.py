"""Where a base model's files are on this machine, found without torch, transformers or a network.

Decides what identifies a base for the cache: the content of its config, or the header of its GGUF file. Nothing that a
config names is imported or run.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from peftc import rules
from peftc.config.places import Location, json_path
from peftc.config.problems import shorten
from peftc.diagnostics import Diagnostic, PeftcError, Where, did_you_mean
from peftc.graph.base_ref import CONFIG_FILE, BaseRef
from peftc.limits import MAX_BASE_CONFIG, MAX_DEPTH, MAX_EXPERTS, MAX_LABELS, MAX_LAYERS, MOST_TOLD

#: Keys of a config that say where it came from, not what the model is.
_PROVENANCE = ("_name_or_path", "transformers_version")

_GGUF_MAGIC = b"GGUF"
_GGUF_HEAD = 2**20


@dataclass(frozen=True)
class LocatedBase:
    """A base model found: a `config` as plain data, or a `gguf` file; `source` is the folder or hub id with the weights.

    `fingerprint` changes when the model's structure may have changed.
    """

    ref: BaseRef
    fingerprint: str
    config: Mapping[str, Any] | None = None
    gguf: Path | None = None
    source: str | None = None

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to load; a bare config is initialised at random."""
        return self.source is not None or self.gguf is not None


def locate(ref: BaseRef) -> LocatedBase:
    """Find the files of a base. Raises `PeftcError` when they are not here or cannot be read, and says what to do."""
    if ref.gguf is not None:
        return _located_gguf(ref, Path(ref.gguf))
    if ref.distribution is not None:
        return _located_gguf(ref, _distribution_file(ref.distribution, ref.file))
    if ref.config is not None:
        data = read_json_config(Path(ref.config)) if isinstance(ref.config, str) else ref.config
        return LocatedBase(ref, _config_fingerprint(data), config=data)
    folder = Path(ref.path or ref.model or "")
    if ref.path is not None or folder.is_dir():
        data = read_json_config(_config_in(folder))
        return LocatedBase(ref, _config_fingerprint(data), config=data, source=str(folder))
    if ref.model is None:
        fix = "Give one of: a hub id, a folder, a GGUF file, a distribution with a file, or a config."
        raise PeftcError(rules.BASE_MISSING("No base model is named", fix=fix))
    data = read_json_config(_cached_config(ref.model, ref.revision))
    return LocatedBase(ref, _config_fingerprint(data), config=data, source=ref.model)


def folder_of(base: LocatedBase) -> Path | None:
    """The folder with the base's files, a snapshot of the hub's cache among them; None where there is none."""
    if base.gguf is not None or base.source is None:
        return None
    folder = Path(base.source)
    return folder if folder.is_dir() else _cached_config(base.source, base.ref.revision).parent


def read_json_config(path: Path) -> Mapping[str, Any]:
    """A transformers config file as plain data. Raises `PeftcError`."""
    where = Where(file=str(path))
    try:
        if _require_regular(path) > MAX_BASE_CONFIG:
            raise PeftcError(
                rules.BASE_UNREADABLE(
                    "The file is too large for a config", fix="Name the model's config.json.", where=where
                )
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except PeftcError:  # may be an `OSError` or a `ValueError` itself
        raise
    except OSError as error:
        raise PeftcError(_no_file(path, error)) from error
    except (ValueError, RecursionError) as error:
        what = f"The config is not JSON: {error}"
        raise PeftcError(rules.BASE_UNREADABLE(what, fix="Restore the model's config.json.", where=where)) from error
    if not isinstance(data, dict):
        what = f"The config is a {type(data).__name__}, not an object"
        raise PeftcError(rules.BASE_UNREADABLE(what, fix="Restore the model's config.json.", where=where))
    return data


def _config_fingerprint(config: Mapping[str, Any]) -> str:
    data = {key: value for key, value in config.items() if key not in _PROVENANCE}
    try:
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    except (RecursionError, TypeError, ValueError) as error:  # Python's own data may be anything
        what = f"The config is not data of JSON types: {error}"
        raise PeftcError(rules.BASE_UNREADABLE(what, fix="Give what a config.json would hold.")) from error


def _require_regular(path: Path) -> int:
    """The size of a file. Raises `OSError`, and `PeftcError` for what is no regular file: a pipe would be waited for."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # opening a folder says so itself
        where = Where(file=str(path))
        raise PeftcError(rules.BASE_UNREADABLE("It is not a regular file", fix="Name a file.", where=where))
    return status.st_size


#: Keys of a config that say how many parts the model has: what they are part of, and the largest number.
_COUNTED = (
    (re.compile(r"(num|n)_.*(layer|block|stage)s?(_\w+)?|(\w+_)?(layers|blocks|depths?)"), MAX_LAYERS),
    (re.compile(r"(num|n)_(\w+_)?experts(_\w+)?"), MAX_EXPERTS),
    (re.compile(r"num_labels"), MAX_LABELS),
)


def refuse_large(base: LocatedBase) -> None:
    """Raise `PeftcError` for a config that asks for more parts than any model has: building one would not end."""
    large = [_too_many(base, *found) for found in _counts(base.config or {})]
    if large:
        raise PeftcError(large[:MOST_TOLD])


def _counts(config: Any, place: Location = ()) -> Iterator[tuple[Location, int, int]]:
    """`(place, number, largest number)` of what is too large."""
    if not isinstance(config, Mapping) or len(place) > MAX_DEPTH:
        return
    for key, value in config.items():
        here = (*place, str(key))
        limit = next((limit for pattern, limit in _COUNTED if pattern.fullmatch(str(key))), None)
        numbers = value if isinstance(value, list) else [value]
        sizes = [number for number in numbers if isinstance(number, (int, float)) and limit is not None]
        if limit is not None and (sum(map(abs, sizes)) > limit or len(numbers) > limit):
            yield here, int(sum(map(abs, sizes))), limit
        yield from _counts(value, here)


def _too_many(base: LocatedBase, place: Location, number: int, limit: int) -> Diagnostic:
    what = f"The config says `{json_path(place, root='')}`: {shorten(number)}; models have up to {limit:,}"
    return rules.BASE_TOO_LARGE(what, fix="Correct the number.", where=Where(file=base.ref.name))


def _config_in(folder: Path) -> Path:
    path = folder / CONFIG_FILE
    if path.is_file():
        return path
    where = Where(file=str(folder))
    if (folder / "adapter_config.json").is_file():
        what, fix = "The folder holds an adapter, not a base model", "Name the base model that the adapter belongs to."
    elif folder.is_dir():
        what, fix = f"The folder has no {CONFIG_FILE}", "Name a folder written by `save_pretrained` of transformers."
    elif folder.exists():
        what, fix = (
            "The base is a file where a folder is expected",
            "Name a folder, a `.gguf` file or a `.json` config.",
        )
    else:
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        what, fix = "There is no such folder", did_you_mean(folder.name, siblings) or "Correct the path."
    raise PeftcError(rules.BASE_MISSING(what, fix=fix, where=where))


def _cached_config(model: str, revision: str | None) -> Path:
    """The config of a hub model in the local hub cache."""
    from huggingface_hub import try_to_load_from_cache  # here: it costs as much as all the rest of a plan
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, CONFIG_FILE, revision=revision)
    except HFValidationError as error:
        what = f"`{model}` is neither a folder nor a hub id"
        fix = "A hub id reads `owner/name`; a folder must exist."
        raise PeftcError(rules.BASE_MISSING(what, fix=fix)) from error
    if isinstance(found, str):
        return Path(found)
    at = f" at revision `{revision}`" if revision else ""
    flag = f" --revision {revision}" if revision else ""
    raise PeftcError(
        rules.BASE_MISSING(
            f"`{model}`{at} is not in the local Hugging Face cache, and there is no folder of that name",
            fix=f"Run `hf download {model} {CONFIG_FILE}{flag}` once (planning needs no weights), or name a local folder.",
        )
    )


def _located_gguf(ref: BaseRef, path: Path) -> LocatedBase:
    try:
        size = _require_regular(path)
        with path.open("rb") as file:
            head = file.read(_GGUF_HEAD)
    except PeftcError:
        raise
    except OSError as error:
        raise PeftcError(_no_file(path, error)) from error
    if not head.startswith(_GGUF_MAGIC):
        what = "The file does not begin as a GGUF file does"
        where = Where(file=str(path))
        raise PeftcError(rules.BASE_UNREADABLE(what, fix="Download it again, or name another file.", where=where))
    fingerprint = hashlib.sha256(head + str(size).encode()).hexdigest()
    return LocatedBase(ref, fingerprint, gguf=path)


def _distribution_file(distribution: str, file: str | None) -> Path:
    """A file of an installed distribution, found in its records: nothing of it is imported."""
    try:
        listed = metadata.files(distribution)
    except metadata.PackageNotFoundError as error:
        what = f"The distribution `{distribution}` is not installed"
        fix = f"Install it: `pip install --no-deps {distribution}`."
        raise PeftcError(rules.DEPENDENCY_MISSING(what, fix=fix)) from error
    names = {str(entry): entry for entry in listed or ()}
    matches = [entry for name, entry in names.items() if file is not None and (name == file or entry.name == file)]
    if len(matches) == 1:
        return Path(str(matches[0].locate()))
    models = [name for name in names if name.lower().endswith(".gguf")]
    what = f"`{distribution}` has {len(matches) or 'no'} file{'s' if len(matches) > 1 else ''} called `{file}`"
    fix = did_you_mean(file or "", names) or f"Its GGUF files are: {', '.join(models) or 'none'}."
    raise PeftcError(rules.BASE_MISSING(what, fix=fix))


def _no_file(path: Path, error: OSError) -> Diagnostic:
    """The diagnostic for a file that cannot be opened."""
    where = Where(file=str(path))
    if not isinstance(error, FileNotFoundError):
        return rules.BASE_UNREADABLE(
            f"The file cannot be read: {error.strerror}", fix="Check it and its permissions.", where=where
        )
    parent = path.parent
    siblings = [p.name for p in parent.iterdir() if p.suffix == path.suffix] if parent.is_dir() else []
    return rules.BASE_MISSING(
        "There is no such file", fix=did_you_mean(path.name, siblings) or "Correct the path.", where=where
    )
