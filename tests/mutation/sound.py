"""Methods that keep every promise: what the conformance kit must let pass, and what the mutants break."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pydantic

from peftc import plugin as api


class MutantConfig(api.TargetsMixin, api.ExpertsMixin, api.ModulesToSaveMixin, api.PeftConfig):
    peft_type: api.PeftType | None = api.PeftType("MUTANT")
    r: int = 2
    r_pattern: dict[str, int] = pydantic.Field(default_factory=dict)

    pattern_options: ClassVar[Mapping[str, str]] = {"r_pattern": "r"}


class Sound(api.MapTuner[MutantConfig]):
    """A low-rank update, told in three ways."""

    supports = api.LINEAR_KINDS | api.EXPERT_KINDS

    def slots(self, c: MutantConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        yield api.module_slot("mut_down", (c.r, layer.in_features))
        yield api.parameter_slot("mut_up", (layer.out_features, c.r))

    def init(self, c: MutantConfig, layer: api.LayerFacts, slots: Mapping[str, Any], init: api.SlotInit) -> None:
        init.kaiming_uniform(slots["mut_down"], 1.0)
        init.zeros(slots["mut_up"])

    def thin(self, a: api.View) -> tuple[Any, Any, float]:
        return a.mut_down, a.mut_up, a.scaling

    def branch(self, a: api.View, x: Any, y0: Any) -> Any:
        return (x @ a.mut_down.T) @ a.mut_up.T * a.scaling

    def params(self, a: api.View, p: Mapping[str, Any], p0: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**p, "weight": p["weight"] + a.scaling * (a.mut_up @ a.mut_down)}

    def of_rank(self, c: MutantConfig, rank: int) -> MutantConfig:
        return c.model_copy(update={"r": rank})

    def of_thin(self, c: MutantConfig, layer: api.LayerFacts, A: Any, B: Any) -> Mapping[str, Any]:
        return {"mut_down": A, "mut_up": B}


class SoundBranch(Sound):
    """The same without the lowering that the core prefers, so that `branch` is what runs."""

    thin = api.MapTuner.thin


class SoundScale(Sound):
    """Scales of what goes in and what comes out, told as linear maps."""

    additive = False
    thin, branch, params = api.MapTuner.thin, api.MapTuner.branch, api.MapTuner.params
    of_rank, of_thin = api.MapTuner.of_rank, api.MapTuner.of_thin

    def slots(self, c: MutantConfig, layer: api.LayerFacts) -> Iterable[api.Slot]:
        yield api.parameter_slot("mut_down", (layer.in_features,))
        yield api.parameter_slot("mut_up", (layer.out_features,))

    def init(self, c: MutantConfig, layer: api.LayerFacts, slots: Mapping[str, Any], init: api.SlotInit) -> None:
        for tensor in slots.values():
            init.ones(tensor)

    def input(self, a: api.View, x: Any) -> Any:
        return x * a.mut_down

    def output(self, a: api.View, y: Any) -> Any:
        return y * a.mut_up


class SoundParams(Sound):
    """A change of the weight, told in no other way."""

    thin, branch = api.MapTuner.thin, api.MapTuner.branch
    of_rank, of_thin = api.MapTuner.of_rank, api.MapTuner.of_thin


class MutantPromptConfig(api.PromptLearningConfig):
    peft_type: api.PeftType | None = api.PeftType("MUTANT")


class SoundPrompt(api.PromptTuner[MutantPromptConfig]):
    """Virtual tokens as they are stored."""

    def slots(self, c: MutantPromptConfig, dims: Mapping[str, int]) -> Iterable[api.Slot]:
        yield api.module_slot("rows", (c.num_virtual_tokens or 0, c.token_dim or 0))

    def init(self, c: MutantPromptConfig, slots: Mapping[str, Any], context: api.PromptContext) -> None:
        context.init.normal(slots["rows"])

    def embeds(self, c: MutantPromptConfig, a: api.PromptView) -> Any:
        return a.rows

    def restore(self, c: MutantPromptConfig, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"rows": saved["prompt_embeddings"]}


class SoundCache(SoundPrompt):
    """Virtual tokens as keys and values."""

    place = api.Place.CACHE

    def slots(self, c: MutantPromptConfig, dims: Mapping[str, int]) -> Iterable[api.Slot]:
        yield api.module_slot("rows", (c.num_virtual_tokens or 0, (c.num_layers or 0) * 2 * (c.token_dim or 0)))


class MutantAroundConfig(api.PeftConfig):
    peft_type: api.PeftType | None = api.PeftType("MUTANT")


class SoundAround(api.ModuleTuner[MutantAroundConfig]):
    """A shift of what a module puts out, in proportion to a gate that starts at zero."""

    def sites(self, c: MutantAroundConfig, graph: api.ModuleGraph) -> Mapping[str, str]:
        return {n.path: "here" for n in graph.nodes if n.name == "lin1" or n.path.endswith("0.self_attn")}

    def slots(self, c: MutantAroundConfig, node: api.ModuleNode, graph: api.ModuleGraph) -> Iterable[api.Slot]:
        width = node.facts.out_features or graph.model.dims["hidden_size"]
        yield api.Slot("mut_shift", (width,), api.Container.MODULE, "weight", named=False)
        yield api.parameter_slot("mut_gate", (1,), named=False)

    def init(self, c: MutantAroundConfig, slots: Mapping[str, Any], init: api.SlotInit) -> None:
        init.normal(slots["mut_shift"])
        init.zeros(slots["mut_gate"])

    def forward(self, a: api.ModuleView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        y = a.module(*args, **kwargs)
        first = y[0] if isinstance(y, tuple) else y
        shifted = (first + self.shift(a, first)).to(first.dtype)
        return (shifted, *y[1:]) if isinstance(y, tuple) else shifted

    def shift(self, a: api.ModuleView, y: Any) -> Any:
        return a.mut_gate * a.mut_shift


def record(tuner: api.MapTuner[Any], **changes: Any) -> api.TunerMethod:
    """The record of a method on layers."""
    sound = api.TunerMethod("MUTANT", MutantConfig, tuner, prefix="mut_", layer_names=("mut_down", "mut_up"))
    return replace(sound, **changes)


SOUND = record(Sound())
SOUND_BRANCH = record(SoundBranch())
SOUND_SCALE = record(SoundScale())
SOUND_PARAMS = record(SoundParams())
SOUND_PROMPT = api.TunerMethod(
    "MUTANT",
    MutantPromptConfig,
    SoundPrompt(),
    prefix="mut_",
    examples=({"num_virtual_tokens": 3},),
    identity_at_start=lambda c: False,
)
SOUND_AROUND = api.TunerMethod(
    "MUTANT", MutantAroundConfig, SoundAround(), prefix="mut_", layer_names=("mut_shift", "mut_gate")
)

SOUND_CACHE = replace(SOUND_PROMPT, tuner=SoundCache())

SOUND_METHODS: dict[str, api.TunerMethod] = {
    "sound": SOUND,
    "sound_branch": SOUND_BRANCH,
    "sound_scale": SOUND_SCALE,
    "sound_params": SOUND_PARAMS,
    "sound_prompt": SOUND_PROMPT,
    "sound_around": SOUND_AROUND,
    "sound_cache": SOUND_CACHE,
}
