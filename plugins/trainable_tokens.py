"""Trainable tokens: chosen rows of an embedding are trained, the others stay frozen.

The rows take the place of the embedding's own and start as copies of them. Where the output embedding is tied to the input
embedding, it has the same rows; nothing is saved twice. No copy of the whole matrix is ever made in a call.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftc import plugin as p


class TrainableTokensConfig(p.InitWeightsMixin, p.TargetNamesMixin, p.PeftConfig):
    """Options of an adapter of single tokens, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("TRAINABLE_TOKENS")
    token_indices: list[int] = p.Field(default_factory=list)
    """Ids of the tokens to train, as the tokenizer gives them."""
    init_weights: bool = True
    """Start as the tokens are, which changes nothing; otherwise at random."""


class TokensTuner(p.RowsTuner[TrainableTokensConfig]):
    """Rows of the layer, and the same ones of layers whose weights are tied to it."""

    rows_option = "token_indices"
    rows_share = p.Share.WEIGHT

    def rows(self, c: TrainableTokensConfig) -> Sequence[int]:
        return c.token_indices

    def starts_as_base(self, c: TrainableTokensConfig) -> bool:
        return c.init_weights


def resolve(c: TrainableTokensConfig, graph: p.ModuleGraph) -> p.Options:
    """The input embedding of the model, where no target is named."""
    if c.target_modules is not None:
        return {}
    path = graph.model.input_embeddings or next((n.path for n in graph.nodes if n.name == "embed_tokens"), None)
    if path is None:
        what = "The model does not say which of its layers is the input embedding"
        raise p.PeftcError(p.rules.NO_TARGETS(what, fix="Name it in `target_modules`.", where="target_modules"))
    return {"target_modules": path}


def check(c: TrainableTokensConfig) -> p.Problems:
    """Ids that no row can have, ids given twice, and none at all."""
    problems = list(p.wrong_rows(c.token_indices, "token_indices"))
    if not c.token_indices:
        problems.append("`token_indices` is empty, so that nothing would be trained")
    for what in problems:
        fix = "Give every id of a token to train once, as the tokenizer gives it."
        yield p.rules.BAD_VALUE(what, fix=fix, where="token_indices")


peftc_tuner = p.method(
    TrainableTokensConfig,
    TokensTuner(),
    prefix="trainable_tokens_",
    layer_names=("trainable_tokens_delta",),
    layer_options=("token_indices",),
    resolve=resolve,
    follows_ties=True,
    examples=({"token_indices": [9, 4]}, {"token_indices": [4], "init_weights": False}),  # ids of the kit's inputs
    check=check,
)
