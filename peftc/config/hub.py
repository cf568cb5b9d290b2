"""One file of a repository on the Hugging Face hub, fetched into its cache by the hub's own client, and a folder uploaded.

Works offline for what the cache has; what cannot be had is a diagnostic that says why.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError, Where

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
#: The file that describes a repository to people.
CARD = "README.md"
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


def parse_card(text: str) -> ModelCard:
    """A model card by its text. Raises `PeftcError` for front matter that cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        return ModelCard(text)
    except (ValueError, TypeError, YAMLError) as error:
        what = f"The front matter of the model card is not valid: {str(error).splitlines()[0]}"
        fix = "Correct what stands between its `---` lines, or move the card away: a new one is written then."
        raise PeftcError(rules.CARD_UNREADABLE(what, fix=fix, where=Where(file=CARD))) from None


@dataclass(frozen=True, slots=True)
class Commit:
    """How an upload is told to the hub, by the names that its client has for it."""

    commit_message: str
    commit_description: str | None = None
    private: bool | None = None
    token: bool | str | None = None
    revision: str | None = None
    create_pr: bool = False


def upload(repository: str, fill: Callable[[Path], None], commit: Commit) -> Any:
    """Upload what `fill` puts into a folder, as one commit; returns the hub's answer, the address of the commit.

    The folder has the repository's own card at first, so that it can be kept. The repository is made if needed. Raises
    `PeftcError` if the hub refuses or cannot be reached, and whatever `fill` raises; there is no commit then.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError

    failures: tuple[type[Exception], ...] = (OSError, HFValidationError, *HfHubHTTPError.__bases__)
    api = HfApi(token=commit.token)
    with tempfile.TemporaryDirectory() as place:
        try:
            repository = api.create_repo(repository, private=commit.private, exist_ok=True).repo_id
            _make_branch(api, repository, commit)
            with suppress(RemoteEntryNotFoundError):
                api.hf_hub_download(repository, CARD, revision=commit.revision, local_dir=place)
            shutil.rmtree(Path(place, ".cache"), ignore_errors=True)  # the client's notes about the download
        except failures as error:
            raise PeftcError(_not_uploaded(repository, error)) from error
        fill(Path(place))
        try:
            return api.upload_folder(
                repo_id=repository,
                folder_path=place,
                commit_message=commit.commit_message,
                commit_description=commit.commit_description,
                revision=commit.revision,
                create_pr=commit.create_pr,
            )
        except failures as error:
            raise PeftcError(_not_uploaded(repository, error)) from error


def _make_branch(api: HfApi, repository: str, commit: Commit) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    if commit.revision is None or commit.revision.startswith("refs/pr"):
        return
    try:
        api.create_branch(repository, branch=commit.revision, exist_ok=True)
    except HfHubHTTPError:
        if not commit.create_pr:  # who may only propose changes cannot make branches; this one may exist
            raise


def _not_uploaded(repository: str, error: Exception) -> Diagnostic:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    fix = "Check the name and the connection; log in with `hf auth login`, with a token that may write."
    return rules.PUSH_FAILED(f"`{repository}`: {reason}", fix=fix)


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
