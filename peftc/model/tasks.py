"""The model classes for tasks. What tells them apart is data: the names that a call's arguments have.

A config's `task_type` decides the class. All of them are `PeftModel`s and compute as it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from peftc.config.base import PeftConfig
from peftc.config.types import TaskType
from peftc.model.peft_model import PeftModel

_INPUT = ("input_ids", "attention_mask", "inputs_embeds")
_OUTPUT = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")


def _forward(*names: str) -> Callable[..., Any]:
    """A `forward` with arguments of these names, which others read off its signature; only those given are passed on."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(
                f"{type(self).__name__}.forward() takes {len(names)} arguments by position, {len(args)} given"
            )
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"{type(self).__name__}.forward() got multiple values for argument '{name}'")
            kwargs[name] = value
        given = {name: value for name, value in kwargs.items() if value is not None or name not in names}
        return PeftModel.forward(self, **given)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind), *(inspect.Parameter(name, kind, default=None) for name in names)]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([*parameters, rest])  # type: ignore[attr-defined]  # what `inspect` reads
    forward.__doc__ = (
        "The base model's forward with the active adapters in effect; arguments left out are not passed on."
    )
    return forward


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A classifier of sequences with adapters. Its head (`classifier`, `score`) is trained and saved along."""

    forward = _forward(*_INPUT, "labels", *_OUTPUT)


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """An encoder-decoder language model with adapters."""

    forward = _forward(
        *_INPUT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *_OUTPUT
    )


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A language model with adapters."""

    forward = _forward(*_INPUT, "labels", *_OUTPUT)


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A classifier of tokens with adapters. Its head (`classifier`, `score`) is trained and saved along."""

    forward = _forward(*_INPUT, "labels", *_OUTPUT)


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """An extractive question answerer with adapters. Its head (`qa_outputs`) is trained and saved along."""

    forward = _forward(
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_OUTPUT,
    )


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model whose hidden states are wanted, with adapters."""

    forward = _forward(*_INPUT, *_OUTPUT)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: Mapping[str, type[PeftModel]] = MappingProxyType(PeftModel.of_task)


def task_model_class(config: PeftConfig) -> type[PeftModel]:
    """The class for a config's task; `PeftModel` itself without one."""
    return PeftModel if config.task_type is None else PeftModel.of_task[config.task_type]
