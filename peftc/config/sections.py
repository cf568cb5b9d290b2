"""The sections of a spec: which base model, how to train, what to assert, all optional but the base.

Names are the field's; a section holds plain values and no defaults that depend on a model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from peftc.config.base import ConfigModel
from peftc.config.quantize import QuantizeSection
from peftc.config.types import TaskType

#: Ways to name a base model; a document gives one.
SOURCES = ("model", "path", "gguf", "distribution", "config")

_COUNT = re.compile(r"(\d+)(?:\.(\d+))?([KMB]?)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def section_of_word(value: Any) -> Any:
    """A base given as one word: a `.gguf` file, a `.json` config, a path that begins with `.`, `/` or `~`, a hub id, or
    `distribution:NAME/FILE`, as adapters name it."""
    if not isinstance(value, str):
        return value
    if value.startswith("distribution:"):
        name, _, file = value.removeprefix("distribution:").partition("/")
        return {"distribution": name, "file": file}
    if value.lower().endswith(".gguf"):
        return {"gguf": value}
    if value.lower().endswith(".json"):
        return {"config": value}
    return {"path" if value.startswith((".", "/", "~")) else "model": value}


def _count(value: Any) -> Any:
    if isinstance(value, str) and _bounds(value) is None:
        raise ValueError("should be a number, or text such as `9.2M` or `350K`")
    if isinstance(value, int) and value < 0:
        raise ValueError("should not be negative")
    return value


Text = Annotated[str, Field(min_length=1)]
#: A number of parameters: exact, or rounded to the digits shown.
Count = Annotated[int | str, BeforeValidator(_count, json_schema_input_type=int | str)]


class BaseSection(ConfigModel):
    """The base model: exactly one of `model`, `path`, `gguf`, `distribution` with `file`, and `config`."""

    model_config = ConfigDict(title="base")

    model: Text | None = None
    """Id of a repository on the Hugging Face hub, e.g. `owner/name`."""
    path: Text | None = None
    """Folder with a model that transformers saved; relative paths start at the document."""
    gguf: Text | None = None
    """A GGUF file; relative paths start at the document."""
    distribution: Text | None = None
    """An installed Python distribution that contains a GGUF file, named by `file`."""
    file: Text | None = None
    """The file inside the distribution: its path there, or its name alone."""
    config: Annotated[dict[str, Any], Field(min_length=1)] | Text | None = None
    """A bare transformers config, for planning without weights: a `config.json`, or its content with `model_type`."""
    revision: Text | None = None
    """Branch, tag or commit of `model`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the base weights; left out, the one that the model was saved in."""
    task_type: TaskType | None = Field(default=None, strict=False)
    """What the model is for; decides its class, and holds for adapters that do not say it themselves."""
    quantize: QuantizeSection | None = None
    """How bitsandbytes is to quantise the base while it is loaded (QLoRA), e.g. `{bits: 4, type: nf4, double: true}`."""
    quantization_config: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    """The same for any library, as transformers has it: `quant_method` and the options of that."""

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base is to be quantised, in transformers' words; None for as it is."""
        return self.quantization_config if self.quantize is None else self.quantize.as_config()


class TrainSection(ConfigModel):
    """How `peftc train` trains the active adapter."""

    model_config = ConfigDict(title="train")

    data: Text
    """The training examples, one JSON object per line; relative paths start at the document."""
    eval_data: Text | None = None
    """Held-out examples, in the same form."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; 1 if neither this nor `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimiser steps, instead of `epochs`."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    optimizer: Text | None = None
    """What moves the parameters: `adamw`, which is taken if it is left out, `adamw_torch`, `sgd`, `adafactor`, `adagrad`,
    `rmsprop`, those of bitsandbytes (`adamw_8bit`, `paged_adamw_8bit`, `paged_adamw_32bit`, `lion_8bit`, …), or one that an
    installed method brings."""
    optimizer_options: dict[str, Any] | None = None
    """Options of the optimiser; learning rate and weight decay are those of this section."""
    batch_size: int = Field(default=8, ge=1)
    """Examples per forward pass."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimiser step."""
    warmup: float = Field(default=0.0, ge=0)
    """Steps over which the learning rate rises; below 1, their share of all steps."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter's parameters."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of an example; longer ones are cut at the end."""
    start_samples: int = Field(default=256, ge=1)
    """Examples of the data that a start reads, for adapters that begin by one that does and do not say it themselves
    (`init: {kind: NAME, samples: 64}`)."""
    save_steps: int | None = Field(default=None, ge=1)
    """Write a checkpoint, to resume from, every so many steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, order and dropout."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|(cuda|xpu)(:[0-9]+)?)$")
    """Where to train: `auto`, `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`."""


class ChecksSection(ConfigModel):
    """What the author expects of the plan; a plan that differs is an error."""

    model_config = ConfigDict(title="checks")

    expect_modules: int | None = Field(default=None, ge=0)
    """Number of modules that the active adapters adapt."""
    expect_trainable: Count | None = None
    """Number of trainable parameters: exact (`9232384`), or rounded to the digits shown (`9.2M`)."""
    allow_dead_targets: Annotated[list[str], Field()] = Field(default_factory=list)
    """Targets and pattern keys that may match nothing."""

    def trainable_bounds(self) -> tuple[int, int] | None:
        """The smallest and the largest count that `expect_trainable` admits, both included; None if it is not given."""
        value = self.expect_trainable
        return (value, value) if isinstance(value, int) else _bounds(value or "")


def _bounds(text: str) -> tuple[int, int] | None:
    """The whole numbers that round to the text: `9.2M` -> 9,150,000 to 9,249,999. None if it is no such text."""
    match = _COUNT.fullmatch(text)
    if match is None:
        return None
    whole, digits, unit = match[1], match[2] or "", match[3]
    last = _UNITS[unit] // 10 ** len(digits)  # what one step of the last digit is worth
    if last == 0:
        return None
    middle = int(whole + digits) * last
    return (middle, middle) if last == 1 else (max(0, middle - last // 2), middle + last // 2 - 1)
