"""What a `PeftModel` has when its adapters are prompts: their encoders, and the names that the reference has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError
from peftc.host import caches
from peftc.registry.manager import default_registry
from peftc.runtime.applying.classes import encoder_class
from peftc.runtime.bases import splits
from peftc.runtime.journal import keep_entry, whole
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.prompt import cache
from peftc.runtime.prompt.driver import PromptDriver
from peftc.runtime.prompt.encoder import PromptModule
from peftc.runtime.session.session import Session
from peftc.tuner.prompt import PromptTuner


class PromptsMixin:
    """The part of a `PeftModel` that is about prompts."""

    prompt_encoder: nn.ModuleDict | None

    @property
    def session(self) -> Session:
        raise NotImplementedError

    def get_base_model(self) -> nn.Module:
        raise NotImplementedError

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Indices of each adapter's virtual tokens, `(rows,)`."""
        encoders = self._encoders()
        many = {name: e.tokens * (e.config.num_transformer_submodules or 1) for name, e in encoders.items()}
        return {name: torch.arange(rows) for name, rows in many.items()}

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's input embeddings."""
        found: nn.Module = self.get_base_model().get_input_embeddings()  # type: ignore[operator]  # a text model
        return found

    @property
    def transformer_backbone_name(self) -> str | None:
        """Name of the base model's first child that is a model itself; None if there is none."""
        return cache.backbone_name(self.get_base_model())

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active adapter's virtual tokens for so many rows: `(batch, rows, width)`, or a cache that holds them.

        `max_cache_len` is for callers of the reference; a cache that is made here grows. Raises `PeftcError` for an adapter
        that is no prompt.
        """
        driver = self._driver()
        if driver is None:
            what = "There is no prompt in effect"
            raise PeftcError(rules.CALL_NOT_POSSIBLE(what, fix="Use an adapter that adds virtual tokens, enabled."))
        own = {} if task_ids is None else {"task_ids": task_ids}
        if driver.encoder.place.is_cache:
            return driver.filled(None, batch_size, own)
        return driver.encoder.rows(batch_size, task_ids)

    @whole
    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The table that a checkpoint of the adapter holds, on the CPU."""
        self.session.require([adapter_name])
        with torch.no_grad():
            table: Tensor = self._encoders()[adapter_name]()
        return table.detach().cpu()

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's inputs of one step of generation, virtual tokens in their place."""
        prepare: Any = self.get_base_model().prepare_inputs_for_generation
        driver = self._driver()
        if driver is None:
            inputs = prepare(*args, **kwargs)
            return inputs if task_ids is None else inputs | {"task_ids": task_ids}
        input_ids = args[0] if args else kwargs.pop("input_ids")
        return driver.prepared(prepare, input_ids, kwargs, {} if task_ids is None else {"task_ids": task_ids})

    # within the house ---------------------------------------------------------------------------------------------

    def _encoders(self) -> dict[str, PromptModule]:
        encoders = {} if self.prompt_encoder is None else self.prompt_encoder._modules
        return {name: encoder for name, encoder in encoders.items() if isinstance(encoder, PromptModule)}

    def _driver(self) -> PromptDriver | None:
        """What changes calls; None where no prompt is in effect."""
        if self.prompt_encoder is None or not self.session.enabled or not self.session.active:
            return None
        return PromptDriver(self.get_base_model(), self._encoders()[self.session.active[0]])

    def _refuse_prompted(self, kwargs: Mapping[str, Any]) -> None:
        """Raise `PeftcError` if a call without a prompt is to go on from a cache that has one in it."""
        if self.prompt_encoder is not None:
            past = caches.of_call(kwargs)
            if cache.held_by(past) is not None:
                cache.refuse_strange(past, None)

    def _own_keywords(self) -> set[str]:
        """Keywords of a call that only a prompt understands."""
        return {name for encoder in self._encoders().values() for name in encoder.keywords}

    def _add_encoder(self, adapter: AdapterPlan, source: Source | None) -> None:
        """Make the virtual tokens of an adapter. Raises `PeftcError` if the model has no place for them."""
        if adapter.prompt is None or self.prompt_encoder is None:
            return
        method = default_registry().get(adapter.peft_type)
        assert isinstance(method.tuner, PromptTuner)
        model = self.get_base_model()
        encoder = encoder_class(method)(adapter, method.tuner)
        if encoder.place.is_cache:
            c = encoder.config
            cache.refuse_unfit(model, c.num_layers, c.num_attention_heads, c.token_dim // c.num_attention_heads)
        encoder.fill(model.get_input_embeddings(), source)  # type: ignore[operator]  # the plan found them
        splits.agree(model, lambda: dict(encoder.named_parameters()))
        encoder.train(model.training)
        keep_entry(self.prompt_encoder._modules, adapter.name)
        self.prompt_encoder[adapter.name] = encoder

    def _refuse_several(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            what = f"{', '.join(f'`{name}`' for name in names)} cannot be active together"
            raise PeftcError(rules.ONE_PROMPT(what, fix="Activate one of them."))

    def _refuse_checkpointing(self) -> None:
        if any(encoder.place.is_cache for encoder in self._encoders().values()):
            what = "The virtual tokens are keys and values"
            raise PeftcError(rules.CHECKPOINTING_DROPS(what, fix="Train without gradient checkpointing."))
