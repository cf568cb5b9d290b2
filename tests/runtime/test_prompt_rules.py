"""Prompts in caches and in generation fail closed: what does not fit is told, with nothing changed, and each refusal is
spoiled once to see that its case can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import PeftModel, rules
from peftc.host import caches
from peftc.model.parts import prompts
from peftc.runtime.prompt import cache, driver, generation
from tests.defects import put_defect
from tests.runtime.test_rules import Case, failure, ids, prompted, stored, two_prompts

pytestmark = pytest.mark.filterwarnings("ignore")


def kept(model: nn.Module) -> object:
    """The cache that a model keeps of a call."""
    with torch.no_grad():
        return caches.of_outputs(model(input_ids=ids(), use_cache=True))


def twice() -> Tensor:
    return torch.cat([ids(), ids()], dim=1)


def other_cache(model: PeftModel) -> None:
    past = kept(model)
    model.set_adapter("other")
    try:
        model(ids(), past_key_values=past)
    finally:
        model.set_adapter("default")


def base_goes_on(model: PeftModel) -> None:
    past = kept(model)
    with model.disable_adapter():
        model(ids(), past_key_values=past)


def with_base(model: PeftModel, **methods: Callable[..., Any]) -> PeftModel:
    """The model with other functions on its base, as another release of transformers might have them."""
    vars(model.get_base_model()).update(methods)
    return model


def unused(model: PeftModel) -> PeftModel:
    base = model.get_base_model()
    forward = base.forward

    def without(**kwargs: Any) -> Any:
        caches.taken(kwargs)
        return forward(**kwargs | {"attention_mask": None})

    return with_base(model, forward=without)


def unlike(model: PeftModel) -> PeftModel:
    """Steps that leave a token out of what was prepared."""

    def generate(inputs: Tensor, **options: Any) -> Any:
        base: Any = model.get_base_model()
        call = base.prepare_inputs_for_generation(inputs, use_cache=False)
        return base(inputs_embeds=call["inputs_embeds"][:, 1:])

    return with_base(model, generate=generate)


def unasked(model: PeftModel) -> PeftModel:
    """Generation that calls the model straight away."""
    return with_base(model, generate=lambda inputs, **options: model.get_base_model()(input_ids=inputs))


def silent(model: PeftModel) -> PeftModel:
    return with_base(model, generate=lambda inputs, **options: inputs)


CASES = {
    "keys and values for a model that leaves them": Case(
        rules.NO_CACHE, lambda: unused(stored()), lambda m: m(ids()),
        (cache, "caches.length(cache) <= before:", "False:"), "takes a cache and does not use it",
    ),
    "a cache of another make": Case(
        rules.CALL_NOT_POSSIBLE, prompted, lambda m: m(ids(), past_key_values=[1]),
        (cache, "if not caches.is_cache(cache):", "if False:"), "The cache is a list",
    ),
    "a cache without the prompt": Case(
        rules.CACHE_STRANGE, prompted, lambda m: m(ids(), past_key_values=kept(m.get_base_model())),
        (cache, "if found != expected:", "if False:"), "The cache holds no virtual tokens, and the active adapter needs those of",
    ),
    "generation from a cache of the base": Case(
        rules.CACHE_STRANGE, stored, lambda m: m.generate(twice(), past_key_values=kept(m.get_base_model())),
        (driver, "        cache.refuse_strange(caches.of_call(call), self.held)\n        self._refuse_chunks", "        self._refuse_chunks"),
        "The cache holds no virtual tokens",
    ),
    "a cache with the prompt of another adapter": Case(
        rules.CACHE_STRANGE, two_prompts, other_cache,
        (cache, "if found != expected:", "if False:"), "The cache holds the virtual tokens of `default`",
    ),
    "a cache with a prompt for the base": Case(
        rules.CACHE_STRANGE, prompted, base_goes_on,
        (prompts, "if cache.held_by(past) is not None:", "if False:"), "the active adapter needs none",
    ),
    "a mask that the cache does not fit": Case(
        rules.STEP_UNFIT, prompted, lambda m: m(ids(), attention_mask=torch.ones(2, 7), past_key_values=kept(m)),
        (driver, "            self._refuse_unfit(call, past)", "            pass"), "`attention_mask` is about 7 tokens, cache and input hold",
    ),
    "an input read in pieces": Case(
        rules.CALL_NOT_POSSIBLE, prompted, lambda m: m.generate(ids(), max_new_tokens=2, prefill_chunk_size=2),
        (driver, '        self._refuse_chunks(call)\n', ""), "`prefill_chunk_size` is set",
    ),
    "a step of another length": Case(
        rules.STEP_UNFIT, lambda: unlike(prompted()), lambda m: m.generate(ids(), max_new_tokens=2, do_sample=False),
        (generation, 'fits(self.tokens, held', 'fits(held, held'), "The step is about",
    ),
    "generation that asks for no step": Case(
        rules.STEP_UNFIT, lambda: unasked(prompted()), lambda m: m.generate(ids(), max_new_tokens=2, do_sample=False),
        (generation, "        if self.tokens is None:\n            raise PeftcError(self._not_asked())\n        stream", "        stream"),
        "without asking it for the inputs of the step",
    ),
    "generation that calls nothing": Case(
        rules.STEP_UNFIT, lambda: silent(prompted()), lambda m: m.generate(ids(), max_new_tokens=2, do_sample=False),
        (driver, "        steps.refuse_unused()\n", ""), "without asking it for the inputs of the step",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_and_nothing_changes(case: Case) -> None:
    assert failure(case) == ""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_case_fails_under_a_defect(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    put_defect(monkeypatch, *case.defect)
    assert failure(case) != ""
