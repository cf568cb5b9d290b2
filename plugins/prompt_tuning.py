"""Prompt tuning: trained embeddings of virtual tokens are put before the input (Lester et al., arXiv:2104.08691, section 2).

They start at random, at embeddings of sampled tokens, or at those of a text.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from peftc import plugin as p


class PromptTuningInit(StrEnum):
    """How the virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptTuningConfig(p.PromptLearningConfig):
    """Options of a prompt-tuning adapter, named as in the reference."""

    peft_type: p.PeftType | None = p.PeftType("PROMPT_TUNING")
    prompt_tuning_init: PromptTuningInit = p.Field(default=PromptTuningInit.RANDOM, strict=False)
    """How the virtual tokens start: `RANDOM`, as sampled tokens (`SAMPLE_VOCAB`), or as a text (`TEXT`)."""
    prompt_tuning_init_text: str | None = None
    """The text, for `TEXT`; repeated or cut to the number of virtual tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of the text, for `TEXT`."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Keywords for the tokenizer, for `TEXT`. Remote code cannot be switched on."""

    @p.model_validator(mode="after")
    def _text_needs_tokenizer(self) -> Self:
        text = self.prompt_tuning_init == "TEXT"
        given = {
            "tokenizer_name_or_path": bool(self.tokenizer_name_or_path),
            "prompt_tuning_init_text": self.prompt_tuning_init_text is not None,
        }
        lacking = [f"{name} can't be None" for name, there in given.items() if not there]
        if text and lacking:
            raise ValueError(f"When prompt_tuning_init='TEXT', {' and '.join(lacking)}")
        if self.tokenizer_kwargs and not text:
            raise ValueError("`tokenizer_kwargs` has an effect only with `prompt_tuning_init: TEXT`")
        if "trust_remote_code" in (self.tokenizer_kwargs or {}):
            raise ValueError("`tokenizer_kwargs` cannot switch on remote code")
        return self


class PromptTuningTuner(p.PromptTuner[PromptTuningConfig]):
    """The encoder is a table with one row per virtual token."""

    def slots(self, c: PromptTuningConfig, dims: p.Dims) -> p.Slots:
        yield p.module_slot("embedding", (c.rows, c.width))

    def init(self, c: PromptTuningConfig, slots: p.Tensors, context: p.PromptContext) -> None:
        start_of_table(c, c.prompt_tuning_init, slots["embedding"], context)


def start_of_table(c: PromptTuningConfig, start: PromptTuningInit, table: p.Tensor, context: p.PromptContext) -> None:
    """Fill the table `(rows, width)`: at random, or with embeddings of sampled tokens or of the config's text."""
    import torch

    if start == PromptTuningInit.RANDOM:
        context.init.normal(table)
        return
    context.init.skip_normal(table)
    vocabulary = context.embedding_weight
    if start == PromptTuningInit.SAMPLE_VOCAB:
        ids = torch.randint(0, vocabulary.shape[0], (table.shape[0],))
    else:
        name, text = c.tokenizer_name_or_path or "", c.prompt_tuning_init_text or ""
        tokens = context.tokenize(name, text, **(c.tokenizer_kwargs or {}))
        ids = torch.tensor([tokens[i % len(tokens)] for i in range(table.shape[0])])
    table.copy_(vocabulary[ids.to(vocabulary.device)])


peftc_tuner = p.method(
    PromptTuningConfig,
    PromptTuningTuner(),
    prefix="prompt_tuning_",
    encoder_class="PromptEmbedding",
    exports=(PromptTuningInit,),
    examples=({"num_virtual_tokens": 4}, {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"}),
)
