"""Which embeddings of the base model are saved with an adapter: those that it adapts, and all if the vocabulary was resized.

Whether it was resized is found by comparing with the base's own `config.json`, in its folder, in the hub's cache, or on the
hub; where that cannot be had, the vocabulary counts as unchanged, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from peftc import rules
from peftc.compiler.plan.adapter import VOCABULARY_NAMES, AdapterPlan, trains_rows
from peftc.config.base import PeftConfig
from peftc.config.hub import fetch, is_repository
from peftc.diagnostics import ConfigError, PeftcError, warn
from peftc.graph.locate import read_json_config
from peftc.runtime.session.session import Session

AUTO = "auto"
_FILE = "config.json"


def embeddings_to_save(session: Session, plan: AdapterPlan, choice: str | bool) -> dict[str, nn.Parameter]:
    """Key in the checkpoint -> tensor of the base model, by `save_embedding_layers` as the reference means it.

    `True`: the adapted embeddings, or all if none is adapted. `"auto"`: the same if an embedding is adapted (but not when
    single rows of it are trained) or the vocabulary was resized. `False`: none. Raises `ConfigError` for another choice.
    """
    if choice not in (True, False, AUTO):
        what = f"`save_embedding_layers` cannot be `{choice}`"
        raise ConfigError(rules.BAD_VALUE(what, fix='Use `True`, `False` or `"auto"`.'))
    if choice is False:
        return {}
    found = session.base.vocabulary(plan)
    by_name = any(tensor.targeted and tensor.path.rpartition(".")[2] in VOCABULARY_NAMES for tensor in found)
    if choice == AUTO and not (by_name and not trains_rows(plan.config)) and not _resized(session.model, plan.config):
        return {}
    if not found and choice is True and session.graph.model.input_embeddings is None:
        unknown = "Could not identify embedding layer(s) because the model is not a 🤗 transformers model."
        what = f"{unknown} They are not in the checkpoint"
        fix = "Leave `save_embedding_layers` out, or name the embedding in `modules_to_save`."
        warn([rules.EMBEDDINGS_UNKNOWN(what, fix=fix)])
    return {tensor.disk: tensor.tensor for tensor in found if tensor.adapted or not by_name}


def _resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the model's vocabulary has another size than that of the base model as it lies on disk or on the hub."""
    live, base = getattr(model, "config", None), config.base_model_name_or_path
    size = getattr(live, "vocab_size", None)
    if not size or not base:
        return False
    try:
        data = _base_config(base, config.revision)
    except PeftcError as error:
        what = f"The vocabulary is taken as unchanged: {error.diagnostics[0].what}"
        fix = "Pass `save_embedding_layers=True` if you resized it, `False` if not."
        warn([rules.VOCABULARY_UNKNOWN(what, fix=fix)])
        return False
    return data is not None and _vocabulary_of(type(live), data) not in (size, None)


def _vocabulary_of(cls: Any, data: Mapping[str, Any]) -> int | None:
    """The size that the model's own config class reads from the data: it knows defaults and nested configs."""
    size: int | None = getattr(cls.from_dict(dict(data)), "vocab_size", None)
    return size


def _base_config(base: str, revision: str | None) -> Mapping[str, Any] | None:
    """The config of a base model; None if what it is called is no folder with one and cannot be a repository."""
    local = Path(base, _FILE)
    if not local.is_file():
        if Path(base).exists() or not is_repository(base):
            return None
        local = _from_hub(base, revision)
    return read_json_config(local)


@cache
def _from_hub(base: str, revision: str | None) -> Path:
    """The file in the cache, where the base model that was loaded is; only else from the hub."""
    try:
        return fetch(base, _FILE, None, {"revision": revision, "local_files_only": True})
    except PeftcError:
        return fetch(base, _FILE, None, {"revision": revision})
