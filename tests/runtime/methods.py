"""Methods made for these tests, one per way to act: a thin update, a scaled output, prompts of four kinds; and a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import PeftModel, get_peft_model
from peftc.plugin import (
    LINEAR_KINDS,
    Begun,
    CallTuner,
    CallView,
    Diagnostic,
    Field,
    LayerFacts,
    MapTuner,
    ModulesToSaveMixin,
    PeftConfig,
    PeftType,
    Place,
    PromptContext,
    PromptLearningConfig,
    PromptTuner,
    PromptView,
    RankMixin,
    Reads,
    Run,
    Slot,
    SlotInit,
    Start,
    StartView,
    TargetsMixin,
    TunerMethod,
    View,
    module_slot,
    parameter_slot,
    rules,
)
from peftc.testing.models import MODELS, seeded


class NarrowConfig(TargetsMixin, RankMixin, ModulesToSaveMixin, PeftConfig):
    """Options of the thin update."""

    peft_type: PeftType | None = PeftType("NARROW")
    r: int = 2
    factor: float = 0.5
    bias: str = "none"
    begin: bool | str = True


class NarrowTuner(MapTuner[NarrowConfig]):
    """`y = W x + B A x / 2`; both factors start at random, so that an adapter is seen in the output at once."""

    supports = LINEAR_KINDS

    def slots(self, c: NarrowConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield module_slot("narrow_A", (c.r, layer.in_features))
        yield module_slot("narrow_B", (layer.out_features, c.r))

    def init(self, c: NarrowConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        for tensor in slots.values():
            init.normal(tensor)

    def scaling(self, c: NarrowConfig, layer: LayerFacts) -> float:
        return c.factor

    def of_rank(self, c: NarrowConfig, rank: int) -> NarrowConfig:
        return c.model_copy(update={"r": rank, "factor": 1.0})

    def of_thin(self, c: NarrowConfig, layer: LayerFacts, A: Tensor, B: Tensor) -> Mapping[str, Tensor]:
        return {"narrow_A": A, "narrow_B": B}

    def of_twice(self, c: NarrowConfig) -> NarrowConfig:
        return c.model_copy(update={"r": 2 * c.r, "begin": True})

    def thin(self, a: View) -> tuple[Tensor, Tensor, float]:
        return a.narrow_A, a.narrow_B, a.scaling


class Late(Start):
    """A start of the narrow update that changes the base: A is a part of the weight, B the identity's."""

    name = "late"
    changes_base = True

    def factors(self, s: StartView) -> Begun:
        return Begun(s.weight[: s.rank].clone(), torch.eye(s.weight.shape[0])[:, : s.rank])


class Told(Late):
    """The same after it was told."""

    name = "told"
    reads = Reads.INPUTS

    def prepare(self, model: nn.Module, c: Any, batches: Any) -> Any:
        return c


STARTS = (Late(), Told())


class StretchConfig(TargetsMixin, PeftConfig):
    """Options of the scaled output."""

    peft_type: PeftType | None = PeftType("STRETCH")


class StretchTuner(MapTuner[StretchConfig]):
    """`y = l * (W x + b)`."""

    supports = LINEAR_KINDS

    def slots(self, c: StretchConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("stretch_l", (layer.out_features,))

    def init(self, c: StretchConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["stretch_l"])

    def output(self, a: View, y: Tensor) -> Tensor:
        return y * a.stretch_l


class TintConfig(TargetsMixin, PeftConfig):
    """Options of an output that depends on what the call gives."""

    peft_type: PeftType | None = PeftType("TINT")
    colours: int = 3


class TintTuner(MapTuner[TintConfig]):
    """`y = W x + b + t_c`, with the row's colour c; twice as much in training."""

    supports = LINEAR_KINDS
    keywords = ("colours",)

    def slots(self, c: TintConfig, layer: LayerFacts) -> Iterable[Slot]:
        yield parameter_slot("tint_t", (c.colours, layer.out_features))

    def check_call(self, c: TintConfig, values: Mapping[str, Tensor]) -> Iterable[Diagnostic]:
        if "colours" in values and int(values["colours"].max()) >= c.colours:
            yield rules.ROW_VALUES("There is no such colour", fix="Use another.")

    def init(self, c: TintConfig, layer: LayerFacts, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["tint_t"])

    def branch(self, a: View, x: Tensor, y0: Tensor) -> Tensor:
        tints = a.tint_t[a.of_rows("colours", x)] * (2.0 if a.training else 1.0)
        return tints.view(len(x), *[1] * (y0.dim() - 2), -1)


class MixConfig(PeftConfig):
    """Options of a mixture: other adapters, by name, and where they are."""

    peft_type: PeftType | None = PeftType("MIX")
    parts: dict[str, str] = Field(default_factory=dict)
    trains: bool = False


class MixTuner(CallTuner[MixConfig]):
    """A first pass without adapters; then each acts as much as its own number says, more on later layers."""

    owner = "mixer"
    option = "parts"

    def needs(self, c: MixConfig) -> Mapping[str, str]:
        return c.parts

    def trains_needed(self, c: MixConfig) -> bool:
        return c.trains

    def slots(self, c: MixConfig, layers: int) -> Iterable[Slot]:
        yield parameter_slot("shares", (len(c.parts),))

    def init(self, c: MixConfig, slots: Mapping[str, Tensor], init: SlotInit) -> None:
        init.normal(slots["shares"])

    def around(self, a: CallView, run: Run, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        a.state["without"] = run(0.0, *args, **kwargs)
        growing = torch.arange(1.0, len(a.layers) + 1).unsqueeze(1) * a["shares"]
        return run(growing.expand(args[0].shape[0], 1, *growing.shape), *args, **kwargs)


class PrefaceConfig(PromptLearningConfig):
    """Options of the prompt."""

    peft_type: PeftType | None = PeftType("PREFACE")
    tokenizer: str | None = None


class PrefaceTuner(PromptTuner[PrefaceConfig]):
    """A table; with a tokenizer it asks for the tokens of a text, and starts at zero all the same."""

    def slots(self, c: PrefaceConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield module_slot("embedding", (c.num_virtual_tokens or 0, c.token_dim or 0))

    def init(self, c: PrefaceConfig, slots: Mapping[str, Tensor], context: PromptContext) -> None:
        if c.tokenizer is not None:
            context.tokenize(c.tokenizer, "Once upon a time")
        context.init.zeros(slots["embedding"])

    def embeds(self, c: PrefaceConfig, a: PromptView) -> Tensor:
        return a.embedding

    def restore(self, c: PrefaceConfig, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"embedding": saved["prompt_embeddings"]}


class StoredConfig(PrefaceConfig):
    """Options of keys and values."""

    peft_type: PeftType | None = PeftType("STORED")


class StoredTuner(PrefaceTuner):
    """A table of keys and values."""

    place = Place.CACHE

    def slots(self, c: PrefaceConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield module_slot("embedding", (c.num_virtual_tokens or 0, (c.num_layers or 0) * 2 * (c.token_dim or 0)))


class SharedConfig(PrefaceConfig):
    """Options of a prompt for two tasks."""

    peft_type: PeftType | None = PeftType("SHARED")


class SharedTuner(PrefaceTuner):
    """The table, once or twice of it."""

    def tasks(self, c: PrefaceConfig) -> int | None:
        return 2

    def of_tasks(self, c: PrefaceConfig, a: PromptView, task_ids: Tensor) -> Tensor:
        return a.embedding * (task_ids + 1).view(-1, 1, 1)


class MadeConfig(PrefaceConfig):
    """Options of a prompt that is made of two tensors."""

    peft_type: PeftType | None = PeftType("MADE")


class MadeTuner(PrefaceTuner):
    """A table times a vector while it is trained; the table alone once it is saved."""

    def slots(self, c: PrefaceConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield from self.encoded(c, dims)
        yield parameter_slot("scale", (c.token_dim or 0,))

    def encoded(self, c: PrefaceConfig, dims: Mapping[str, int]) -> Iterable[Slot]:
        yield from super().slots(c, dims)

    def init(self, c: PrefaceConfig, slots: Mapping[str, Tensor], context: PromptContext) -> None:
        for tensor in slots.values():
            context.init.normal(tensor)

    def embeds(self, c: PrefaceConfig, a: PromptView) -> Tensor:
        return a["embedding"] * a["scale"] if "scale" in a else a["embedding"]


METHODS = (
    TunerMethod(
        "NARROW",
        NarrowConfig,
        NarrowTuner(),
        prefix="narrow_",
        layer_names=("narrow_A", "narrow_B"),
        start_option="begin",
    ),
    TunerMethod("STRETCH", StretchConfig, StretchTuner(), prefix="stretch_", layer_names=("stretch_l",)),
    TunerMethod("TINT", TintConfig, TintTuner(), prefix="tint_", layer_names=("tint_t",)),
    TunerMethod("MIX", MixConfig, MixTuner(), prefix=""),
    TunerMethod("PREFACE", PrefaceConfig, PrefaceTuner(), prefix=""),
    TunerMethod("STORED", StoredConfig, StoredTuner(), prefix=""),
    TunerMethod("SHARED", SharedConfig, SharedTuner(), prefix=""),
    TunerMethod("MADE", MadeConfig, MadeTuner(), prefix=""),
)


# models ---------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers; `(..., width)` to `(..., 3)`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return out


LANGUAGE_MODEL = next(model for model in MODELS if model.is_language_model)


def narrow(**options: Any) -> NarrowConfig:
    return NarrowConfig(**{"target_modules": ["first", "second"], **options})


def stretch(**options: Any) -> StretchConfig:
    return StretchConfig(**{"target_modules": ["first"], **options})


def tint(**options: Any) -> TintConfig:
    return TintConfig(**{"target_modules": ["first", "head"], **options})


@cache
def _folder(name: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def mix(*parts: PeftConfig, **options: Any) -> MixConfig:
    """Options of a mixture of fresh adapters with these options."""
    root = Path(_folder("mix").name)
    names = []
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        adapted(part).save_pretrained(root / f"{part.peft_type}{number}")
        names.append(str(root / f"{part.peft_type}{number}"))
    return MixConfig(parts={f"p{number}": name for number, name in enumerate(names)}, **options)


def preface(kind: str = "PREFACE", **options: Any) -> PrefaceConfig:
    """Options of the prompt, or of another kind of it."""
    config = next(method.config for method in METHODS if method.peft_type == kind)
    made = config(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **options})
    assert isinstance(made, PrefaceConfig)
    return made


def adapted(config: PeftConfig | None = None, **names: PeftConfig) -> PeftModel:
    """A net with the adapter `default`, and with others by name."""
    with seeded(0):  # files say which base weights they are for
        base = Net()
    model = get_peft_model(base, config or narrow())
    for name, other in names.items():
        model.add_adapter(name, other)
    return model


def prompted(**options: Any) -> PeftModel:
    """A language model with a prompt."""
    return get_peft_model(LANGUAGE_MODEL.build(), preface(**options))


def x() -> Tensor:
    """Five inputs of the net, always the same."""
    return torch.linspace(-1, 1, 40).view(5, 8)
