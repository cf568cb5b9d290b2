"""Prompts fail closed, in calls, caches and generation: what does not fit is told, with nothing changed, and each refusal is
spoiled once to see that its case can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel

from peftc import PeftModel, get_peft_model, inject_adapter_in_model, rules
from peftc.host import caches
from peftc.model import mapping
from peftc.model.parts import prompts
from peftc.runtime.prompt import cache, driver, encoder, generation, streams
from tests.defects import put_defect
from tests.runtime.methods import LANGUAGE_MODEL, preface, prompted
from tests.runtime.refused import Case, failure

pytestmark = pytest.mark.filterwarnings("ignore")


def ids() -> Tensor:
    return LANGUAGE_MODEL.arguments()["input_ids"]


def two_prompts() -> PeftModel:
    model = prompted()
    model.add_adapter("other", preface())
    return model


def shared() -> PeftModel:
    return get_peft_model(LANGUAGE_MODEL.build(), preface("SHARED"))


def stored() -> PeftModel:
    return get_peft_model(LANGUAGE_MODEL.build(), preface("STORED"))


def made() -> PeftModel:
    return get_peft_model(LANGUAGE_MODEL.build(), preface("MADE"))


def checkpointed() -> nn.Module:
    model = LANGUAGE_MODEL.build()
    model.gradient_checkpointing_enable()
    return model


def encoder_only() -> nn.Module:
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return AlbertModel(AlbertConfig(**sizes, intermediate_size=24, vocab_size=40)).eval()


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
    "a prompt without a wrapper": Case(
        rules.CALL_NOT_POSSIBLE, LANGUAGE_MODEL.build, lambda m: inject_adapter_in_model(preface(), m),
        (mapping, "if method.is_prompt:", "if False:"), "Use `get_peft_model`.",
    ),
    "a prompt before nothing": Case(
        rules.CALL_NOT_POSSIBLE, prompted, lambda m: m(attention_mask=torch.ones(2, 3)),
        (streams, "    if found is None:\n        fix", "    if False:\n        fix"), "no input to put the prompt before",
    ),
    "a prompt before what has no name": Case(
        rules.CALL_NOT_POSSIBLE, lambda: prompted(task_type=None), lambda m: m(ids(), torch.ones_like(ids())),
        (driver, "if len(args) > 1 or", "if False or"), "only the input ids can be given by position",
    ),
    "a tokenizer that is not there": Case(
        rules.TOKENIZER_MISSING, LANGUAGE_MODEL.build, lambda m: get_peft_model(m, preface(tokenizer="./nowhere")),
        (encoder, "except (OSError, ValueError) as error:", "except ZeroDivisionError as error:"), "`./nowhere` cannot be loaded",
    ),
    "positions before a prompt": Case(
        rules.POSITIONS_IGNORED, prompted, lambda m: m(ids(), position_ids=torch.ones_like(ids())),
        (driver, 'if call.get("position_ids") is not None:', "if False:"), "the virtual tokens move every position",
    ),
    "token types before a prompt": Case(
        rules.INPUT_IGNORED, prompted, lambda m: m(ids(), token_type_ids=torch.ones_like(ids())),
        (driver, "if not call_of(self.encoder.config.task_type).token_types:", "if False:"), "`token_type_ids` are ignored",
    ),
    "a mask that cannot grow": Case(
        rules.CALL_NOT_POSSIBLE, prompted, lambda m: m(ids(), attention_mask=torch.ones(2, 1, 6, 6)),
        (driver, "if mask.dim() != 2:", "if False:"), "has 4 dimensions",
    ),
    "settings of generation by position": Case(
        rules.CALL_NOT_POSSIBLE, prompted, lambda m: m.generate(ids(), m.generation_config),
        (driver, "        if args:\n            what", "        if False:\n            what"), "only the input can be given to `generate`",
    ),
    "two prompts at once": Case(
        rules.ONE_PROMPT, two_prompts, lambda m: m.set_adapter(["default", "other"]),
        (prompts, "if len(names) > 1:", "if False:"), "`default`, `other` cannot be active together",
    ),
    "rows without a task": Case(
        rules.TASKS_NEEDED, shared, lambda m: m(ids()),
        (encoder, "if ids is None or ids.numel() == 0 or", "if"), "The call has no `task_ids`",
    ),
    "fewer tasks than rows": Case(
        rules.TASKS_NEEDED, shared, lambda m: m(ids(), task_ids=torch.tensor([0, 1, 0])),
        (encoder, "or batch % ids.numel():", "or False:"), "3 `task_ids` for 2 rows",
    ),
    "a task that is not there": Case(
        rules.TASKS_NEEDED, shared, lambda m: m(ids(), task_ids=torch.tensor([0, 2])),
        (encoder, "    if wrong:", "    if False:"), "names task 2, but there are 2",
    ),
    "checkpointing before keys and values": Case(
        rules.CHECKPOINTING_DROPS, checkpointed, lambda m: get_peft_model(m, preface("STORED")),
        (cache, "    refuse_checkpointing(model)\n", ""), "does not work with gradient checkpointing",
    ),
    "checkpointing keys and values": Case(
        rules.CHECKPOINTING_DROPS, stored, lambda m: m.gradient_checkpointing_enable(),
        (prompts, "if any(encoder.place.is_cache", "if any(False"), "The virtual tokens are keys and values",
    ),
    "keys and values for a model without": Case(
        rules.NO_CACHE, encoder_only, lambda m: get_peft_model(m, preface("STORED")),
        (cache, "        if caches.keyword(module) is not None:", "        if True:"), "takes no past keys and values",
    ),
    "a table of another size": Case(
        rules.TABLE_REFUSED, prompted, lambda m: m.prompt_encoder["default"].load_prompt_embeddings(torch.ones(2, 2)),
        (encoder, "if tuple(prompt_embeddings.shape) != expected:", "if False:"), "The table is (2, 2), the adapter's is (3, 16)",
    ),
    "a table for what is made of others": Case(
        rules.TABLE_REFUSED, made, lambda m: m.prompt_encoder["default"].load_prompt_embeddings(torch.ones(3, 16)),
        (encoder, "return trained <= set(values)", "return True"), "computes its table from other tensors",
    ),
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


def test_positions_that_are_warned_of_change_nothing() -> None:
    model, moved = prompted(), torch.full_like(ids(), 5)
    with torch.no_grad():
        assert torch.equal(model(ids(), position_ids=moved).logits, model(ids()).logits)
