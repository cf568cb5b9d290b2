"""The one driver of prompt methods: it puts virtual tokens before the input and widens what must be as long.

A causal language model's call is changed in three places: embeddings instead of ids, mask, labels. During generation the
same change is made to the first step only; later steps find the virtual tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan import AdapterPlan
from peftc.diagnostics import PeftcError
from peftc.registry.boundary import boundary, guarded
from peftc.runtime.layer import Source
from peftc.runtime.storage import INIT, Initializer, SlotModule, allocate, torch_dtype
from peftc.tuner.method import PromptTuner


class PromptEncoder(nn.Module):
    """One adapter's virtual tokens. Slots are children named by the method: `embedding.weight`."""

    def __init__(self, plan: AdapterPlan, tuner: PromptTuner[Any]) -> None:
        super().__init__()
        self._plan = plan
        self._tuner = tuner

    def fill(self, word_embeddings: nn.Embedding, source: Source | None) -> None:
        """Make the slots: from the checkpoint, or as the method starts them."""
        site = self._plan.prompt
        assert site is not None
        device = word_embeddings.weight.device
        made: dict[str, Tensor] = {
            slot.name: allocate(slot.shape, torch_dtype(slot.dtype or site.dtype), device) for slot in site.slots
        }
        saved = source(site.disk) if source is not None else None
        with torch.no_grad(), boundary(self._plan.peft_type, "init" if saved is None else "restore"):
            if saved is not None:
                for name, tensor in self._tuner.restore(self._plan.config, saved).items():
                    made[name].copy_(tensor)
            else:
                self._tuner.init(self._plan.config, made, Start(word_embeddings))
        for slot in site.slots:
            holder = SlotModule.holding(slot.tail, nn.Parameter(made[slot.name], requires_grad=False))
            self.add_module(slot.name, holder)

    def restored(self, source: Source) -> list[tuple[Tensor, Tensor | None]]:
        """Each slot's tensor with its value in a checkpoint."""
        site = self._plan.prompt
        assert site is not None
        saved = source(site.disk)
        if saved is None:
            return []
        with boundary(self._plan.peft_type, "restore"):
            values = self._tuner.restore(self._plan.config, saved)
        slots = PromptSlots(self)
        return [(getattr(slots, name).data, value) for name, value in values.items()]

    def forward(self) -> Tensor:
        """The virtual tokens' embeddings, `(num_virtual_tokens, hidden)`."""
        embeds = guarded(self._tuner.embeds, self._plan.peft_type, None)
        return embeds(self._plan.config, PromptSlots(self))


class PromptSlots:
    """Slots of an encoder as attributes (`peftc.tuner.views.PromptView`)."""

    __slots__ = ("_encoder",)

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder

    def __getattr__(self, name: str) -> Tensor:
        tensor = next(self._encoder._modules[name].parameters())  # type: ignore[union-attr]  # a slot always has one
        return tensor


class Start:
    """What a prompt may start from (`peftc.tuner.views.PromptContext`)."""

    def __init__(self, word_embeddings: nn.Embedding) -> None:
        self._embeddings = word_embeddings

    @property
    def init(self) -> Initializer:
        return INIT

    @property
    def embedding_weight(self) -> Tensor:
        return self._embeddings.weight.detach()

    def tokenize(self, name_or_path: str, text: str) -> Sequence[int]:
        """Token ids of a text. Raises `PeftcError` if the tokenizer cannot be loaded or gives no token."""
        from transformers import AutoTokenizer

        try:
            ids = list(AutoTokenizer.from_pretrained(name_or_path)(text)["input_ids"])
        except (OSError, ValueError) as error:
            what = f"The tokenizer `{name_or_path}` cannot be loaded: {str(error).splitlines()[0]}"
            fix = "Give a folder with the tokenizer's files, or a hub id that can be reached."
            raise PeftcError(rules.TOKENIZER_MISSING(what, fix=fix, where="tokenizer_name_or_path")) from error
        if not ids:
            fix = "Give a text that has tokens."
            raise PeftcError(rules.BAD_VALUE("The text that the prompt starts as gives no tokens", fix=fix))
        return ids


class PromptDriver:
    """Changes calls of one model so that the given encoder's tokens come first."""

    def __init__(self, model: nn.Module, encoder: PromptEncoder) -> None:
        self.model = model
        self.encoder = encoder

    def widened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords for a call with the virtual tokens in front.

        `input_ids` `(batch, length)` or `inputs_embeds` `(batch, length, hidden)` becomes embeddings of length
        `virtual + length`; mask and labels grow with ones and -100; positions are left to the model.
        """
        call = _named(args, kwargs)
        rows = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
        virtual = self.encoder()
        mask = call.get("attention_mask")
        if mask is not None:
            call["attention_mask"] = torch.cat([mask.new_ones(rows.shape[0], virtual.shape[0]), mask], dim=1)
        if not _cached(call.get("past_key_values")):
            self._prepend(call, virtual)
        for name in ("position_ids", "cache_position", "token_type_ids"):
            call.pop(name, None)
        return call

    def _prepend(self, call: dict[str, Any], virtual: Tensor) -> None:
        ids, embeds = call.pop("input_ids", None), call.get("inputs_embeds")
        if embeds is None:
            embeds = self.model.get_input_embeddings()(ids)  # type: ignore[operator]  # a model with embeddings
        rows: int = embeds.shape[0]
        prompt = virtual.to(embeds.dtype).unsqueeze(0).expand(rows, -1, -1)
        call["inputs_embeds"] = torch.cat([prompt, embeds], dim=1)
        labels = call.get("labels")
        if labels is not None and labels.dim() > 1:  # one label per row needs no widening
            call["labels"] = torch.cat([labels.new_full((rows, virtual.shape[0]), -100), labels], dim=1)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While open, every call of the model is widened."""

        def widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
            return (), self.widened(args, kwargs)

        handle = self.model.register_forward_pre_hook(widen, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name. Raises `PeftcError` if there is no input to put a prompt before."""
    call = dict(kwargs)
    if len(args) > 1 or (args and "input_ids" in call):
        what = "With a prompt, only the input ids can be given by position"
        raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Name the other arguments."))
    if args:
        call["input_ids"] = args[0]
    if call.get("input_ids") is None and call.get("inputs_embeds") is None:
        fix = "Give `input_ids` or `inputs_embeds`."
        raise PeftcError(rules.CALL_NOT_POSSIBLE("There is no input to put the prompt before", fix=fix))
    return call


def _cached(past: Any) -> bool:
    """Whether the cache already holds something: then the virtual tokens are in it."""
    return past is not None and past.get_seq_length() > 0
