"""Context-aware prompt tuning: the tokens of a context before the input, each moved within a small ball (Blau et al.,
arXiv:2410.17222, section 3).

The context's own embeddings stay; what is added to each token is kept within a ball whose size depends on what the token is
for. Labels of the context are trained along, with weights that fall with their distance from the end.
"""

from __future__ import annotations

from typing import Literal, Self

from peftc import plugin as p

_TYPES = "input_type_mask"
#: Types count on by four for each example of the context: its template, input, template of the output, and label.
_CYCLE = 4
#: Radius of tokens that do not move.
_NOWHERE = 1e-10


class CPTConfig(p.PromptLearningConfig):
    """Options of a context-aware prompt-tuning adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("CPT")
    cpt_token_ids: list[int] | None = None
    """Tokens of the context; each becomes a virtual token."""
    cpt_mask: list[int] | None = None
    """Kept for files of the reference, which does not read it."""
    cpt_tokens_type_mask: list[int] | None = None
    """What each token is for, counting on by four for each example: 1 template, 2 input, 3 template of the output, 4 label."""
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    """`decay` gives labels less weight the further they are from the end."""
    opt_loss_decay_factor: float | None = p.Field(default=1.0, gt=0.0)
    """Weight of an example's label in comparison with the next one's, for `decay`."""
    opt_projection_epsilon: float | None = p.Field(default=0.1, ge=0.0)
    """Radius of the ball that inputs move in, for a model of width 2048."""
    opt_projection_format_epsilon: float | None = p.Field(default=0.1, ge=0.0)
    """Radius of the ball that templates move in."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that made the tokens, for information."""

    @p.model_validator(mode="after")
    def _lists_are_alike(self) -> Self:
        if self.task_type not in (None, p.TaskType.CAUSAL_LM):
            raise ValueError("`task_type` must be CAUSAL_LM: the loss is that of a causal language model")
        self.task_type = p.TaskType.CAUSAL_LM
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        count = len(self.cpt_token_ids)
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * count if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if not count or not count == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ValueError(
                "`cpt_token_ids`, `cpt_mask` and `cpt_tokens_type_mask` must have the same length, at least 1"
            )
        if self.num_virtual_tokens not in (None, count):
            raise ValueError(f"`num_virtual_tokens` must be {count}, the number of `cpt_token_ids`, or left out")
        self.num_virtual_tokens = count
        self.num_transformer_submodules = 1
        return self


class CPTTuner(p.PromptTuner[CPTConfig]):
    """Embeddings of the context, frozen, and what is added to them."""

    keywords = (_TYPES,)

    def slots(self, c: CPTConfig, dims: p.Dims) -> p.Slots:
        shape = (c.rows, c.width)
        yield p.module_slot("embedding", shape, trainable=False)
        yield p.module_slot("delta_embedding", shape)

    def init(self, c: CPTConfig, slots: p.Tensors, context: p.PromptContext) -> None:
        import torch

        vocabulary = context.embedding_weight
        wrong = [token for token in c.cpt_token_ids or () if not 0 <= token < vocabulary.shape[0]]
        if wrong:
            what = f"The model has no token {wrong[0]}"
            fix = f"Its tokens are 0 to {vocabulary.shape[0] - 1}; use its own tokenizer."
            raise p.PeftcError(p.rules.BAD_VALUE(what, fix=fix, where="cpt_token_ids"))
        for table in ("embedding", "delta_embedding"):
            context.init.skip_normal(slots[table])
        slots["embedding"].copy_(vocabulary[torch.tensor(c.cpt_token_ids, device=vocabulary.device)])
        context.init.zeros(slots["delta_embedding"])

    def constrain(self, c: CPTConfig, a: p.PromptView) -> None:
        """Project what is added onto its balls."""
        delta = a["delta_embedding"]
        radius = _radii(c, delta)
        norm = delta.norm(dim=1)
        delta.mul_((radius / norm.clamp(min=radius)).unsqueeze(1))

    def embeds(self, c: CPTConfig, a: p.PromptView) -> p.Tensor:
        import torch

        delta = a["delta_embedding"]
        moves = (_types(c, delta) % _CYCLE != 0).unsqueeze(1)
        return a["embedding"] + torch.where(moves, delta, 0.0)

    def restore(self, c: CPTConfig, saved: p.Tensors) -> p.Tensors:
        table = saved["prompt_embeddings"]
        return {"embedding": table, "delta_embedding": table.new_zeros(table.shape)}

    def labels(self, c: CPTConfig, labels: p.Tensor, keywords: p.Tensors) -> p.Tensor:
        """Labels of the context are its tokens; only tokens of the type `label` keep theirs."""
        import torch

        context = torch.tensor(c.cpt_token_ids, device=labels.device).expand(labels.shape[0], -1)
        types = _all_types(c, labels, keywords)
        return torch.cat([context, labels], dim=1).masked_fill((types <= 0) | (types % _CYCLE != 0), -100)

    def loss(self, c: CPTConfig, logits: p.Tensor, labels: p.Tensor, keywords: p.Tensors) -> p.Tensor:
        """Cross entropy of the next token, weighted by the age of its example."""
        from torch.nn.functional import cross_entropy

        labels = labels.to(logits.device)
        types = _all_types(c, labels[:, c.num_virtual_tokens or 0 :], keywords)[:, 1:]
        logits, labels = logits[:, :-1], labels[:, 1:]
        known = labels != -100
        loss = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        if c.opt_weighted_loss_type == "decay":
            loss = loss * _weights(types, c.opt_loss_decay_factor or 1.0).to(loss.dtype)
        return loss[known].mean()


def _types(c: CPTConfig, like: p.Tensor) -> p.Tensor:
    import torch

    return torch.tensor(c.cpt_tokens_type_mask, device=like.device)


def _all_types(c: CPTConfig, labels: p.Tensor, keywords: p.Tensors) -> p.Tensor:
    """Types of context and input, `(batch, virtual + length)`; those of the input count on after the context's."""
    import torch

    context = _types(c, labels)
    given = keywords.get(_TYPES)
    own = torch.full_like(labels, _CYCLE) if given is None else given.to(labels)
    last = -(-int(context.max()) // _CYCLE) * _CYCLE
    own = torch.where(own > 0, own + last, own)
    return torch.cat([context.expand(labels.shape[0], -1), own], dim=1)


def _weights(types: p.Tensor, factor: float) -> p.Tensor:
    """For each row: 1 for the last example's label, `factor` for the one before, and so on; 1 for all else."""
    import torch

    weights = torch.ones(types.shape, device=types.device)
    for row, weight in zip(types, weights, strict=True):
        kinds = row[(row > 0) & (row % _CYCLE == 0)].unique()
        for age, kind in enumerate(kinds.flip(0)):
            weight[row == kind] = factor**age
    return weights


def _radii(c: CPTConfig, delta: p.Tensor) -> p.Tensor:
    """How far each token may move, `(tokens,)`, scaled with the model's width."""
    import torch

    scale = (c.width / 2048) ** 0.5
    types = _types(c, delta)
    template = (types > 0) & ((types % _CYCLE == 1) | (types % _CYCLE == 3))
    inputs = (types > 0) & (types % _CYCLE == 2)
    radii = torch.full(types.shape, _NOWHERE, dtype=delta.dtype, device=delta.device)
    radii[template] = (c.opt_projection_format_epsilon or 0.0) * scale
    radii[inputs] = (c.opt_projection_epsilon or 0.0) * scale
    return radii


def check(c: CPTConfig) -> p.Problems:
    """A mask that nothing reads."""
    if not all(c.cpt_mask or ()):
        what = "`cpt_mask` leaves tokens out, which has no effect here or in the reference"
        fix = "Leave these tokens out of `cpt_token_ids`."
        yield p.rules.OPTION_NOT_AVAILABLE(what, fix=fix, where="cpt_mask", severity=p.Severity.WARNING)


peftc_tuner = p.method(
    CPTConfig,
    CPTTuner(),
    prefix="cpt_",
    encoder_class="CPTEmbedding",
    check=check,
    examples=(
        {
            "cpt_token_ids": [5, 6, 7, 8],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_projection_epsilon": 100.0,  # wide, so that the checks see a slope on both sides
            "opt_projection_format_epsilon": 100.0,
        },
    ),
)
