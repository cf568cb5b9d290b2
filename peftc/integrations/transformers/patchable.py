"""Whether, and how, the files of a base can be patched with an adapter without building the model; above the torch line where it
can be.

Where transformers reads the files into other tensors than they hold, `NeedsModel` says why the model is built instead.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from peftc.checkpoint.load import AdapterFile, open_adapter
from peftc.checkpoint.patched import Patch, patch_of
from peftc.checkpoint.shards import Shards, open_shards
from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.config.base import PeftConfig
from peftc.config.files import read_config
from peftc.graph.base_ref import BaseRef
from peftc.graph.cache import GraphCache, key_of
from peftc.graph.locate import LocatedBase, folder_of, locate
from peftc.graph.nodes import ModuleGraph
from peftc.graph.quantised import packed_config
from peftc.graph.tensors import TRAINABLE, TensorFacts
from peftc.integrations.transformers.graph import graph_of, meta_model
from peftc.registry.manager import default_registry
from peftc.registry.starts import known_start

#: What the adapter is called while it is merged.
NAME = "default"
#: Builds a graph and keeps it. scipy, which transformers imports where there is one, takes 40 MB and is asked for by no graph.
_BUILD = """
import json, sys
sys.modules["scipy"] = None
from peftc.graph.base_ref import BaseRef
from peftc.integrations.transformers.graph import graph_of
graph_of(BaseRef(**json.loads(sys.argv[1])))
"""


class NeedsModel(Exception):
    """The files cannot be patched; the message says why, in a clause."""


@dataclass(frozen=True)
class Job:
    """A merge that can be done: `given` are the tensors that are not copied, by their names in the files, `touched` those of
    the model that may change.

    `twins` are a weight's two names where input and output embeddings are one tensor and something becomes of it; `parts`
    says that they are to be two.
    """

    adapter: str | Path
    config: PeftConfig
    shards: Shards
    graph: ModuleGraph
    plan: AdapterPlan
    given: Mapping[str, TensorFacts]
    touched: tuple[str, ...]
    twins: tuple[str, ...]
    parts: bool
    untie: bool
    dtype: str | None

    @cached_property
    def patches(self) -> Mapping[str, Patch]:
        """What is written, by name of the file. What is new goes into the file of the weight that it was one with, or the last."""
        last = list(self.shards.files)[-1]
        twin = next((self.shards.home[name] for name in self.twins if name in self.shards.home), last)
        homes = {key: self.shards.home.get(key, twin) for key in self.given}
        return {
            name: patch_of(file, {key: facts for key, facts in self.given.items() if homes[key] == name})
            for name, file in self.shards.files.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(patch.size for patch in self.patches.values())


def job_for(adapter: str | Path, ref: BaseRef, untie: bool = False) -> Job:
    """The merge of an adapter into a base, planned. Raises `NeedsModel`, and `PeftcError` for an adapter that does not fit the
    base or changes no weights."""
    located = locate(ref)
    shards = _shards_of(located)
    graph = _graph(ref, located)
    _require_class(located, graph)
    job = job_on(adapter, graph, shards, untie=untie, dtype=ref.dtype)
    facts = dict(graph.parameters())
    stacked = [name for name in job.touched if name in facts and len(facts[name].shape) == 3]
    if stacked:
        from peftc.host.fused import is_converted

        model = meta_model(located)
        for name in stacked:
            if is_converted(model, name):
                raise NeedsModel(f"`{name}` is stored in another form")
    return job


def job_on(
    adapter: str | Path, graph: ModuleGraph, shards: Shards, *, untie: bool = False, dtype: str | None = None
) -> Job:
    """The same for a base of this graph whose files hold tensors as the model has them, or under other names."""
    config = read_config(adapter)
    file = open_adapter(adapter)
    plan = _plan(graph, config)
    names = _Names(graph, shards)
    brought = {_full(save.path, tail) for save in plan.saves for tail, _ in (*save.tensors, *save.buffers)}
    names.require_all(brought)
    touched = dict.fromkeys([*_changed_by(plan, graph), *_carried(graph, file)])
    twins = names.twins(touched, untie)
    touched |= dict.fromkeys(twins)
    parts = bool(twins) and (untie or not set(twins).isdisjoint(brought))
    given = names.given(touched, brought, twins if parts else ())
    return Job(adapter, config, shards, graph, plan, given, tuple(touched), twins, parts, untie, dtype)


# whether ------------------------------------------------------------------------------------------------------------------


def _shards_of(located: LocatedBase) -> Shards:
    if located.gguf is not None:
        raise NeedsModel("the base is a GGUF file")
    if packed_config(located) is not None or located.ref.quantization is not None:
        raise NeedsModel("the base is quantised")
    folder = folder_of(located)
    shards = None if folder is None else open_shards(folder)
    if shards is None:
        raise NeedsModel("the base's weights are not in a folder here as safetensors")
    return shards


def _graph(ref: BaseRef, located: LocatedBase) -> ModuleGraph:
    """The base's graph. One that is not kept yet is made by a process of its own, if this one has not loaded what that takes: it
    would stay in memory for the whole merge."""
    if "transformers" not in sys.modules and GraphCache().get(key_of(located)) is None:
        words = {option.name: getattr(ref, option.name) for option in fields(ref)}
        argv = [sys.executable, "-c", _BUILD, json.dumps(words)]
        subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return graph_of(ref)  # which says what went wrong, if anything did


def _require_class(located: LocatedBase, graph: ModuleGraph) -> None:
    named = (located.config or {}).get("architectures")
    if not isinstance(named, list) or named[:1] != [graph.model.cls]:
        told = f"`{named[0]}`" if isinstance(named, list) and named else "no class"
        raise NeedsModel(f"the base's files are of {told}, and the adapter's model is a `{graph.model.cls}`")


def _plan(graph: ModuleGraph, config: PeftConfig) -> AdapterPlan:
    compiled = compile_plan(graph, {NAME: config}, loading=True)
    plans = compiled.adapters
    if any(plan.prompt is not None or plan.modules or plan.call is not None for plan in plans):
        from peftc.runtime.session.together import refuse_around

        refuse_around(plans)
    (plan,) = plans
    start = known_start(default_registry().method_of(plan.config), plan.config)
    if start is not None and start.start.changes_base:
        raise NeedsModel("the adapter's start changed the base's weights")
    if compiled.graph is not None and compiled.graph.replication is not None:
        raise NeedsModel("the adapter replicates layers")
    if any(site.inside or site.tied for site in plan.maps):
        raise NeedsModel("the adapter trains rows of embeddings beside layers, or uses of one weight together")
    if any(save.tied for save in plan.saves) or any(train.copies for train in plan.trains):
        raise NeedsModel("the adapter trains weights that are one")
    return plan


def _changed_by(plan: AdapterPlan, graph: ModuleGraph) -> Iterator[str]:
    """Names of all base tensors that the adapter may change."""
    for site in plan.maps:
        names = [site.parameter] if site.parameter else graph.by_path[site.path].facts.params
        yield from (_full(site.path, name) for name in names)
    yield from (_full(site.path, site.name) for site in plan.trains)
    yield from (_full(save.path, tail) for save in plan.saves for tail, _ in (*save.tensors, *save.buffers))


def _full(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _carried(graph: ModuleGraph, file: AdapterFile) -> list[str]:
    """Names of embeddings that the adapter's file brings along. Raises `NeedsModel` if they are of another vocabulary."""
    found = []
    for path in dict.fromkeys((graph.model.input_embeddings, graph.model.output_embeddings)):
        for name, facts in graph.by_path[path].facts.params.items() if path else ():
            ends = (f".{path}.{name}", f".{path}.base_layer.{name}")
            brought = [told for key, told in file.tensors.items() if key.endswith(ends)]
            if any(told.shape != facts.shape for told in brought):
                raise NeedsModel("the adapter brings a vocabulary of another size")
            found += [_full(path or "", name)] if brought else []
    return found


class _Names:
    """How the names of a model's tensors stand to those in its files."""

    def __init__(self, graph: ModuleGraph, shards: Shards) -> None:
        self._graph, self._stored = graph, shards
        self._groups = {name: group for group in graph.ties for name in group}
        self._facts = {
            _full(node.path, name): facts
            for node in graph.nodes
            for name, facts in (*node.facts.params.items(), *node.facts.buffers.items())
        }

    def require_all(self, brought: set[str]) -> None:
        """Raise `NeedsModel` unless every parameter is in the files as the model has it, or is not looked for there: it is
        `brought` by the adapter, or was stored under other names."""
        stored = self._stored.tensors
        for name, facts in self._graph.parameters():
            found = next((twin for twin in self._groups.get(name, (name,)) if twin in stored), None)
            former = self._was_other(name)
            if found is None and not former and name not in brought:
                raise NeedsModel(f"`{name}` is not in the base's files under this name")
            if found is not None and stored[found].shape != facts.shape and not former:
                raise NeedsModel(f"`{name}` has another shape in the base's files")

    def twins(self, touched: Mapping[str, object], untie: bool) -> tuple[str, ...]:
        """The names of embeddings that are one tensor of which something becomes. Raises `NeedsModel` for other ties."""
        model = self._graph.model
        ends = {f"{path}.weight" for path in (model.input_embeddings, model.output_embeddings) if path is not None}
        found: tuple[str, ...] = ()
        for group in self._graph.ties:
            if set(group) == ends and (untie or not touched.keys().isdisjoint(group)):
                found = group
            elif not touched.keys().isdisjoint(group):
                raise NeedsModel(f"`{group[0]}` is one tensor with others than embeddings")
            stored = [name for name in group if name in self._stored.tensors]
            if any(not self._stored.equal(stored[0], other) for other in stored[1:]):
                raise NeedsModel(f"`{group[0]}` and `{group[1]}` should be one tensor, and differ in the base's files")
        if untie and not found and self._graph.ties:
            raise NeedsModel("more is one tensor than its embeddings")
        return found

    def given(
        self, touched: Mapping[str, object], brought: Collection[str], twins: Collection[str]
    ) -> dict[str, TensorFacts]:
        """Tensors that are not copied, as they will be in the files: those that may change, and those that the model has in
        another number format than the files. New ones are `brought` by the adapter, or `twins` that are to be two."""
        stored, found = self._stored.tensors, {}
        for name in touched:
            if name in stored or name in twins or (name in brought and not self._was_other(name)):
                found[name] = self._facts[name]
            elif name not in self._groups:  # else its twin stands for it
                raise NeedsModel(f"`{name}` is not in the base's files under this name")
        recast = {name for name, facts in stored.items() if self._is_recast(name, facts)}
        if recast and not stored.keys() <= self._facts.keys():
            raise NeedsModel(
                "the base's files have other tensors than the model, and another number format is asked for"
            )
        return found | {name: self._facts[name] for name in stored if name in recast}

    def _was_other(self, name: str) -> bool:
        """Whether checkpoints had a parameter under other names."""
        path, _, own = name.rpartition(".")
        return any(was.parameter == own for was in self._graph.former_names.of(path))

    def _is_recast(self, name: str, facts: TensorFacts) -> bool:
        now = self._facts.get(name)
        return now is not None and now.dtype != facts.dtype and {now.dtype, facts.dtype} <= TRAINABLE
