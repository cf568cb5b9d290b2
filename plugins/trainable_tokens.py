"""Trainable tokens: chosen rows of an embedding are trained, the others stay frozen.

The rows take the place of the embedding's own and start as copies of them. Where the output embedding is tied to the input
embedding, it has the same rows; nothing is saved twice. No copy of the whole matrix is ever made in a call.
"""

from __future__ import annotations

from collections import Counter

from peftc import plugin as p


class TrainableTokensConfig(p.InitWeightsMixin, p.TargetNamesMixin, p.PeftConfig):
    """Options of an adapter of single tokens, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("TRAINABLE_TOKENS")
    token_indices: list[int] = p.Field(default_factory=list)
    """Ids of the tokens to train, as the tokenizer gives them."""
    init_weights: bool = True
    """Start as the tokens are, which changes nothing; otherwise at random."""


class TokensTuner(p.MapTuner[TrainableTokensConfig]):
    """`y = W'[x]` of an embedding, or `y = W' x + b` of a layer with one row per token; `W'` is W with rows exchanged."""

    supports = p.LINEAR_KINDS | {p.Kind.EMBEDDING}

    def slots(self, c: TrainableTokensConfig, layer: p.LayerFacts) -> p.Slots:
        count = len(c.token_indices)
        size = layer.out_features if layer.kind is p.Kind.EMBEDDING else layer.in_features
        yield p.parameter_slot("trainable_tokens_delta", (count, size), share=p.Share.WEIGHT)
        yield p.derived_slot("trainable_tokens_indices", (count,), dtype="int64", share=p.Share.WEIGHT)

    def init(self, c: TrainableTokensConfig, layer: p.LayerFacts, slots: p.Tensors, init: p.SlotInit) -> None:
        if not c.init_weights:
            init.normal(slots["trainable_tokens_delta"])
            return
        weight = init.base["weight"]
        rows = weight.t() if layer.kind is p.Kind.EMBEDDING else weight
        slots["trainable_tokens_delta"].copy_(rows[c.token_indices])

    def derive(self, c: TrainableTokensConfig, layer: p.LayerFacts, slots: p.LabelledSlots) -> p.Tensors:
        import torch

        return {"trainable_tokens_indices": torch.tensor(c.token_indices)}

    def check(self, c: TrainableTokensConfig, layer: p.LayerFacts, path: str) -> p.Problems:
        rows = layer.in_features if layer.kind is p.Kind.EMBEDDING else layer.out_features
        beyond = [i for i in c.token_indices if i >= rows]
        if beyond:
            what = f"`{path}` has {rows:,} rows, but `token_indices` names {', '.join(map(str, beyond[:3]))}"
            fix = "Add the tokens to the model first (`model.resize_token_embeddings`), or correct the ids."
            yield p.rules.BAD_TARGET(what, fix=fix, where=path)

    def clash(self, c: TrainableTokensConfig, other: TrainableTokensConfig) -> str:
        both = sorted({*c.token_indices} & {*other.token_indices})
        return f"both train the token {both[0]}" if both else ""

    def vectors(self, a: p.View[TrainableTokensConfig]) -> tuple[p.Tensor, p.Tensor]:
        return a.trainable_tokens_indices, a.trainable_tokens_delta


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
    twice = [str(i) for i, count in Counter(c.token_indices).items() if count > 1]
    below = [str(i) for i in c.token_indices if i < 0]
    problems = {
        "`token_indices` is empty, so that nothing would be trained": not c.token_indices,
        f"`token_indices` names {', '.join(twice[:3])} twice": bool(twice),
        f"`token_indices` names {', '.join(below[:3])}, which no token can be": bool(below),
    }
    for what, is_wrong in problems.items():
        if is_wrong:
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
