"""Small byte-level tokenizers, trained on Python's own documentation, with the special tokens of each family."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

#: Entries before any are added: fewer than the models have, so that tests can add tokens.
SIZE = 1000
_TOPICS = ("assignment", "class", "function", "strings", "import")


def write(folder: Path, specials: Sequence[str], template: str = "", extra: int = 0, **options: Any) -> Any:
    """Train a tokenizer and save it into `folder`.

    `template` says where special tokens stand around a text `$A`; `extra` tokens are added after training.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pydoc_data.topics.topics[topic] for topic in _TOPICS], trainer)
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in specials if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"unk_token": "<unk>", **options})
    if extra:
        fast.add_tokens([f"<extra_{number}>" for number in range(extra)])
    fast.save_pretrained(folder)
    return fast


def opt(folder: Path, extra: int = 0) -> Any:
    """As OPT's: `<pad>` is 1 and `</s>` is 2."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return write(folder, specials, "</s> $A", extra, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def llama(folder: Path) -> Any:
    """As Llama's."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    return write(folder, specials, "<s> $A", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def gpt2(folder: Path) -> Any:
    """As GPT-2's, which has no token for padding."""
    return write(folder, ["<|endoftext|>", "<unk>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def t5(folder: Path) -> Any:
    """As T5's."""
    return write(folder, ["<pad>", "</s>", "<unk>"], "$A </s>", eos_token="</s>", pad_token="<pad>")


def bert(folder: Path) -> Any:
    """As BERT's."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return write(folder, specials, "[CLS] $A [SEP]", mask_token="[MASK]", **names)


def roberta(folder: Path) -> Any:
    """As RoBERTa's."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    return write(folder, specials, "<s> $A </s>", mask_token="<mask>", **names)
