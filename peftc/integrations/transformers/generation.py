"""Asking a causal language model: prompts in, answers out, in batches; and how well it expects given answers.

Greedy decoding unless a temperature is given. Prompts go through the chat template where the tokenizer has one, so that a
model is asked in exactly the form in which it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import Diagnostic, PeftcError, Where
from peftc.integrations.transformers.data import IGNORED, Collator, Encoded, Encoder, pad_id, stop_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Called after each batch with the number of prompts that are done.
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to generate. `temperature` 0 is greedy; otherwise tokens are sampled, repeatably for one `seed`."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The model's answer to each prompt, without the prompt and without special tokens.

    `model` has `generate`, `device` and `generation_config`. Raises `PeftcError` for a prompt that the chat template refuses.
    """
    import torch

    how = decoding or Decoding()
    rows = encode_prompts(model, tokenizer, prompts)
    collate = Collator(pad_id(tokenizer), side="left")
    stops = sorted(stop_ids(tokenizer, model.generation_config))
    choice = {"do_sample": True, "temperature": how.temperature} if how.temperature > 0 else {"do_sample": False}
    torch.manual_seed(how.seed)
    found: list[str] = []
    for batch in _batches(rows, how.batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items() if name != "labels"}
        with _evaluating(model):
            ids = model.generate(
                **inputs,
                max_new_tokens=how.max_new_tokens,
                eos_token_id=stops or None,
                pad_token_id=collate.pad_id,
                **choice,
            )
        fresh = ids[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(fresh, skip_special_tokens=True)]
        if progress is not None:
            progress(len(found))
    return found


def encode_prompts(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Encoded]:
    """Each prompt as ids, through the chat template if there is one. Raises `PeftcError` for those that it refuses."""
    if tokenizer.chat_template is None:
        return [Encoded(ids := tuple(tokenizer(prompt)["input_ids"]), (IGNORED,) * len(ids)) for prompt in prompts]
    encoder = Encoder(tokenizer, stop_ids(tokenizer, model.generation_config))
    found = [
        encoder.prompt([{"role": "user", "content": prompt}], Where(path=f"prompt {number}"))
        for number, prompt in enumerate(prompts, start=1)
    ]
    problems = [item for item in found if isinstance(item, Diagnostic)]
    if problems:
        raise PeftcError(problems)
    return [item for item in found if isinstance(item, Encoded)]


def mean_loss(
    model: Any, rows: Sequence[Encoded], pad: int, batch_size: int = 8, progress: Progress | None = None
) -> float:
    """Mean cross entropy per trained token over all rows, in nats."""
    total, count, done = 0.0, 0, 0
    collate = Collator(pad)
    for batch in _batches(rows, batch_size):
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
        trained = sum(row.trained for row in batch)
        with _evaluating(model):
            total += float(model(**inputs).loss) * trained
        count += trained
        done += len(batch)
        if progress is not None:
            progress(done)
    return total / count


def logits(model: Any, rows: Sequence[Encoded], pad: int) -> torch.Tensor:
    """Logits of shape `(rows, longest, vocabulary)` at every position, those of padding zeroed."""
    inputs = {name: tensor.to(model.device) for name, tensor in Collator(pad)(rows).items() if name != "labels"}
    with _evaluating(model):
        found: torch.Tensor = model(**inputs).logits
    return found * inputs["attention_mask"].unsqueeze(-1)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout and gradients."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _batches(rows: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
