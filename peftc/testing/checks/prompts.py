"""Prompt methods: what the one driver must make of a call, whatever the method puts before the input."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host import caches
from peftc.model.peft_model import PeftModel
from peftc.testing.compare import close, same
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, quiet

_FIX = "Return the table from `embeds`, in the layout of its `place`."


def prompt_goes_before_the_input(s: Subject) -> None:
    """Logits with a prompt are the base's with the virtual tokens put in by hand; masks grow by ones."""
    model = s.trained()
    given = s.arguments(model)
    ids = given["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :2] = 0  # padding on the left
    for mask in (None, torch.ones_like(ids), padded):
        with torch.no_grad():
            y = model(**{**given, "attention_mask": mask}).logits
        close(y, _by_hand(model, given, mask), "The logits with a prompt", _FIX, tolerance=1e-5)


def labels_skip_the_prompt(s: Subject) -> None:
    """The loss is that of the given labels: virtual tokens have none."""
    model = s.trained()
    given = s.arguments(model)
    ids = given["input_ids"]
    with torch.no_grad():
        out = model(**given, labels=ids)
    if out.logits.shape[1] > ids.shape[1]:  # the last virtual token predicts the first label
        logits, labels = out.logits[:, -ids.shape[1] - 1 : -1], ids
    else:
        logits, labels = out.logits[:, :-1], ids[:, 1:]
    expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1))
    close(out.loss, expected, "The loss with a prompt", _FIX, tolerance=1e-5)


def generation_sees_the_prompt(s: Subject) -> None:
    """Greedy generation with a cache gives the tokens that whole forward passes give one at a time."""
    model = s.trained()
    given = {name: tensor[:1] for name, tensor in s.arguments(model).items()}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**given, **options)
    expected = given["input_ids"]
    for _ in range(6):
        call = {**given, "input_ids": expected, "attention_mask": torch.ones_like(expected)}
        with torch.no_grad():
            logits = model(**call, use_cache=False).logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # `min_new_tokens` keeps the end token away
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    same(found, expected, "What is generated with a cache, compared with step by step,", _FIX)


def checkpointing_is_refused(s: Subject) -> None:
    """Checkpointed layers compute without a cache, so a prompt in it would not be trained: that must be said."""
    model = s.trained().train()
    asked = (model.gradient_checkpointing_enable, partial(_checkpointed_call, s, model))
    for ask in asked:
        try:
            ask()
        except PeftcError as error:
            if [d.code for d in error.diagnostics] == [rules.CHECKPOINTING_DROPS.code]:
                continue
        raise broken("Gradient checkpointing is not refused", "Report this as a bug of peftc.")


def _checkpointed_call(s: Subject, model: PeftModel) -> None:
    with quiet():
        model.get_base_model().gradient_checkpointing_enable()
    s.run(model)


def merging_is_refused(s: Subject) -> None:
    """A prompt, or what acts around a module, is no change of weights: merging it must say so and change nothing."""
    model = s.trained()
    y = s.output(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        try:
            merge()
        except PeftcError as error:
            if [d.code for d in error.diagnostics] == [rules.CANNOT_MERGE.code]:
                continue
        raise broken("Merging is not refused", "Report this as a bug of peftc.")
    same(s.output(model), y, "The output after a merge was refused", "Report this as a bug of peftc.")


def _by_hand(model: PeftModel, given: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """Logits of the base for the adapter's table, put before the input's embeddings or into a cache."""
    base, ids = model.get_base_model(), given["input_ids"]
    encoder = model._encoders()["default"]
    rows = ids.shape[0]
    call: dict[str, Any] = {"attention_mask": mask}
    with torch.no_grad(), model.disable_adapter():
        table = encoder.rows(rows, given.get("task_ids"))
        if mask is not None:
            call["attention_mask"] = torch.cat([mask.new_ones(rows, table.shape[1]), mask], dim=1)
        if encoder.place.is_cache:
            name = caches.keyword(base) or caches.NAMES[0]
            call |= {"input_ids": ids, name: _filled(caches.made(base.config), table, encoder.config)}
        else:
            call["inputs_embeds"] = torch.cat([table, base.get_input_embeddings()(ids)], dim=1)
        logits: Tensor = base(**call).logits
    return logits


def _filled(cache: Any, table: Tensor, config: Any) -> Any:
    """The cache with the table `(batch, tokens, layers · 2 · heads · width)` in it, layer after layer, keys first."""
    for layer, share in enumerate(table.chunk(config.num_layers, dim=-1)):
        heads = (
            half.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for half in share.chunk(2, dim=-1)
        )
        cache.update(*heads, layer)
    return cache
