"""Every architecture of transformers as a model without weights: small in depth, with every kind of layer that it has.

Both sides of the sweep, and tests, build them alike. Nothing is fetched: a config class stands for its defaults.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

#: Layers that a model keeps: enough for the dense ones that come before experts, and for one attention among state spaces.
DEPTH = 5
#: Experts that a layer keeps.
EXPERTS = 8
#: Seconds after which building one model is given up.
PATIENCE = 60

#: Names that configs have for numbers of layers, for kinds of single layers, and for numbers of experts.
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers", "depth")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "thinker_config")

#: Classes in the order tried: the first that takes the config builds the model.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModel",
)


class NotBuilt(Exception):
    """transformers does not build the model from its default config; the message is what it says."""


def model_types() -> tuple[str, ...]:
    """Every type that transformers has a config class for, sorted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return tuple(sorted(CONFIG_MAPPING_NAMES))


def small_model(model_type: str) -> nn.Module | None:
    """The model on the meta device; None if no class of a model takes the config. Raises `NotBuilt`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with _limited(PATIENCE):
        try:
            config = CONFIG_MAPPING[model_type]()
            try:
                return _built(cut(copy.deepcopy(config)))
            except TimeoutError:
                raise
            except Exception:  # a part of the config says more about layers than was cut
                return _built(config)
        except Exception as error:  # whatever it is, the model was not built
            lines = str(error).strip().splitlines() or [""]
            raise NotBuilt(f"{type(error).__name__}: {lines[0][:120]}".rstrip(": ")) from error


def cut(config: Any) -> Any:
    """The config with few layers and experts, its parts as well; layers of each kind stay. Changes the config."""
    for part in (config, *(getattr(config, name, None) for name in _PARTS)):
        for name in _DEPTHS:
            _lower(part, name, DEPTH)
        for name in _EXPERTS:
            _lower(part, name, EXPERTS)
        for name in _KINDS:
            kinds = getattr(part, name, None)
            if isinstance(kinds, list) and len(kinds) > DEPTH:
                setattr(part, name, _some_of_each(kinds))
    return config


def _lower(part: Any, name: str, most: int) -> None:
    value = getattr(part, name, None)
    if isinstance(value, int) and value > most:
        try:
            setattr(part, name, most)
        except (AttributeError, NotImplementedError):
            return  # computed from something else


def _some_of_each(kinds: Sequence[Any]) -> list[Any]:
    """The kinds of `DEPTH` layers in their order: the first of each kind, and the first others."""
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = [i for i in range(len(kinds)) if i not in firsts]
    return [kinds[i] for i in sorted([*firsts, *others][:DEPTH])]


def _built(config: Any) -> nn.Module | None:
    import torch
    import transformers

    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                model: nn.Module = auto.from_config(config)
            return model
    return None


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block after that many seconds."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
