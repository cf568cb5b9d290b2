"""Context-aware prompt tuning: what may move how far, which labels count, and what a config must say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from peftc import CPTConfig, PeftcError, PeftcWarning, PeftModel, get_peft_model
from peftc.diagnostics import ConfigError
from peftc.testing.models import MODELS

LLAMA = next(model for model in MODELS if model.name == "llama")
CONTEXT = {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}


def wrapped(**options: Any) -> PeftModel:
    return get_peft_model(LLAMA.build(), CPTConfig(task_type="CAUSAL_LM", **{**CONTEXT, **options})).eval()


def test_it_starts_as_the_context() -> None:
    model = wrapped()
    assert torch.equal(model.prompt_encoder["default"](), model.word_embeddings.weight[[5, 6, 7, 8]])


def test_tokens_stay_within_their_balls_and_labels_where_they_are() -> None:
    model = wrapped(opt_projection_epsilon=2.0, opt_projection_format_epsilon=1.0)
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.delta_embedding.weight.fill_(1.0)
        moved = (encoder() - encoder.embedding.weight).norm(dim=1)
    width = (16 / 2048) ** 0.5
    torch.testing.assert_close(moved, torch.tensor([width, 2 * width, width, 0.0]), rtol=1e-4, atol=1e-6)


def test_what_is_within_its_ball_is_left_alone() -> None:
    encoder = wrapped(opt_projection_format_epsilon=100.0).prompt_encoder["default"]
    with torch.no_grad():
        encoder.delta_embedding.weight[0] = 0.5
        encoder()
    assert encoder.delta_embedding.weight[0].tolist() == [0.5] * 16


@pytest.mark.parametrize("types", [[1, 2, 3, 4], [1, 2, 3, 3], [1, 1, 1, 1]])
def test_labels_of_the_input_count_whatever_the_context_ends_with(types: list[int]) -> None:
    model, ids = wrapped(cpt_tokens_type_mask=types), LLAMA.arguments()["input_ids"]
    out = model(input_ids=ids, labels=ids)
    labels = torch.cat([torch.tensor([-100, -100, -100, 8 if types[3] == 4 else -100]).expand(2, -1), ids], dim=1)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    as_tuple = model(input_ids=ids, labels=ids, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected)


def test_older_examples_weigh_less() -> None:
    types = [1, 2, 3, 4, 5, 6, 7, 8]
    context = {"cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12], "cpt_tokens_type_mask": types}
    options = {**context, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}
    model, ids = wrapped(**options), LLAMA.arguments()["input_ids"]
    given = torch.full_like(ids, 4)
    out = model(input_ids=ids, labels=ids, input_type_mask=given)
    labels = torch.cat([torch.tensor([5, 6, 7, 8, 9, 10, 11, 12]).expand(2, -1), ids], dim=1)[:, 1:]
    losses = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels, reduction="none")
    expected = torch.cat([losses[:, 2] * 0.25, losses[:, 6] * 0.5, losses[:, 7:].flatten()]).mean()
    torch.testing.assert_close(out.loss, expected)
    assert given.unique().tolist() == [4]


def test_any_adapter_name_will_do() -> None:
    model = get_peft_model(LLAMA.build(), CPTConfig(**CONTEXT), "context")
    ids = LLAMA.arguments()["input_ids"]
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_a_token_that_the_model_has_not() -> None:
    with pytest.raises(PeftcError, match="The model has no token 40"):
        wrapped(cpt_token_ids=[5, 6, 7, 40])


def test_a_mask_that_leaves_tokens_out_is_told() -> None:
    with pytest.warns(PeftcWarning, match="has no effect"):
        wrapped(cpt_mask=[0, 1, 1, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"cpt_mask": [1]},
        {"cpt_tokens_type_mask": [1, 2]},
        {"cpt_token_ids": []},
        {"num_virtual_tokens": 3},
        {"task_type": "SEQ_CLS"},
        {"opt_weighted_loss_type": "linear"},
    ],
)
def test_options_that_cannot_be_followed_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CPTConfig(**{**CONTEXT, **options})
