"""What tables of default targets mean in roles: for types that they know, the default by role is the table's entry.

Those that are not are listed with the reason, and each of them must differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import peftc
from benchmarks.sweep.models import model_types, small_model
from peftc.compiler.match import matches
from peftc.compiler.passes.by_role import find_by_role, written
from peftc.graph.nodes import ModuleGraph
from peftc.graph.targets import all_defaults, known_model_types, table_roles
from peftc.registry.manager import default_registry
from peftc.runtime.applying.snapshot import snapshot

MORE = "the entry has more than attention's query and value"
QUERY = "the entry has queries where the method's paper has keys (one of them keys and queries)"
OUTPUT = "the entry's name means attention's output as well"
GATED = "the entry has the layer before the last of the feed-forward part"
EMBEDDED = "the norm of the embeddings has the role, but not the entry"
FEWER = "the entry has some of the norms of a block"
SENSES = "the entry has parts beside the language model"
PLAIN = "the entry leaves out linear layers of a block"
OTHER = "the entry has a layer of the feed-forward part instead of attention's"
NO_ATTENTION = "the model has no attention"

_ALL_ATTENTION = dict.fromkeys(("bart", "deberta-v2", "mt5", "nemotron_h", "opt", "t5"), MORE)
_JOINT = dict.fromkeys(("gpt2", "gpt_bigcode"), OTHER)

#: Table -> types that it knows for which the default by role is another one.
EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "lora": {"nemotron_h": MORE, "phi": MORE, "rwkv": NO_ATTENTION},
    "adalora": {**_ALL_ATTENTION, "roberta": MORE},
    "vblora": _ALL_ATTENTION,
    "waveft": {**_JOINT, "nemotron_h": MORE, "phi": MORE},
    "beft": {},
    "ia3": {
        **dict.fromkeys(("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama4", "opt", "phi"), QUERY),
        **dict.fromkeys(("qwen2", "qwen3"), QUERY),
        **dict.fromkeys(("bert", "deberta", "deberta-v2", "roberta"), OUTPUT),
        "mt5": GATED,
    },
    "ia3_feedforward": {**dict.fromkeys(("bert", "deberta", "deberta-v2", "roberta"), OUTPUT), "mt5": GATED},
    "lntuning": {
        **dict.fromkeys(("bart", "bloom"), EMBEDDED),
        **dict.fromkeys(("qwen2", "qwen3"), FEWER),
        **dict.fromkeys(("blip-2", "llava"), SENSES),
    },
    "osf": dict.fromkeys(("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "phi"), PLAIN),
}
#: The same for tables that are LoRA's but for single types.
LIKE_LORA: Mapping[str, Mapping[str, str]] = {"c3a": _JOINT, "fourierft": _JOINT}
_METHODS = [default_registry().get(name) for name in default_registry().names]
TABLES = {table for method in _METHODS for table in method.default_targets.values()}
KNOWN = frozenset(model_types())


@cache
def graph_of(model_type: str) -> ModuleGraph:
    model = small_model(model_type)
    assert model is not None
    return snapshot(model)


def meant(targets: Iterable[str] | str, graph: ModuleGraph) -> set[str]:
    entries = targets if isinstance(targets, str) else set(targets)
    return {node.path for node in graph.nodes if node.path and matches(entries, node.path)}


def exceptions(table: str) -> Mapping[str, str]:
    if table in EXCEPTIONS:
        return EXCEPTIONS[table]
    entries, original = all_defaults(table), all_defaults("lora")
    alike = {kind: reason for kind, reason in EXCEPTIONS["lora"].items() if entries[kind] == original[kind]}
    return {**alike, **LIKE_LORA.get(table, {})}


@pytest.mark.parametrize("table", sorted({*TABLES, *EXCEPTIONS, *LIKE_LORA}))
def test_the_default_by_role_is_the_entry_of_the_table(table: str) -> None:
    entries = all_defaults(table)
    differ = set()
    for kind in KNOWN.intersection(known_model_types(table)):
        graph = graph_of(kind)
        found = find_by_role(graph, table_roles(table))
        if found is None or found.paths != meant(entries[kind], graph):
            differ.add(kind)
    assert differ == KNOWN.intersection(exceptions(table))


@pytest.mark.parametrize("kind", ["olmo2", "llava", "whisper", "modernbert", "clip", "deepseek_v3", "bridgetower"])
def test_targets_by_role_mean_exactly_what_was_found(kind: str) -> None:
    graph = graph_of(kind)
    found = find_by_role(graph, table_roles("ia3"))
    assert found is not None
    assert meant(written(found.paths, graph), graph) == found.paths
    assert meant(written(found.paths, graph, numbered=True), graph) == found.paths


@pytest.mark.parametrize("peft_type", ["LORA", "IA3"])
def test_the_reference_reads_what_is_saved_and_adapts_the_same(peft_type: str) -> None:
    """The model has a vision tower whose layers are called like those of the language model."""
    config = CONFIG_MAPPING["llava"]()
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = 2

    def build() -> torch.nn.Module:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)

    method = default_registry().get(peft_type)
    ours = peftc.get_peft_model(build(), method.config())
    saved = ours.peft_config["default"].to_dict()
    options = {name: saved[name] for name in ("target_modules", "feedforward_modules") if name in saved}
    theirs = peft.get_peft_model(build(), peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**options))
    names = [{n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert names[0] == names[1]
    assert names[0] and all(".language_model." in name for name in names[0])
