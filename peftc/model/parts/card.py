"""The model card of a live model: its facts gathered, its file written, and the whole folder pushed to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peftc import rules
from peftc.checkpoint.card import CardFacts, card_text, read_card
from peftc.config.files import write_text
from peftc.config.hub import CARD, Commit, upload
from peftc.config.types import TaskType
from peftc.diagnostics import PeftcError, Where, warn
from peftc.model.parts.adapted import AdaptedModel
from peftc.registry.manager import default_registry


def facts_of(model: AdaptedModel, root: str, tags: Iterable[str] = ()) -> CardFacts:
    """What a card says of a model, active or not. `root` is the name of the adapter whose files are not in a subfolder."""
    base, facts = model.get_base_model(), model.session.graph.model
    registry = default_registry()
    config = next((model.peft_config[name] for name in (*model.active_adapters, *model.peft_config)), None)
    methods = () if config is None else registry.get(str(config.peft_type)).tags
    found = {*tags, *(getattr(base, "model_tags", None) or ()), *methods}
    if facts.model_type is not None:
        found.add("transformers")
    return CardFacts(
        {None if name == root else name: str(c.peft_type) for name, c in model.peft_config.items()},
        base_model=facts.name_or_path,
        tags=tuple(sorted(found)),
        # the only task that goes with one kind of pipeline
        pipeline_tag="text-generation" if config is not None and config.task_type == TaskType.CAUSAL_LM else None,
        quantization=_quantization(getattr(base, "config", None)),
    )


def _quantization(config: Any) -> Mapping[str, Any]:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    return found if isinstance(found, Mapping) else dict(found.to_dict())


def new_card(facts: CardFacts, folder: Path) -> str | None:
    """The text for the folder's card; None, with a warning, if the one that is there cannot be understood."""
    try:
        return card_text(facts, read_card(folder))
    except PeftcError as error:
        warn(error.diagnostics)
        return None


def write_card(facts: CardFacts, folder: Path) -> None:
    """Write the folder's card in one step. Raises `PeftcError` if the folder cannot be written."""
    text = new_card(facts, folder)
    if text is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CARD, text)
    except OSError as error:
        what = f"The model card could not be saved to `{folder}`: {error.strerror or error}"
        fix = "Save to a folder that you may write to, on a disk with space."
        raise PeftcError(rules.SAVE_FAILED(what, fix=fix, where=Where(file=str(folder)))) from error


def push(model: AdaptedModel, repository: str, root: str, tags: Iterable[str], commit: Commit) -> Any:
    """Save the model into a folder, with its card, and upload that. Returns the hub's answer."""

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        write_card(facts_of(model, root, tags), folder)

    return upload(repository, fill, commit)
