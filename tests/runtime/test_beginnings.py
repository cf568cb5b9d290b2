"""Adapters that act from some token of a call on: in every way that a call can be made it is the same token."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftc import (
    PeftcError,
    PeftcWarning,
    PeftModel,
    convert_adapter,
    get_peft_model,
    inject_adapter_in_model,
    rules,
)
from peftc import plugin as api
from peftc.helpers import row_values
from peftc.runtime.applying import tuner_model
from peftc.runtime.layer import folding, gated, rows
from peftc.runtime.session import beginnings, session
from tests.defects import put_defect
from tests.runtime.methods import LANGUAGE_MODEL, NarrowConfig, NarrowTuner, narrow
from tests.unit.fakes import registered

MARK = 7
#: rows with the mark in the middle, twice, at the end, at the start, and without
IDS = torch.tensor(
    [[3, 1, MARK, 4, 5, 6], [MARK, 2, 3, MARK, 5, 6], [1, 2, 3, 4, 5, MARK], [MARK, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]
)
STARTS = [2, 3, 5, 0, 6]


class LateConfig(NarrowConfig):
    """Options of the update that waits."""

    peft_type: api.PeftType | None = api.PeftType("LATE")
    mark: int = MARK


class LateTuner(NarrowTuner):
    """The thin update from the last mark on, or from where the call says."""

    keywords = ("mark_at",)

    def begins(
        self,
        c: LateConfig,
        ids: Tensor | None,
        tokens: int,
        values: api.Tensors,  # type: ignore[override]
    ) -> Tensor | None:
        if "mark_at" in values:
            return values["mark_at"]
        if ids is None:
            return None
        places = torch.where(ids == c.mark, torch.arange(tokens), -1).amax(-1)
        return torch.where(places < 0, tokens, places)


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    slots = {"prefix": "narrow_", "layer_names": ("narrow_A", "narrow_B")}
    with registered(api.TunerMethod("LATE", LateConfig, LateTuner(), **slots)):
        yield


#: layers that are adapted
PATHS = [name for name, module in LANGUAGE_MODEL.build().named_modules() if isinstance(module, nn.Linear)][:2]


def late(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = LANGUAGE_MODEL.build()
    config = LateConfig(target_modules=PATHS, task_type="CAUSAL_LM", **options)
    return get_peft_model(base, config).eval()


def by_hand(model: PeftModel, ids: Tensor = IDS, starts: list[int] = STARTS, adapter: str = "default") -> Tensor:
    """Logits where each adapted layer adds `B A x / 2` to the tokens from the start of their row on."""
    base = copy.deepcopy(model.get_base_model())
    mask = torch.arange(ids.shape[1]) >= torch.tensor(starts).unsqueeze(1)
    for name in [name for name, module in base.named_modules() if "narrow_A" in dict(module.named_children())]:
        own, plain = model.get_base_model().get_submodule(name), base.get_submodule(name).base_layer
        A, B = own.narrow_A[adapter].weight, own.narrow_B[adapter].weight

        def add(module: nn.Module, args: Any, y: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return y + (args[0] @ A.t() @ B.t()) * 0.5 * mask.unsqueeze(-1)

        plain.register_forward_hook(add)
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, plain)
    return base(ids).logits


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def in_pieces(*sizes: int) -> Callable[[nn.Module], Tensor]:
    def run(model: nn.Module) -> Tensor:
        cache, logits = None, []
        for piece in IDS.split(list(sizes), dim=1):
            outputs = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
        return torch.cat(logits, dim=1)

    return run


#: ways to make one call
WAYS: dict[str, Callable[[PeftModel], Tensor]] = {
    "at once": lambda m: m(IDS).logits,
    "by keyword": lambda m: m(input_ids=IDS).logits,
    "row by row": lambda m: torch.cat([m(row.unsqueeze(0)).logits for row in IDS]),
    "told": lambda m: m(IDS, mark_at=STARTS).logits,
    "told with embeddings": lambda m: (
        m(inputs_embeds=m.get_base_model().get_input_embeddings()(IDS), mark_at=STARTS).logits
    ),
    "named by row": lambda m: m(IDS, adapter_names=["default"] * 5).logits,
    "through the level below": lambda m: m.base_model(IDS).logits,
    "of a copy": lambda m: copy.deepcopy(m)(IDS).logits,
    "of a pickle": lambda m: pickle.loads(pickle.dumps(m))(IDS).logits,
    "after switching off and on": lambda m: (
        (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers(), m(IDS))[-1].logits
    ),
    "hooked": lambda m: hooked(m)(IDS).logits,
}


def hooked(model: PeftModel) -> PeftModel:
    for name, module in model.named_modules():
        if name.endswith("narrow_A.default"):
            module.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_call_is_the_same_however_it_is_made(way: Callable[[PeftModel], Tensor]) -> None:
    model = late()
    close(way(model), by_hand(model))


#: who is called
LEVELS: dict[str, Callable[[PeftModel], nn.Module]] = {
    "the model": lambda m: m,
    "the level below": lambda m: m.base_model,
}


#: the last mark of the second row replaces the first only where both are in one piece
@pytest.mark.parametrize("sizes", [(6,), (4, 2), (4, 1, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_calls_that_go_on_from_a_cache_know_what_is_in_it(
    level: Callable[[PeftModel], nn.Module], sizes: tuple[int, ...]
) -> None:
    model = late()
    close(in_pieces(*sizes)(level(model)), by_hand(model))


def test_a_cache_that_was_cut_is_known_up_to_the_cut() -> None:
    model = late()
    ids = IDS[:1]
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-4)  # before the mark
    other = torch.tensor([[4, 4]])
    y = model(other, past_key_values=cache, use_cache=True).logits
    close(y, by_hand(model, torch.cat([ids[:, :2], other], dim=1), [4])[:, 2:])


def test_a_cache_that_others_filled_is_read_from_here_on() -> None:
    model = late()
    with model.disable_adapter():
        cache = model(IDS[:1, :4], use_cache=True).past_key_values
    close(model(IDS[:1, 4:], past_key_values=cache).logits, by_hand(model, IDS[:1], [6])[:, 4:])


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
def test_generation_acts_from_the_prompts_mark_on(options: dict[str, Any]) -> None:
    model = late()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511, **options}
    together = model.generate(input_ids=IDS, **options)
    alone = [model.generate(IDS[row : row + 1], **options) for row in range(len(IDS))]
    assert together.tolist() == torch.cat(alone).tolist()
    if "num_beams" not in options:
        ids = IDS
        for _ in range(3):  # the mark that is generated, if it is, does not count
            ids = torch.cat([ids, by_hand(model, ids, [*STARTS[:4], 99])[:, -1:].argmax(-1)], dim=1)
        assert together.tolist() == ids.tolist()


def test_what_generation_left_in_a_cache_is_known() -> None:
    model = late()
    done = model.generate(
        IDS[:1], max_new_tokens=2, do_sample=False, return_dict_in_generate=True, use_cache=True, eos_token_id=511
    )
    held = done.sequences[:, : done.past_key_values.get_seq_length()]
    more = torch.tensor([[4]])
    y = model(more, past_key_values=done.past_key_values).logits
    close(y, by_hand(model, torch.cat([held, more], dim=1), [2])[:, -1:])


def test_rows_begin_by_their_own_adapters() -> None:
    model = late()
    model.add_adapter("other", LateConfig(target_modules=PATHS, mark=3))
    names = ["default", "other", "__base__", "default", "other"]
    y = model(IDS, adapter_names=names).logits
    first, second = by_hand(model), by_hand(model, starts=[0, 2, 2, 3, 2], adapter="other")
    base = by_hand(model, starts=[6] * 5)
    known = {"default": first, "other": second, "__base__": base}
    close(y, torch.stack([known[name][row] for row, name in enumerate(names)]))


def test_gradients_are_those_of_the_tokens_that_it_acts_on() -> None:
    model = late()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, wanted = (torch.autograd.grad(y.square().sum(), trained) for y in (model(IDS).logits, by_hand(model)))
    assert len(trained) == 4
    for mine, own in zip(found, wanted, strict=True):
        close(mine, own)


def test_an_adapter_that_does_not_wait_acts_on_all_beside_it() -> None:
    model = get_peft_model(LANGUAGE_MODEL.build(), narrow(target_modules=PATHS), mixed=True).eval()
    model.add_adapter("late", LateConfig(target_modules=PATHS))
    plain = model(IDS).logits
    model.set_adapter(["default", "late"])
    close(model(IDS[4:]).logits, plain[4:])  # no mark
    assert not torch.allclose(model(IDS[:1]).logits[:, 2:], plain[:1, 2:])
    close(model(IDS[:1]).logits[:, :2], plain[:1, :2])


def test_without_a_call_that_says_the_base_is_computed() -> None:
    model = late()
    close(model.get_base_model()(IDS).logits, by_hand(model, starts=[6] * 5))


def test_a_model_adapted_in_place_is_told_by_a_context() -> None:
    wrapped = late()
    torch.manual_seed(0)
    base = LANGUAGE_MODEL.build()
    injected = inject_adapter_in_model(LateConfig(target_modules=PATHS), base).eval()
    with row_values(injected, mark_at=STARTS):
        for ids in (IDS, IDS[:, :5], IDS):
            close(injected(ids).logits, by_hand(wrapped, ids))
    with row_values(injected):
        close(injected(IDS).logits, by_hand(wrapped))


def test_calls_within_a_context_keep_their_own_beginnings_until_backward() -> None:
    wrapped = late()
    torch.manual_seed(0)
    injected = inject_adapter_in_model(LateConfig(target_modules=PATHS), LANGUAGE_MODEL.build())
    injected.gradient_checkpointing_enable({"use_reentrant": False})
    with row_values(injected):
        first, second = injected.train()(IDS).logits, injected(IDS.flip(1)).logits
    found, wanted = (
        torch.autograd.grad(one.square().sum() + other.sum(), [p for p in model.parameters() if p.requires_grad])
        for model, one, other in (
            (injected, first, second),
            (wrapped, by_hand(wrapped), by_hand(wrapped, IDS.flip(1), [3, 5, 0, 5, 6])),
        )
    )
    for mine, own in zip(found, wanted, strict=True):
        close(mine, own)


def test_embeddings_alone_are_warned_of() -> None:
    model = late()
    with pytest.warns(PeftcWarning, match=rules.NOT_BEGUN.code):
        y = model(inputs_embeds=model.get_base_model().get_input_embeddings()(IDS)).logits
    close(y, by_hand(model, starts=[6] * 5))


def test_it_is_no_change_of_weights() -> None:
    model = late()
    before = model(IDS).logits
    for operation in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(PeftcError, match=rules.CANNOT_MERGE.code):
            operation()
    close(model(IDS).logits, before)
    with pytest.raises(PeftcError, match=rules.CANNOT_CONVERT.code):
        convert_adapter(model, "NARROW", 2)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = late()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LANGUAGE_MODEL.build(), tmp_path).eval()
    close(loaded(IDS).logits, by_hand(model))


DEFECTS = {
    "gates": (gated, "gate = float(not part.tuner.waits) if gates is None", "gate = 1.0 if gates is None", test_without_a_call_that_says_the_base_is_computed),
    "rows": (rows, " and not group[0].tuner.waits", "", test_rows_begin_by_their_own_adapters),
    "caches": (beginnings, "        before = kept[:, :past].to(ids.device)", "        before = ids.new_full((ids.shape[0], past), -1)", lambda: test_calls_that_go_on_from_a_cache_know_what_is_in_it(LEVELS["the model"], (4, 1, 1))),
    "level below": (tuner_model, "            remember(args", "            (args", lambda: test_calls_that_go_on_from_a_cache_know_what_is_in_it(LEVELS["the level below"], (4, 1, 1))),
    "contexts": (beginnings, "with shared.opened(Call(values=dict(values), gates=beginnings(session, names, values, args, kwargs))):", "vars(around.gates).update(vars(beginnings(session, names, values, args, kwargs)))\n        if True:", test_calls_within_a_context_keep_their_own_beginnings_until_backward),
    "generated": (beginnings, "_ids_in[cache] = outputs", "_ = outputs", test_what_generation_left_in_a_cache_is_known),
    "prompts": (beginnings, "gates.seen = gates.window + ", "gates.seen = gates.window + 0 * ", lambda: test_generation_acts_from_the_prompts_mark_on({})),
    "warning": (beginnings, "    if (args or kwargs) and", "    if False and", test_embeddings_alone_are_warned_of),
    "merging": (folding, "        if part.tuner.waits:", "        if False:", test_it_is_no_change_of_weights),
    "activation": (session, "*(n for n in names if self.waits(n))", "", lambda: test_a_call_is_the_same_however_it_is_made(WAYS["at once"])),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFECTS.values(), ids=DEFECTS)
def test_a_test_notices(case: tuple[Any, str, str, Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, test = case
    put_defect(monkeypatch, module, old, new)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test()
