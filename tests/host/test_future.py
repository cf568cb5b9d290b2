"""A release of transformers that does not exist: its models are called otherwise, or its generation goes another way. What is
generated with a prompt is right then, or refused by name; never other tokens."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peftc import PeftcError, get_peft_model, rules
from peftc.host import caches
from peftc.registry.manager import default_registry
from peftc.testing.models import seeded
from peftc.tuner.prompt import PromptTuner

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 60,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = 4
#: What a refusal may be called.
REFUSED = {rules.NO_CACHE.code, rules.CACHE_STRANGE.code, rules.STEP_UNFIT.code, rules.CALL_NOT_POSSIBLE.code}


@cache
def today() -> str:
    """The name that this release has for a cache."""
    with torch.device("meta"):
        return caches.keyword(LlamaForCausalLM(LlamaConfig(**SIZES))) or ""


def renamed(values: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    return {after if name == before else name: value for name, value in values.items()}


class Renamed(LlamaForCausalLM):
    """A cache is called `memory`, in calls, outputs, and between the steps of generation; the signature says nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if today() in kwargs:
            raise TypeError(f"unexpected keyword `{today()}`")
        return super().forward(*args, **renamed(kwargs, "memory", today()))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        found = super().prepare_inputs_for_generation(input_ids, **renamed(kwargs, "memory", today()))
        return renamed(found, today(), "memory")

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **options: Any) -> Any:  # type: ignore[override]
        return renamed(super()._update_model_kwargs_for_generation(outputs, model_kwargs, **options), today(), "memory")


# nothing of the cache, which is among the keywords
Renamed.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p for p in inspect.signature(LlamaForCausalLM.forward).parameters.values() if p.name not in caches.NAMES]
)


class Swallowing(LlamaForCausalLM):
    """A cache that is handed over is taken without a word and not used."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        caches.taken(kwargs)
        return super().forward(*args, **kwargs)


class Sliced(LlamaForCausalLM):
    """Generation cuts the ids to the newest before it asks for the inputs of a step."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        asked = self.prepare_inputs_for_generation
        held = 0

        def cut(input_ids: Tensor, **options: Any) -> Any:
            nonlocal held
            ids, held = input_ids[:, held:], input_ids.shape[1]
            return asked(ids, **options)

        vars(self)["prepare_inputs_for_generation"] = cut
        try:
            return super()._sample(*args, **kwargs)
        finally:
            vars(self)["prepare_inputs_for_generation"] = asked


class Unasked(LlamaForCausalLM):
    """Generation prepares its inputs by a function of the class."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        own = vars(self).pop("prepare_inputs_for_generation", None)
        try:
            return super()._sample(*args, **kwargs)
        finally:
            if own is not None:
                vars(self)["prepare_inputs_for_generation"] = own


class Counted(LlamaForCausalLM):
    """The place of each token is counted when the model is called, from what the mask has, without virtual tokens."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mask, new = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        new = kwargs["input_ids"] if new is None else new
        length = new.shape[1] + caches.length(caches.of_call(kwargs)) if mask is None else mask.shape[1]
        kwargs["position_ids"] = (
            (torch.arange(length - new.shape[1], length) - 2)[None].expand(len(new), -1).clamp(min=0)
        )
        return super().__call__(*args, **kwargs)


class Cropped(LlamaForCausalLM):
    """A mask is cut to the newest tokens when a cache has the others."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        found = super().prepare_inputs_for_generation(input_ids, **kwargs)
        mask = found.get("attention_mask")
        if mask is not None and mask.dim() == 2 and caches.length(caches.of_call(found)):
            found["attention_mask"] = mask[:, -input_ids.shape[1] :]
        return found


RELEASES = (Renamed, Swallowing, Sliced, Unasked, Counted, Cropped)
METHODS = [name for name in default_registry().names if default_registry().get(name).is_prompt]


def prompted(method_name: str, cls: type[nn.Module]) -> Any:
    method = default_registry().get(method_name)
    with seeded(1):
        base = cls(LlamaConfig(**SIZES)).eval()
        model = get_peft_model(base, method.config(task_type="CAUSAL_LM", **next(iter(method.examples), {}))).eval()
        for parameter in model.prompt_encoder.parameters():
            parameter.data.add_(0.7 * torch.randn(parameter.shape))
    return model


def asked(method_name: str) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 9, 23, 31, 9], [7, 8, 40, 7, 8]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    call = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    method = default_registry().get(method_name)
    assert isinstance(method.tuner, PromptTuner)
    tasks = method.tuner.tasks(method.config(task_type="CAUSAL_LM", **next(iter(method.examples), {})))
    return call if tasks is None else {**call, "task_ids": torch.arange(2) % tasks}


def answered(method_name: str, cls: type[nn.Module], **options: Any) -> list[list[int]]:
    model = prompted(method_name, cls)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    found: Tensor = model.generate(**asked(method_name), **options)
    return found.tolist()


@pytest.mark.parametrize("cls", RELEASES)
@pytest.mark.parametrize("method", METHODS)
def test_right_or_refused(method: str, cls: type[nn.Module]) -> None:
    for options in ({}, {"use_cache": False}):
        expected = answered(method, LlamaForCausalLM, **options)
        try:
            assert answered(method, cls, **options) == expected, options
        except PeftcError as error:
            assert {problem.code for problem in error.diagnostics} <= REFUSED


def test_the_made_up_releases_do_generate() -> None:
    """Without a prompt each of them is a model that generates: what is refused above is no broken model."""
    ids = torch.tensor([[5, 9, 23, 31, 9]])
    for cls in RELEASES:
        with seeded(1):
            found = cls(LlamaConfig(**SIZES)).eval().generate(ids, max_new_tokens=TOKENS, do_sample=False)
        assert found.shape[1] > ids.shape[1], cls
