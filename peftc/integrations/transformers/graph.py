"""The module graph of a base model before any weight is loaded: from the cache, or built on the meta device from its config.

Importing this file is free, and a cached graph needs neither torch nor transformers: both are imported only to build.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peftc import rules
from peftc.config.quantize import method_of
from peftc.diagnostics import PeftcError, Where
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import GraphCache, key_of
from peftc.graph.locate import LocatedBase, locate
from peftc.graph.nodes import ModuleGraph
from peftc.graph.quantised import STEADY, quantization_of
from peftc.limits import MAX_MODULES
from peftc.registry.storages import default_storages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def graph_of(base: BaseRef, cache: GraphCache | None = None) -> ModuleGraph:
    """The graph that the base will have when it is loaded, named as `base` names it.

    Raises `PeftcError` when the base is not on this machine (nothing is downloaded) or transformers cannot build it.
    """
    located = locate(base)
    packed = quantization_of(located)
    label = f"{base.name or 'config'} {base.task_type or ''} {base.dtype or ''}".strip()
    if packed is None or method_of(packed) in STEADY:
        key = key_of(located, () if packed is None else default_storages().names)
        graph = (cache or GraphCache()).get_or_build(key, label, lambda: _unnamed(build_graph(located)))
    else:  # which layers there are also depends on the devices here
        graph = build_graph(located)
    return replace(graph, model=replace(graph.model, name_or_path=base.name))


def _unnamed(graph: ModuleGraph) -> ModuleGraph:
    """Without the folder that its config was read from, so that the file is the same however often it is made."""
    return replace(graph, model=replace(graph.model, name_or_path=None))


def build_graph(base: LocatedBase) -> ModuleGraph:
    """Build the model on the meta device and look at it. Raises `PeftcError`."""
    from peftc.runtime.applying.snapshot import snapshot

    return snapshot(meta_model(base))


def meta_model(base: LocatedBase) -> PreTrainedModel:
    """The model without storage: shapes, dtypes and ties as they will be when it is loaded. Raises `PeftcError`."""
    import torch

    from peftc.host.torch_modules import counted_modules
    from peftc.integrations.transformers.architecture import FAILURES, architecture_of, quiet, unbuildable
    from peftc.integrations.transformers.dtypes import dtype_of, keep_some_in_float32
    from peftc.integrations.transformers.quantising import quantised_meta_model

    with quiet():
        found = architecture_of(base)
        dtype, packed = dtype_of(base, found.config), quantization_of(base)

        def build(dtype: torch.dtype) -> PreTrainedModel:
            with torch.device("meta"), counted_modules(MAX_MODULES, lambda: _too_many(base)):
                made: PreTrainedModel = found.cls._from_config(found.config, dtype=dtype)
            if base.has_weights:
                keep_some_in_float32(made, dtype)
            return made

        try:
            return build(dtype) if packed is None else quantised_meta_model(base, packed, dtype, build)
        except PeftcError:
            raise
        except FAILURES as error:
            raise PeftcError(unbuildable(base, error)) from error


def _too_many(base: LocatedBase) -> PeftcError:
    what = f"The model has more than {MAX_MODULES:,} modules"
    fix = "Correct the numbers of layers and of what is in them in the config."
    return PeftcError(rules.BASE_TOO_LARGE(what, fix=fix, where=Where(file=base.ref.name)))
