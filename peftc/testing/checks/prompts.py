"""Prompt methods: what the one driver must make of a call, whatever the method puts before the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.model.peft_model import PeftModel
from peftc.testing.compare import close, same
from peftc.testing.report import broken
from peftc.testing.subjects import Subject

_FIX = "Return `(num_virtual_tokens, hidden_size)` from `embeds`."


def prompt_goes_before_the_input(s: Subject) -> None:
    """Logits with a prompt are the base's for the virtual tokens' embeddings put before the input's; masks grow by ones."""
    model, given = s.trained(), s.model.arguments()
    ids = given["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :2] = 0  # padding on the left
    for mask in (None, torch.ones_like(ids), padded):
        with torch.no_grad():
            y = model(input_ids=ids, attention_mask=mask).logits
        close(y, _by_hand(model, ids, mask), "The logits with a prompt", _FIX, tolerance=1e-5)


def labels_skip_the_prompt(s: Subject) -> None:
    """The loss is that of the given labels: virtual tokens have none."""
    model, given = s.trained(), s.model.arguments()
    ids = given["input_ids"]
    with torch.no_grad():
        out = model(**given, labels=ids)
    logits = out.logits[:, -ids.shape[1] - 1 : -1]  # the last virtual token predicts the first label
    expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids.reshape(-1))
    close(out.loss, expected, "The loss with a prompt", _FIX, tolerance=1e-5)


def generation_sees_the_prompt(s: Subject) -> None:
    """Greedy generation with a cache gives the tokens that whole forward passes give one at a time."""
    model, given = s.trained(), s.model.arguments()
    ids, mask = given["input_ids"][:1], given["attention_mask"][:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ids, attention_mask=mask, **options)
    expected = ids
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=expected, use_cache=False).logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # `min_new_tokens` keeps the end token away
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    same(found, expected, "What is generated with a cache, compared with step by step,", _FIX)


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


def _by_hand(model: PeftModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits for the adapter's saved embeddings put before those of the input."""
    base = model.get_base_model()
    (prompt,) = model.adapter_tensors("default").values()
    rows = ids.shape[0]
    with torch.no_grad():
        embeds = torch.cat([prompt.expand(rows, -1, -1), base.get_input_embeddings()(ids)], dim=1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(rows, prompt.shape[0]), mask], dim=1)
        with model.disable_adapter():
            return base(inputs_embeds=embeds, attention_mask=mask).logits
