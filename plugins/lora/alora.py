"""aLoRA: the update acts from the last invocation on that the ids of a row hold, and before it the base alone (Greenewald et al.,
arXiv:2504.12397, section 3).

So what the base has in its cache of a context serves the adapter as well. `alora_offsets` of a call says for each row how many
tokens from its end the update begins, in place of the search; None for a row in which it does not act.
"""

from __future__ import annotations

from peftc import plugin as p

from .config import LoraConfig
from .plain import LoraTuner

#: What a call may give: for each row, how many tokens from its end on the update acts.
OFFSETS = "alora_offsets"


class ALoraTuner(LoraTuner):
    """`y = W x + s · B (A x)` for tokens from the invocation on."""

    supports = p.LINEAR_KINDS
    keywords = (OFFSETS,)

    def begins(self, c: LoraConfig, ids: p.Tensor | None, tokens: int, values: p.Tensors) -> p.Tensor | None:
        import torch

        if OFFSETS in values:
            return tokens - values[OFFSETS].clamp_min(0)
        if ids is None:
            return None
        wanted = torch.tensor(c.alora_invocation_tokens, device=ids.device)
        if tokens < len(wanted):
            return torch.full((ids.shape[0],), tokens, device=ids.device)
        is_there = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)  # (rows, places)
        places = torch.arange(is_there.shape[1], device=ids.device)
        last = torch.where(is_there, places, -1).amax(-1)
        return torch.where(last < 0, tokens, last)


def check(c: LoraConfig) -> p.Problems:
    """What is wrong with the invocation."""
    tokens = c.alora_invocation_tokens
    if not tokens:
        return
    option = "alora_invocation_tokens"
    if min(tokens) < 0:
        what = f"`{option}` has the id {min(tokens)}, which no token has"
        yield p.rules.BAD_VALUE(what, fix="Give the ids of the invocation, as the tokenizer makes them.", where=option)
    if c.task_type != p.TaskType.CAUSAL_LM:
        what = f"`{option}` is given, and `task_type` is {c.task_type or 'not'}, not CAUSAL_LM"
        why = "An invocation divides what is read from left to right; other models would mix both sides of it."
        yield p.rules.BAD_VALUE(
            what, why=why, fix="Set `task_type: CAUSAL_LM`.", where=option, severity=p.Severity.WARNING
        )


def example_values(c: LoraConfig, rows: int) -> p.Options:
    """That the update acts on all tokens, of any number."""
    return {OFFSETS: [1 << 20] * rows} if c.alora_invocation_tokens else {}


VARIANT = p.Variant(
    "LORA",
    "alora",
    ALoraTuner(),
    chosen=lambda c: bool(c.alora_invocation_tokens),
    option="alora_invocation_tokens",
    check=check,
    summary="The update acts from a row's last invocation on.",
    paper="arXiv:2504.12397",
    examples=({"r": 4, "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},),
)
