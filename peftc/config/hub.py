"""One file of a repository on the Hugging Face hub, fetched into its cache by the hub's own client when it is needed.

Works offline for what the cache has; what cannot be had is a diagnostic that says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
#: Keywords of callers that are meant for the hub; all others are not ours to pass on.
_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})


def is_repository(name: str) -> bool:
    """Whether a text can be the id of a repository, and does not look like a path."""
    return _REPOSITORY.fullmatch(name) is not None and not name.startswith((".", "/", "~"))


def fetch(repository: str, name: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """The local copy of one file of a repository. Raises `PeftcError` when neither cache nor hub has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # its HTTP library differs between versions; the errors of that library are the bases of the client's own
    failures: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
    known = {key: value for key, value in options.items() if key in _OPTIONS and value is not None}
    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **known))
    except failures as error:
        raise PeftcError(_explain(repository, name, error)) from error


def optional_file(source: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """A file that a local folder or a repository may have beside its adapter, None if it cannot be had."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / name
        return file if file.is_file() else None
    try:
        return fetch(source, name, None, options) if is_repository(source) else None
    except PeftcError:
        return None


def _explain(repository: str, name: str, error: Exception) -> Diagnostic:
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    match error:
        case GatedRepoError():
            fix = "Ask for access on the repository's page, then log in with `hf auth login`."
        case RepositoryNotFoundError():
            fix = "Check the name; for a private repository, log in with `hf auth login`."
        case RemoteEntryNotFoundError():
            fix = "Check `subfolder` and `revision`."
        case _:
            fix = "Check the path. To use the hub: check the connection and HF_HUB_OFFLINE, or download it beforehand."
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"`{repository}` is no folder here, and the hub did not give `{name}`: {reason}"
    return rules.HUB_UNAVAILABLE(what, fix=fix)
