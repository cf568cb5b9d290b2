"""Graphs made by hand and a method with every shared option, for tests of the compiler that need neither torch nor a real method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from peftc import plugin as api
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.plan import InjectionPlan
from peftc.graph.nodes import LayerFacts, ModelFacts, ModuleGraph, ModuleNode, Role, block_of
from peftc.graph.targets import default_targets
from peftc.graph.tensors import TensorFacts
from peftc.registry.manager import Registry, default_registry
from tests.unit.fakes import plugin

# graphs ---------------------------------------------------------------------------------------------------------------


def facts(kind: api.Kind, cls: str, *sizes: int, bias: bool = False, dtype: str = "float32", **more: Any) -> LayerFacts:
    """A layer that maps `sizes[0]` to `sizes[1]`."""
    shape = sizes if kind in (api.Kind.EMBEDDING, api.Kind.CONV1D_TRANSPOSED) else sizes[::-1]
    if kind is api.Kind.NORM:
        shape = sizes[:1]
    params = [("weight", TensorFacts(shape, dtype))]
    params += [("bias", TensorFacts((sizes[-1],), dtype))] if bias else []
    return LayerFacts(kind, cls, *sizes, params=tuple(params), **more)


def linear(in_features: int, out_features: int, **more: Any) -> LayerFacts:
    return facts(api.Kind.LINEAR, "Linear", in_features, out_features, **more)


@cache
def container(cls: str, *params: tuple[str, TensorFacts]) -> LayerFacts:
    """A module that is no layer, with parameters of its own."""
    return LayerFacts(api.Kind.OTHER, cls, params=params)


ROLES = {
    "q_proj": Role.Q, "v_proj": Role.V, "up_proj": Role.UP, "down_proj": Role.DOWN, "lm_head": Role.HEAD,
    "gate": Role.ROUTER, "experts": Role.EXPERT, "embed_tokens": Role.EMBEDDING, "vision": Role.TOWER,
}  # fmt: skip


def graph_of(modules: Mapping[str, LayerFacts], ties: Iterable[tuple[str, ...]] = (), **model: Any) -> ModuleGraph:
    """A graph of these modules; those that contain them are added."""
    nodes: dict[str, LayerFacts] = {"": container("Model")}
    for path, layer in modules.items():
        parts = path.split(".")
        for length in range(1, len(parts)):
            parent = ".".join(parts[:length])
            below = parts[length].isdigit()
            nodes.setdefault(parent, container("ModuleList" if below else parts[length - 1].title()))
        nodes[path] = layer
    listed = tuple(ModuleNode(p, f, ROLES.get(p.rpartition(".")[2]), block_of(p)) for p, f in nodes.items())
    return ModuleGraph(ModelFacts(**{"cls": "Decoder", "model_type": "decoder", **model}), listed, tuple(ties))


def decoder(
    layers: int = 3, width: int = 8, tied: bool = False, bias: bool = False, dtype: str = "float32"
) -> ModuleGraph:
    """A small language model: attention with q and v, a feed-forward part with up and down."""
    q, up, down = (linear(*sizes, bias=bias, dtype=dtype) for sizes in ((width, width), (width, 32), (32, width)))
    norm = facts(api.Kind.NORM, "RMSNorm", width, dtype=dtype)
    modules: dict[str, LayerFacts] = {
        "model.embed_tokens": facts(api.Kind.EMBEDDING, "Embedding", 20, width, dtype=dtype)
    }
    for i in range(layers):
        block = f"model.layers.{i}"
        modules |= {f"{block}.self_attn.q_proj": q, f"{block}.self_attn.v_proj": q, f"{block}.mlp.up_proj": up}
        modules |= {f"{block}.mlp.down_proj": down, f"{block}.norm": norm}
    modules |= {"model.norm": norm, "lm_head": linear(width, 20, dtype=dtype)}
    ties = [("model.embed_tokens.weight", "lm_head.weight")] if tied else []
    return graph_of(
        modules,
        ties,
        name_or_path="some/decoder",
        input_embeddings="model.embed_tokens",
        output_embeddings="lm_head",
        dims={"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2},
    )


def and_modules(graph: ModuleGraph, modules: Mapping[str, LayerFacts], **model: Any) -> ModuleGraph:
    """The graph with more modules, and facts of the model changed."""
    own = {node.path: node.facts for node in graph.nodes if node.path}
    bigger = graph_of({**own, **modules}, graph.ties)
    return replace(bigger, model=replace(graph.model, **model))


def experts(width: int = 8) -> dict[str, LayerFacts]:
    """A router as a layer, a shared expert, and routed experts as one parameter."""
    return {
        "model.layers.0.mlp.gate": linear(width, 4),
        "model.layers.0.mlp.experts": container("Experts", ("up", TensorFacts((4, 32, width), "float32"))),
    }


# a method -------------------------------------------------------------------------------------------------------------


class SampleConfig(api.TargetsMixin, api.LayersMixin, api.RankMixin, api.ModulesToSaveMixin, api.PeftConfig):
    """Every option that the compiler has a pass for."""

    peft_type: api.PeftType | None = api.PeftType("SAMPLE")
    alpha: int = 1
    fan_in_fan_out: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int] = {}
    fail: str = ""

    pattern_options: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}


class SampleTuner(api.MapTuner[SampleConfig]):
    """Two factors; `fail` says which of its functions raises or declares nonsense."""

    supports = api.LINEAR_KINDS | {api.Kind.EMBEDDING}
    asked = 0

    def slots(self, c: SampleConfig, layer: LayerFacts) -> Iterable[api.Slot]:
        type(self).asked += 1
        if c.fail == "slots":
            raise ZeroDivisionError("no slots today")
        yield api.module_slot("sample_A", (c.r, layer.in_features))
        while c.fail == "endless":
            yield api.module_slot("sample_A", (c.r, layer.in_features))
        if c.fail in ("float", "text"):
            yield api.parameter_slot("sample_B", (8, 2.5)) if c.fail == "float" else "sample_B"  # type: ignore[arg-type, misc]
        if c.fail == "whole numbers":
            yield replace(api.parameter_slot("sample_B", (8, c.r)), dtype="int64")
            return
        yield api.parameter_slot(
            "other" if c.fail == "prefix" else "sample_B", (layer.out_features, 0 if c.fail == "shape" else c.r)
        )

    def init(self, c: SampleConfig, layer: LayerFacts, slots: Mapping[str, Any], init: Any) -> None:
        raise NotImplementedError

    def check(self, c: SampleConfig, layer: LayerFacts, path: str) -> Iterable[api.Diagnostic]:
        if c.r > layer.out_features:
            yield api.rules.RANK_BEYOND_LAYER(f"rank {c.r} at `{path}`", fix="less", where=path)
        if c.fail == "blocks":
            yield api.rules.BLOCKS_ADJUSTED(f"blocks of 4 at `{path}`", fix="another size", where=path)

    def branch(self, a: api.View, x: Any, y0: Any) -> Any:
        raise NotImplementedError


class PromptConfig(api.PromptLearningConfig):
    """A prompt without options."""

    peft_type: api.PeftType | None = api.PeftType("SAMPLE_PROMPT")


class SamplePrompt(api.PromptTuner[PromptConfig]):
    """One table."""

    def slots(self, c: PromptConfig, dims: Mapping[str, int]) -> Iterable[api.Slot]:
        rows = (c.num_virtual_tokens or 0) * (c.num_transformer_submodules or 1)
        yield api.module_slot("embedding", (rows, c.token_dim or 0))

    def init(self, c: PromptConfig, slots: Mapping[str, Any], context: Any) -> None:
        raise NotImplementedError

    def embeds(self, c: PromptConfig, a: Any) -> Any:
        raise NotImplementedError

    def restore(self, c: PromptConfig, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        raise NotImplementedError


def check(c: SampleConfig) -> Iterable[api.Diagnostic]:
    if c.fail == "check":
        raise KeyError("no check today")
    return ()


def table() -> str:
    """A table of default targets that means q and v in the model type `llama`."""
    methods = [default_registry().get(name) for name in default_registry().names]
    named = sorted({m.default_targets["target_modules"] for m in methods if m.default_targets})
    return next(name for name in named if default_targets(name, "llama") == ["q_proj", "v_proj"])


def registry(tuner: Any = None) -> Registry:
    """A registry with the two sample methods."""
    made = Registry((), blocked=frozenset())
    sample = api.TunerMethod(
        "SAMPLE", SampleConfig, tuner or SampleTuner(), prefix="sample_", layer_names=("sample_A",), check=check,
        default_targets={"target_modules": table()},
    )  # fmt: skip
    made.register(plugin(sample), "sample")
    made.register(plugin(api.TunerMethod("SAMPLE_PROMPT", PromptConfig, SamplePrompt(), prefix="")), "sample_prompt")
    return made


def planned(graph: ModuleGraph | None = None, options: Mapping[str, Any] | None = None, **config: Any) -> InjectionPlan:
    """The plan of one sample adapter, `default`; `options` go to the compiler."""
    return compile_plan(
        graph or decoder(), {"default": SampleConfig(**config)}, **{"registry": registry(), **(options or {})}
    )


def paths(plan: InjectionPlan) -> list[str]:
    return [site.path for site in plan.adapters[0].maps]


def codes(plan: InjectionPlan) -> list[str]:
    return [warning.code for warning in plan.warnings]
