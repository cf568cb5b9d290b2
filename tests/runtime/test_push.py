"""`push_to_hub`: what goes up is what `save_pretrained` writes, and the repository's own card is kept. No network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

from peftc import PeftcError, PeftConfig
from tests.runtime.methods import adapted, narrow


class Hub:
    """What of the hub's client is used, keeping what it was told. `card` is the repository's."""

    card: str | None = None
    fails: str = ""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self._told("create_repo", repo_id=repo_id, **options)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self._told("create_branch", repo_id=repo_id, **options)

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str | None, local_dir: str) -> None:
        self._told("download", repo_id=repo_id, revision=revision)
        (Path(local_dir) / ".cache").mkdir()
        if self.card is None:
            raise RemoteEntryNotFoundError("none", response=_response(404))
        (Path(local_dir) / name).write_text(self.card)

    def upload_folder(self, *, folder_path: str, **options: Any) -> str:
        self._told("upload", **options)
        root = Path(folder_path)
        self.files = {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        return "https://the/commit"

    def _told(self, name: str, **options: Any) -> None:
        self.calls.append((name, options))
        if name == self.fails:
            raise HfHubHTTPError("403 Forbidden\nand more", response=_response(403))

    def told(self, name: str) -> dict[str, Any]:
        return next(options for call, options in self.calls if call == name)


def _response(status: int) -> Any:
    """As much of an answer as the client's errors look at; its HTTP library differs between versions."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def test_root_and_subfolders_go_up_with_our_card(hub: Hub, tmp_path: Path) -> None:
    model = adapted(other=narrow())
    assert model.push_to_hub("thing", token="secret", private=True, tags=["mine"]) == "https://the/commit"
    model.save_pretrained(tmp_path)
    saved = {f.relative_to(tmp_path).as_posix(): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    card = ModelCard(hub.files.pop("README.md").decode())
    assert (card.data.library_name, card.data.tags) == ("peft", ["mine"])
    assert "NARROW" in card.text
    del saved["README.md"]
    assert hub.files == saved and "other/adapter_model.safetensors" in saved
    assert hub.told("token") == {"token": "secret"}
    assert hub.told("create_repo") == {"repo_id": "thing", "private": True, "exist_ok": True}
    assert hub.told("upload") == {
        "repo_id": "me/thing", "commit_message": "Upload model", "commit_description": None, "revision": None, "create_pr": False,
    }  # fmt: skip


def test_the_card_that_is_there_is_kept(hub: Hub) -> None:
    hub.card = "---\nlicense: mit\ntags: [poems]\n---\n\nTrained on poems.\n"
    adapted().push_to_hub("thing")
    text = hub.files["README.md"].decode()
    assert "Trained on poems." in text
    data = ModelCard(text).data
    assert (data.license, data.tags, data.library_name) == ("mit", ["poems"], "peft")


def test_a_branch_is_made_before_its_card_is_read(hub: Hub) -> None:
    adapted().push_to_hub("thing", revision="next", commit_message="More", commit_description="All")
    assert [name for name, _ in hub.calls] == ["token", "create_repo", "create_branch", "download", "upload"]
    assert hub.told("download")["revision"] == hub.told("upload")["revision"] == "next"
    assert hub.told("upload")["commit_message"] == "More"


def test_who_may_only_propose_proposes(hub: Hub) -> None:
    hub.fails = "create_branch"
    adapted().push_to_hub("thing", revision="next", create_pr=True)
    assert hub.told("upload")["create_pr"]


@pytest.mark.parametrize("step", ["create_repo", "create_branch", "download", "upload"])
def test_a_refusal_is_a_diagnostic(hub: Hub, step: str) -> None:
    hub.fails = step
    with pytest.raises(PeftcError, match="403 Forbidden") as caught:
        adapted().push_to_hub("thing", revision="next")
    assert [d.code for d in caught.value.diagnostics] == ["PC645"]
    assert hub.files == {}


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\nMine.\n"], ids=["none", "one"])
def test_a_config_goes_up_alone(hub: Hub, card: str | None, tmp_path: Path) -> None:
    hub.card = card
    config = narrow()
    config.push_to_hub("thing")
    config.save_pretrained(tmp_path)
    assert hub.files == {"adapter_config.json": (tmp_path / "adapter_config.json").read_bytes()}
    assert hub.told("upload")["commit_message"] == "Upload config"
    config.push_to_hub("thing", tags=["a", "b", "a"])
    data = ModelCard(hub.files["README.md"].decode()).data
    assert (data.tags, data.license) == (["a", "b"], "mit" if card else None)
    assert PeftConfig.from_pretrained(tmp_path) == config
