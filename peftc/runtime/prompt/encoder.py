"""The module that holds one adapter's virtual tokens: slots under the names that the plan gave them, and the table.

It knows its method by the method's declarations alone; how the table is put into a call is the driver's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import PromptSite
from peftc.diagnostics import Diagnostic, PeftcError
from peftc.registry.boundary import boundary, guarded
from peftc.runtime.bases.places import device_of, fill, tensor_of
from peftc.runtime.journal import keep_trained, keep_values, whole
from peftc.runtime.layer.wrapper import Source
from peftc.runtime.slots.containers import SlotModule, place_in
from peftc.runtime.slots.filling import INIT, Initializer, allocate, torch_dtype
from peftc.tuner.prompt import Place, PromptTuner
from peftc.tuner.slots import Container, Slot, labelled
from peftc.tuner.views import NoSlot, no_slot


class PromptModule(nn.Module):
    """One adapter's virtual tokens. Slots are children or parameters named by the method: `embedding.weight`."""

    def __init__(self, plan: AdapterPlan, tuner: PromptTuner[Any]) -> None:
        super().__init__()
        self._plan = plan
        self._tuner = tuner
        self.slots = {} if plan.prompt is None else labelled(plan.prompt.slots)
        #: whether a call was seen in which the model used a cache that it was given
        self.seen = False

    # what it is ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self._plan.name

    @property
    def site(self) -> PromptSite:
        """The plan's part about it."""
        assert self._plan.prompt is not None
        return self._plan.prompt

    @property
    def config(self) -> Any:
        """The adapter's options, sizes resolved."""
        return self._plan.config

    @property
    def place(self) -> Place:
        """Where its tokens go."""
        return self.site.place

    @property
    def tokens(self) -> int:
        """How many positions it adds to an input."""
        return int(self.config.num_virtual_tokens)

    @property
    def keywords(self) -> tuple[str, ...]:
        """Keywords of a call that are not the model's."""
        return (*self._tuner.keywords, "task_ids")

    # storage ------------------------------------------------------------------------------------------------------

    def fill(self, word_embeddings: nn.Embedding, source: Source | None) -> None:
        """Make the slots: from the checkpoint, or as the method starts them."""
        device = device_of(word_embeddings)
        made = {
            label: allocate(slot.shape, torch_dtype(slot.dtype or self.site.dtype), device)
            for label, slot in self.slots.items()
        }
        saved = self._saved(source)
        with torch.no_grad():
            if len(saved) < len(self.site.stored):
                with boundary(self._plan.peft_type, "init"):
                    self._tuner.init(self.config, made, Start(word_embeddings))
            for label, tensor in self._restored(saved).items():
                made[label].copy_(tensor)
        for label, slot in self.slots.items():
            self._hold(slot, nn.Parameter(made[label], requires_grad=False))

    def _saved(self, source: Source | None) -> dict[str, Tensor]:
        found = {key: source(key) for key in self.site.stored} if source is not None else {}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def _restored(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not saved:
            return {}
        with boundary(self._plan.peft_type, "restore"):
            return self._tuner.restore(self.config, saved)

    def _hold(self, slot: Slot, parameter: nn.Parameter) -> None:
        """Store a tensor under its name; a tail such as `0.weight` is a module in a module.

        Straight into torch's dictionaries: a slot may have the name of an attribute here.
        """
        holder: nn.Module = self
        *path, last = _path(slot)
        for name in path:
            holder = holder._modules.get(name) or _put(holder, name)
        holder._parameters[last] = parameter

    def _place(self, slot: Slot) -> tuple[nn.Module, str]:
        """The module that holds a slot's tensor, and its name there."""
        return place_in(self, _path(slot))

    def restored(self, source: Source) -> list[tuple[Tensor, Tensor | None]]:
        """Each slot's tensor with its value in a checkpoint. Raises `PeftcError` if slots hold what no checkpoint has."""
        if not self._holds_table(self._restored(self.tensors())):
            raise PeftcError(self._computed())
        values = self._restored(self._saved(source))
        places = {label: self._place(self.slots[label]) for label in values}
        return [(holder._parameters[name], values[label]) for label, (holder, name) in places.items()]  # type: ignore[misc]

    def set_trainable(self, trainable: bool) -> None:
        """Let the slots that train require gradients, or none."""
        for slot in self.slots.values():
            holder, name = self._place(slot)
            parameter = holder._parameters[name]
            assert parameter is not None
            keep_trained(parameter, trainable and slot.trainable)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by key."""
        with torch.no_grad():
            table = self()
            with boundary(self._plan.peft_type, "export"):
                more = dict(self._tuner.export(self.config, PromptSlots(self)))
            return {self.site.disk: table, **more}

    @whole
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Take a table as it is saved, in place of what the slots hold. Raises `PeftcError` if it does not fit, or if the
        slots hold something else that the table is computed from."""
        expected = tuple(self.site.shape)
        if tuple(prompt_embeddings.shape) != expected:
            what = f"The table is {tuple(prompt_embeddings.shape)}, the adapter's is {expected}"
            raise PeftcError(rules.TABLE_REFUSED(what, fix="Give one row for each virtual token of this model."))
        values = self._restored({self.site.disk: prompt_embeddings})
        slots = self.slots
        strange = [label for label, value in values.items() if label not in slots or value.shape != slots[label].shape]
        if strange or not self._holds_table(values):
            raise PeftcError(self._computed())
        with torch.no_grad():
            for label, value in values.items():
                holder, name = self._place(slots[label])
                fill(self, holder._parameters[name], value)  # type: ignore[arg-type]  # held there

    def _computed(self) -> Diagnostic:
        """What to say of a table for slots that it cannot be taken apart into."""
        what = f"`{self.name}` computes its table from other tensors, which cannot be found from it"
        fix = "Load it with `load_adapter`, or use an adapter without projection or reparametrisation."
        return rules.TABLE_REFUSED(what, fix=fix)

    def _holds_table(self, values: Mapping[str, Tensor]) -> bool:
        """Whether these slots are all that the table is made of."""
        trained = {label for label, slot in self.slots.items() if slot.trainable}
        return trained <= set(values)

    # the table ----------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The table, computed anew."""
        table: Tensor = self()
        return table

    def forward(self, indices: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        """The table, `(rows, width)`; with `task_ids` `(batch,)`, one for each of them, `(batch, rows, width)`.

        `indices` are for callers of the reference, whose encoders look their rows up: with `(batch, rows)` of them, the rows.
        """
        slots = PromptSlots(self)
        with torch.no_grad():
            for label, slot in self.slots.items():
                if slot.trainable:  # an operation that asks for the table, and fails, has moved nothing
                    keep_values(slots[label])
            guarded(self._tuner.constrain, self._plan.peft_type, None)(self.config, slots)
        if task_ids is not None:
            return guarded(self._tuner.of_tasks, self._plan.peft_type, None)(self.config, slots, task_ids)
        table = guarded(self._tuner.embeds, self._plan.peft_type, None)(self.config, slots)
        return table if indices is None else table[indices]

    def rows(self, batch: int, task_ids: Tensor | None) -> Tensor:
        """A table for each row of a batch, `(batch, rows, width)`; rows of beams come after each other.

        Raises `PeftcError` if the method needs `task_ids` and they are missing or do not fit.
        """
        tasks = guarded(self._tuner.tasks, self._plan.peft_type, None)(self.config)
        if tasks is None:
            table: Tensor = self()
            return table.unsqueeze(0).expand(batch, -1, -1)
        found: Tensor = self(task_ids=_checked(task_ids, tasks, batch))
        return found.repeat_interleave(batch // found.shape[0], dim=0)

    # labels and loss ----------------------------------------------------------------------------------------------

    def labels(self, labels: Tensor, keywords: Mapping[str, Tensor]) -> Tensor | None:
        """Labels with those of the virtual tokens in front; None if they have none."""
        return guarded(self._tuner.labels, self._plan.peft_type, None)(self.config, labels, keywords)

    def loss(self, logits: Tensor, labels: Tensor, keywords: Mapping[str, Tensor]) -> Tensor | None:
        """The loss in place of the model's; None to leave that."""
        return guarded(self._tuner.loss, self._plan.peft_type, None)(self.config, logits, labels, keywords)


class Exporter(nn.Module):
    """An encoder whose call gives what is saved of it, for `torch.func.functional_call` with other tensors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by key."""
        assert isinstance(self.encoder, PromptModule)
        return self.encoder.tensors()


def _checked(task_ids: Tensor | None, tasks: int, batch: int) -> Tensor:
    if task_ids is None and tasks == 1:
        return torch.zeros(batch, dtype=torch.long)
    ids = None if task_ids is None else torch.as_tensor(task_ids).reshape(-1)
    if ids is None or ids.numel() == 0 or batch % ids.numel():
        have = "no `task_ids`" if ids is None else f"{ids.numel()} `task_ids` for {batch} rows"
        raise PeftcError(rules.TASKS_NEEDED(f"The call has {have}", fix="Give one `task_ids` entry for each row."))
    wrong = sorted({int(i) for i in ids if not 0 <= int(i) < tasks})
    if wrong:
        what = f"`task_ids` names task {wrong[0]}, but there are {tasks}"
        raise PeftcError(rules.TASKS_NEEDED(what, fix=f"Tasks are numbered from 0 to {tasks - 1}."))
    return ids


def _path(slot: Slot) -> tuple[str, ...]:
    """The names that lead to a slot's tensor."""
    return (slot.name,) if slot.container is Container.PARAMETER else (slot.name, *slot.tail.split("."))


def _put(holder: nn.Module, name: str) -> nn.Module:
    module = holder._modules[name] = SlotModule()
    return module


class PromptSlots:
    """Slots of an encoder by label (`peftc.tuner.views.PromptView`)."""

    __slots__ = ("_brought", "_encoder")

    def __init__(self, encoder: PromptModule) -> None:
        self._encoder = encoder
        self._brought: dict[str, Tensor] = {}

    @property
    def training(self) -> bool:
        return self._encoder.training

    def __contains__(self, label: str) -> bool:
        return label in self._encoder.slots

    def __getitem__(self, label: str) -> Tensor:
        if label not in self._encoder.slots:
            raise no_slot(label, self._encoder.slots)
        holder, name = self._encoder._place(self._encoder.slots[label])
        tensor = holder._parameters.get(name)
        if tensor is not None and not tensor.is_meta:
            return tensor
        if label not in self._brought:
            found = tensor_of(holder, name)
            if found is None:
                raise KeyError(label)
            self._brought[label] = found
        return self._brought[label]

    def __getattr__(self, label: str) -> Tensor:
        try:
            return self[label]
        except NoSlot:
            raise
        except KeyError:
            raise AttributeError(f"the slot `{label}` is no longer where it was put") from None


class Start:
    """What a prompt may start from (`peftc.tuner.views.PromptContext`)."""

    def __init__(self, word_embeddings: nn.Embedding) -> None:
        self._embeddings = word_embeddings

    @property
    def init(self) -> Initializer:
        return INIT

    @property
    def embedding_weight(self) -> Tensor:
        weight = tensor_of(self._embeddings, "weight")
        assert weight is not None
        return weight.detach()

    def tokenize(self, name_or_path: str, text: str, **kwargs: Any) -> Sequence[int]:
        """Token ids of a text. Raises `PeftcError` if the tokenizer cannot be loaded or gives no token."""
        from transformers import AutoTokenizer

        try:
            ids = list(AutoTokenizer.from_pretrained(name_or_path, **kwargs)(text)["input_ids"])
        except (OSError, ValueError) as error:
            what = f"The tokenizer `{name_or_path}` cannot be loaded: {str(error).splitlines()[0]}"
            fix = "Give a folder with the tokenizer's files, or a hub id that can be reached."
            raise PeftcError(rules.TOKENIZER_MISSING(what, fix=fix, where="tokenizer_name_or_path")) from error
        if not ids:
            fix = "Give a text that has tokens."
            raise PeftcError(rules.BAD_VALUE("The text that the prompt starts as gives no tokens", fix=fix))
        return ids
