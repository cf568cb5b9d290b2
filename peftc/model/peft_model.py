"""`PeftModel`: the wrapped model with the API people know. It delegates; what is applied is in its session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.report import LoadReport
from peftc.config.base import PeftConfig
from peftc.config.hub import Commit
from peftc.config.types import TaskType
from peftc.diagnostics import PeftcError, warn
from peftc.host.generation import calls_replaced
from peftc.model.parts import files
from peftc.model.parts.adapted import DEFAULT, AdaptedModel
from peftc.model.parts.card import facts_of, push, write_card
from peftc.model.parts.embeddings import AUTO
from peftc.model.parts.loading import LoadOptions, loadable, opened
from peftc.model.parts.rows import ADAPTER_NAMES, expansion, rows_named
from peftc.model.parts.starts import Beginning
from peftc.model.parts.status import TunerLayerStatus, TunerModelStatus, counted, get_layer_status, get_model_status
from peftc.runtime.applying.apply import let_go, strip
from peftc.runtime.applying.handed import with_handed
from peftc.runtime.applying.planning import hollow, plan_for
from peftc.runtime.applying.tuner_model import TunerModel, let_property_say
from peftc.runtime.around.calls import CallModule
from peftc.runtime.bases import splits
from peftc.runtime.collector import collector_paused
from peftc.runtime.gates import FromToken
from peftc.runtime.journal import keep, keep_entries, whole
from peftc.runtime.session.beginnings import counting, remember, remember_generated
from peftc.runtime.session.session import Session
from peftc.runtime.session.steps import finished
from peftc.runtime.session.together import refuse_prompts
from peftc.runtime.session.values import taken, values_given


class PeftModel(AdaptedModel):
    """A base model with adapters. Attributes that it does not have itself are those of the base model.

    `peft_config` maps adapter names to configs; `base_model` is the level that gives parameters their names.
    """

    #: task -> the class for it: each says so where it is declared
    of_task: ClassVar[dict[str, type[PeftModel]]] = {}

    def __init_subclass__(cls, task: TaskType | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            PeftModel.of_task[task] = cls

    # calls --------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters in effect.

        `adapter_names` names an adapter for each row instead, active or not, or `"__base__"` for the base model. Keywords
        that an adapter reads (`task_ids`) are not passed on.
        """
        opened = self._opened(args, kwargs)
        if opened is not None:
            with opened as gates:
                outputs = self.get_base_model()(*args, **kwargs)
            if gates is not None:
                remember(args, kwargs, outputs)
            return finished(self.session, outputs) if self.training else outputs
        acting = self._acting()
        if acting is not None:
            return acting.around(self.session.shared, self.get_base_model(), args, kwargs)
        driver = self._driver()
        if driver is None:
            self._refuse_prompted(kwargs)
        outputs = self.get_base_model()(*args, **self._plain(kwargs)) if driver is None else driver(args, kwargs)
        return finished(self.__dict__.get("_session"), outputs) if self.training else outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generation with the active adapters in effect; `adapter_names` as in `forward`."""
        base = self.get_base_model()
        opened = self._opened(args, kwargs, expansion(base, kwargs), prompt=True)
        if opened is not None:
            with opened as gates, counting(base, gates):
                outputs = base.generate(*args, **kwargs)  # type: ignore[operator]
            if gates is not None:
                remember_generated(outputs)
            return outputs
        acting = self._acting()
        if acting is not None:  # a cache would keep what tokens were before they were weighed anew
            with calls_replaced(base, partial(acting.around, self.session.shared)):
                return base.generate(*args, **{**kwargs, "use_cache": False})  # type: ignore[operator]
        driver = self._driver()
        if driver is not None:
            return driver.generate(args, kwargs)
        self._refuse_prompted(kwargs)
        return self.get_base_model().generate(*args, **self._plain(kwargs))  # type: ignore[operator]

    def _acting(self) -> CallModule | None:
        session: Session | None = self.__dict__.get("_session")
        return None if session is None else session.acting

    def _opened(
        self, args: Sequence[Any], kwargs: dict[str, Any], expand: int = 1, prompt: bool = False
    ) -> AbstractContextManager[FromToken | None] | None:
        """What the call is made in, if rows differ in it; keywords that say how are taken off. Raises `PeftcError`."""
        names = kwargs.pop(ADAPTER_NAMES, None)
        session: Session | None = self.__dict__.get("_session")
        values = taken(session, kwargs) if session is not None and session.readers else {}
        if names is not None:
            return rows_named(self.session, names, args, kwargs, expand, values, prompt)
        reads = session is not None and session.readers
        return values_given(self.session, values, args, kwargs, expand, prompt) if reads else None

    def _plain(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of a call without those that only a prompt understands."""
        own = self._own_keywords()
        return {name: value for name, value in kwargs.items() if name not in own} if own else kwargs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            let_property_say(self, name)
            return getattr(self.base_model, name)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's; also makes the inputs require gradients, without which re-entrant checkpointing cuts
        the path to every adapter. Raises `PeftcError` for a prompt that checkpointing would drop."""
        self._refuse_checkpointing()
        self._refuse_reentrant(args, kwargs)
        self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)
        self.prepare_model_for_gradient_checkpointing(self.get_base_model())

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self._refuse_checkpointing()
        self._refuse_reentrant(args, kwargs)
        self.get_base_model().activation_checkpointing_enable(*args, **kwargs)
        self.prepare_model_for_gradient_checkpointing(self.get_base_model())

    def _refuse_reentrant(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Re-entrant checkpointing goes back through what comes from outside of a block once for each block."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
        if self.session.holders and any(value.get("use_reentrant") for value in given):
            what = "Re-entrant checkpointing cannot train what weighs adapters of several blocks"
            raise PeftcError(rules.CALL_AROUND(what, fix='Use `{"use_reentrant": False}`.'))

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Have a model's input embeddings require gradients, if it is one of transformers; returns it."""
        enable: Any = getattr(model, "enable_input_require_grads", None)
        if enable is not None:
            for (
                module
            ) in model.modules():  # it hooks on to embeddings, of inner models too, and notes that on the model
                keep_entries(module._forward_hooks)
            keep(model)
            enable()
        return model

    # adapters -----------------------------------------------------------------------------------------------------

    @whole
    @collector_paused()
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter beside those there are; it is not activated. Raises `PeftcError`, with nothing changed.

        With `low_cpu_mem_usage` its tensors are on the meta device until `set_peft_model_state_dict` gives them values.
        """
        self._refuse_type(peft_config)
        base, handed = self.get_base_model(), {adapter_name: peft_config}
        plan = with_handed(plan_for(base, handed, autocast_adapter_dtype, mixed=self.mixes), base, handed)
        self._attach(plan, hollow(plan.adapters[0]) if low_cpu_mem_usage else None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of modules that adapters train whole; None if there are none."""
        named = (getattr(config, "modules_to_save", None) or () for config in self.peft_config.values())
        return {name for names in named for name in names} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, where it tells one."""
        return getattr(self.base_model, "dtype", None)

    # merging ------------------------------------------------------------------------------------------------------

    @whole
    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; `unmerge_adapter` restores them bit for bit."""
        self._refuse_merge()
        self.session.merge(adapter_names, safe_merge)

    @whole
    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the base weights."""
        if not self.session.merged:
            warn([rules.NOT_MERGED("No adapter is merged", fix="Leave the call out, or merge first.")])
        self.session.unmerge()

    @whole
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters folded in and no wrapper left. This object has no adapter afterwards.

        Raises `PeftcError`, with nothing changed, if an adapter on a tied weight would part it.
        """
        self._refuse_merge()
        merged: nn.Module = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[operator]
        return merged

    @whole
    def unload(self) -> nn.Module:
        """The base model as it was, with the same module objects. This object has no adapter afterwards."""
        session, model = self.session, self.get_base_model()
        session.unmerge()
        strip(model, session)
        keep_entries(self.peft_config)
        self.peft_config.clear()
        return model

    def _refuse_merge(self) -> None:
        if self.prompt_encoder is not None:
            refuse_prompts()

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Whether an adapter adds a matrix to each of its layers' weights that does not depend on the weight."""
        self.session.require([adapter_name])
        base = self.base_model
        return isinstance(base, TunerModel) and base.supports_lora_conversion(adapter_name)

    # counting -----------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` parameters; a shared tensor counts once."""
        return counted(self)

    def print_trainable_parameters(self) -> None:
        """One line with both counts and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of every wrapped layer. Raises `PeftcError` for an adapter that wraps none."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of all wrapped layers together. Raises `PeftcError` for an adapter that wraps none."""
        return get_model_status(self)

    # files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = AUTO,
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: Beginning = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: `default` at the root of the folder, others in subfolders. All in one step where the file system
        can exchange folders, else each in one.

        `state_dict` is the wrapped model's, gathered by a sharded run. `save_embedding_layers` see `peftc.model.parts.embeddings`.
        `path_initial_model_for_weight_conversion` saves adapters whose start changed the base as ones beside the original base,
        of twice the rank: it is the folder of the adapter as it began, or true, as what it began with is kept.
        The weights are safetensors, and without `safe_serialization` what `torch.save` writes; further keywords are accepted.
        Raises `PeftcError` with the folder as it was.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.session.require(names)
        if not names:
            raise PeftcError(rules.NOT_ADAPTED("There is no adapter to save", fix="Add or load one first."))
        if is_main_process:
            beginning, pickled = path_initial_model_for_weight_conversion, not safe_serialization
            files.save(self, save_directory, names, save_embedding_layers, state_dict, pickled, beginning)
        elif state_dict is None and splits.is_split(self):  # whoever writes puts it together from what all have
            for name in names:
                self.adapter_tensors(name, save_embedding_layers)

    def adapter_tensors(
        self,
        name: str,
        save_embedding_layers: str | bool = AUTO,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What a checkpoint of the adapter holds: key on disk -> tensor."""
        return files.adapter_tensors(self, name, save_embedding_layers, state_dict)

    def create_or_update_model_card(self, output_dir: str | PathLike[str]) -> None:
        """Write or update `README.md` in a folder; what a person wrote in it stays. Raises `PeftcError`."""
        write_card(facts_of(self, DEFAULT), Path(output_dir))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | None = None,
    ) -> Any:
        """Upload what `save_pretrained` writes, with its card, into which the repository's own card is merged.

        Returns the address of the commit. `max_shard_size` is accepted: an adapter is one file. Raises `PeftcError`.
        """
        commit = Commit(commit_message or "Upload model", commit_description, private, token, revision, create_pr)
        return push(self, repo_id, DEFAULT, tags or (), commit)

    @classmethod
    @whole
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter onto a base model, in the class of its task. Raises `PeftcError`, with the model as it was.
        `kwargs`: `torch_device`, `ignore_mismatched_sizes`, `subfolder`, those of the hub's client; others are ignored.
        Tensors are read once and nothing is initialised to be overwritten, so that `low_cpu_mem_usage` has nothing to add.
        """
        device = kwargs.pop("torch_device", None)
        given = (is_trainable, autocast_adapter_dtype, device, key_mapping, ephemeral_gpu_offload)
        options = LoadOptions.of(*given, kwargs)
        config, file = opened(model_id, config, options)
        let_go(model)
        found = loadable(model, adapter_name, config, file, options)
        task_class = PeftModel if config.task_type is None else PeftModel.of_task[config.task_type]
        chosen = cls if cls.mixes or issubclass(cls, task_class) else task_class
        plan = with_handed(found.plan, model, {adapter_name: config})
        wrapped = chosen.from_plan(model, plan, {adapter_name: found.source})
        if not is_trainable:
            files.evaluate(wrapped)
        return wrapped

    @whole
    @collector_paused()
    def load_adapter(
        self,
        model_id: str | PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | int | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Load a further adapter, not activated; one of that name is overwritten. The report names every key.

        Keywords as in `from_pretrained`. Raises `PeftcError`, with nothing changed (`peftc.model.parts.files.load`).
        """
        given = (is_trainable, autocast_adapter_dtype, torch_device, key_mapping, ephemeral_gpu_offload)
        options = LoadOptions.of(*given, kwargs)
        return files.load(self, model_id, adapter_name, options)
