"""What commands do with a real model: load a base, put an adapter on it, train, merge.

Each function is one step that a script can take as well; what a person sees of it is the business of `peftc.cli`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftc import rules
from peftc.checkpoint.atomic import replace_files
from peftc.checkpoint.load import open_adapter
from peftc.compiler.compile import compile_plan
from peftc.compiler.of_spec import compile_spec
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.config.sections import TrainSection
from peftc.config.spec import AdapterSpec
from peftc.diagnostics import PeftcError, Severity, Where, did_you_mean, warn
from peftc.graph.base_ref import BaseRef
from peftc.host.quantised import is_quantised, is_saved_packed
from peftc.integrations.transformers.asked import refuse_other_base, require_new
from peftc.integrations.transformers.base import fit_vocabulary, load_base, without_bars
from peftc.integrations.transformers.data import Collator, Encoded, Encoder, pad_id, read_examples, stop_ids
from peftc.integrations.transformers.training import Step, TrainResult, fit
from peftc.model.functions.precision import prepare_model_for_kbit_training
from peftc.model.parts import identity
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import boundary
from peftc.registry.manager import default_registry
from peftc.registry.starts import start_of
from peftc.runtime.applying.apply import session_of
from peftc.runtime.applying.snapshot import snapshot
from peftc.runtime.session.described import undescribed
from peftc.runtime.session.session import Session
from peftc.tuner.start import Reads


@dataclass(frozen=True)
class Base:
    """A base model with real weights and the tokenizer that goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad(self) -> int:
        """The id that batches are padded with."""
        return pad_id(self.tokenizer)


def device_named(name: str) -> torch.device:
    """The device of a name such as `cuda:1`; `auto` is the accelerator if there is one. Raises `PeftcError` without it."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        fix = (
            did_you_mean(name, ("auto", "cpu", "cuda", "mps", "xpu"))
            or "Use `auto`, `cpu`, `cuda`, `cuda:1`, `mps` or `xpu`."
        )
        raise PeftcError(rules.DEVICE_MISSING(f"`{name}` is not the name of a device", fix=fix)) from None
    count = 1 if device.type == "cpu" else _count(device.type)
    if (device.index or 0) < count:
        return device
    told = f"There is no device `{name}`; PyTorch finds {count or 'none'} of that kind"
    raise PeftcError(rules.DEVICE_MISSING(told, fix="Use `--device cpu`, or install PyTorch for your accelerator."))


def _count(kind: str) -> int:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if found is not None and found.type == kind else 0


def load_any(ref: BaseRef, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model of any kind, and its tokenizer if it has one. Raises `PeftcError` if it cannot be read."""
    with without_bars():
        return load_base(ref, device)


def load(ref: BaseRef, device: torch.device) -> Base:
    """A language model and its tokenizer. Raises `PeftcError` if either is missing, cannot be read, or is of another kind."""
    model, tokenizer = load_any(ref, device)
    name = ref.name or "The base model"
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise PeftcError(
            rules.NOT_A_LANGUAGE_MODEL(
                f"`{name}` is a {type(model).__name__}, which does not write on from a text",
                fix="Use a causal language model (`task_type: CAUSAL_LM`), or train from Python with `get_peft_model`.",
            )
        )
    if tokenizer is None:
        raise PeftcError(
            rules.NO_TOKENIZER(
                f"`{name}` comes without a tokenizer",
                fix="Name a base with one: a folder or repository with `tokenizer.json`, or a GGUF file.",
            )
        )
    return Base(model, tokenizer)


def fresh_adapter(base: Base, spec: AdapterSpec, seed: int, rows: Sequence[Encoded] = (), batch: int = 1) -> PeftModel:
    """The spec's adapters on the base, initialised from `seed`, the active ones trainable. Starts that read data read the first of
    these rows, so many at a time. Raises `PeftcError`."""
    if is_quantised(base.model):
        prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=False)  # `Trainer` sees to that
    graph = snapshot(base.model)
    plan = compile_spec(spec, graph)
    warn(plan.warnings)
    transformers.set_seed(seed)
    prepared = {
        name: _prepared(base, config, rows[: spec.samples_of(name)], batch) for name, config in spec.adapters.items()
    }
    if any(config is not spec.adapters[name] for name, config in prepared.items()):
        plan = replace(compile_plan(graph, prepared, active=spec.active_names), base=plan.base)
    return PeftModel.from_plan(base.model, plan)


def read_by_starts(spec: AdapterSpec) -> dict[str, int]:
    """How many examples the starts of adapters read, of those that read any. Raises `PeftcError`."""
    chosen = {name: start_of(default_registry().method_of(config), config) for name, config in spec.adapters.items()}
    reading = (name for name, own in chosen.items() if own is not None and own.start.reads is not Reads.NOTHING)
    return {name: spec.samples_of(name) for name in reading}


def _prepared(base: Base, config: PeftConfig, rows: Sequence[Encoded], batch: int) -> PeftConfig:
    """The options that an adapter begins with, once its start has read what it reads."""
    chosen = start_of(default_registry().method_of(config), config)
    if chosen is None or chosen.start.reads is Reads.NOTHING or not rows:
        return config
    collate = Collator(base.pad)
    parts = [collate(rows[at : at + batch]) for at in range(0, len(rows), batch)]
    batches = [{name: tensor.to(base.model.device) for name, tensor in part.items()} for part in parts]
    with boundary(f"the start `{chosen.start.name}`", "prepare"):
        made: PeftConfig = chosen.start.prepare(base.model, config, batches)
    return made


def with_adapter(model: PreTrainedModel, folder: str | Path, any_base: bool = True) -> PeftModel:
    """The model with an adapter from a folder or the hub, frozen, its vocabulary resized if the adapter carries another.

    Raises `PeftcError`; unless `any_base`, also if the model's weights are not those that the adapter was trained on.
    """
    file = open_adapter(folder)
    fit_vocabulary(model, file)
    if not any_base:
        session = Session(model, snapshot(model))
        name = read_config(folder).base_model_name_or_path
        refuse_other_base(identity.told(session, file.folder, name, Severity.ERROR))
    return PeftModel.from_pretrained(model, folder)


def encoded(base: Base, data: Path, max_length: int) -> list[Encoded]:
    """The examples of a file, ready for training. Raises `PeftcError` with everything that is wrong with them."""
    encoder = Encoder(base.tokenizer, stop_ids(base.tokenizer, base.model.generation_config))
    return encoder.encode_all(read_examples(data), max_length)


def train(
    model: PeftModel,
    base: Base,
    rows: list[Encoded],
    how: TrainSection,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[[Step], None] | None = None,
    samples: Mapping[str, int] | None = None,
) -> TrainResult:
    """Train the active adapters and save all to `folder`; see `fit`. `how.device` is where the model is."""
    device = torch.device(how.device)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)  # Trainer takes the current device of the kind
    return fit(model, rows, base.pad, how, folder, resume=resume, progress=progress, samples=samples)


def merge(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, untie: bool = False
) -> PreTrainedModel:
    """Fold the adapters into the base model and save that to `folder`, which must be new or empty; it is returned.

    With `untie`, input and output embeddings that are one tensor in the base model may become two. The folder appears whole
    or not at all. Raises `PeftcError` if it holds something, if the adapter cannot be merged, if merged weights are not
    finite, if tied embeddings would differ, if the config does not describe replicated layers, or if transformers cannot save
    the base's packed weights.
    """
    require_new(folder)
    _require_saved(model.get_base_model())
    session = session_of(model.get_base_model())
    lost = [] if session is None else list(undescribed(session, Severity.ERROR))
    if lost:
        raise PeftcError(lost)
    if untie:
        model.get_base_model().config.tie_word_embeddings = False  # type: ignore[union-attr]  # transformers' config
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    if untie:
        _part(merged)

    def write(stage: Path) -> None:
        with without_bars():
            merged.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)

    try:
        replace_files(folder, write, commit="config.json")
    except SafetensorError as error:
        what = f"The model could not be saved to `{folder}`: {error}"
        fix = "Free some space, or save to another disk."
        raise PeftcError(rules.SAVE_FAILED(what, fix=fix, where=Where(file=str(folder)))) from error
    return merged


def _require_saved(base: nn.Module) -> None:
    """Raise `PeftcError` if a base with packed weights could not be saved once it is merged."""
    if is_quantised(base) and not is_saved_packed(base):
        what = "transformers does not save weights that are packed like those of this base"
        raise PeftcError(rules.SAVE_FAILED(what, fix="Give `--dequantize`, to save a plain model."))


def _part(model: PreTrainedModel) -> None:
    """Have two tensors where input and output embeddings are still one: who saves one of them, and a config that ties nothing,
    saves a model without a head."""
    first: Any = model.get_input_embeddings()
    second: Any = model.get_output_embeddings()
    if second is not None and second.weight is first.weight:
        second.weight = torch.nn.Parameter(first.weight.detach().clone(), requires_grad=False)
