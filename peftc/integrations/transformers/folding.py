"""The part of a merge by files that computes: an adapter loaded for a base that is not built, and folded into one layer after the
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftc.checkpoint.patched import Patching
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import PeftcError, Severity, warn
from peftc.integrations.transformers.asked import refuse_other_base
from peftc.integrations.transformers.by_rows import Rows, by_rows
from peftc.integrations.transformers.patchable import NAME, Job, NeedsModel
from peftc.model.parts import identity
from peftc.model.parts.loading import Loadable, LoadOptions, loadable, opened
from peftc.registry.manager import default_registry
from peftc.runtime.applying.apply import session_of
from peftc.runtime.applying.bare import Folder, bare_model
from peftc.runtime.session.ties import copied_by, lost_by_ties, parted_for_good
from peftc.runtime.slots.filling import torch_dtype


@dataclass(frozen=True)
class Merged:
    """What came of it: parameters of the model, how many of its tensors changed, and the number format of the first."""

    parameters: int
    changed: int
    dtype: str


class Folding:
    """One merge: `out` takes the tensors that it comes to."""

    def __init__(self, job: Job, out: Patching, any_base: bool) -> None:
        self._job, self._out = job, out
        self._dtypes = {
            f"{node.path}.{name}" if node.path else name: torch_dtype(facts.dtype)
            for node in job.graph.nodes
            for name, facts in (*node.facts.params.items(), *node.facts.buffers.items())
        }
        self._model = bare_model(job.graph)
        self._loaded = self._load(any_base)
        #: what the adapter's file holds whole, by the name in the base -> its key there
        self._whole = dict(self._brought())
        self._twins: dict[str, Tensor] = {}
        self._changed = 0
        #: whether embeddings that were one tensor are two now
        self.parted = False

    def run(self) -> Merged:
        """Do it. Raises `PeftcError`: an adapter that cannot be merged or comes to NaN, embeddings that would part; and
        `NeedsModel`."""
        plan = self._loaded.adapter
        done: set[str] = set()
        folder = Folder(NAME, plan.config, self._job.graph, default_registry(), self._loaded.source)
        with by_rows(self._job.shards, self._out) as rows:
            for path, sites in _by_path(plan).items():
                names = [site.parameter for site in sites if site.parameter]
                names = names or list(self._job.graph.by_path[path].facts.params)
                self._fold(path, names, sites, folder, rows)
                done.update(_full(path, name) for name in names)
        for name in (*self._job.touched, *self._job.given):
            if name not in done and (name in self._job.given or name in self._job.twins):
                done.add(name)
                self._put(name, self._now(name), name in self._whole)
        self._put_twins(plan)
        facts = dict(self._job.graph.parameters())
        own = facts[self._job.twins[0]].numel if self.parted or (self._job.twins and self._job.untie) else 0
        return Merged(self._job.graph.numel + own, self._changed, next(iter(facts.values())).dtype)

    def _fold(self, path: str, names: Sequence[str], sites: Sequence[MapSite], folder: Folder, rows: Rows) -> None:
        """What becomes of one layer, of whose parameters these may change."""
        if self._is_as_stored(_full(path, "weight")):
            facts = self._job.graph.by_path[path].facts.params
            empty = {name: torch.empty(one.shape, dtype=torch_dtype(one.dtype)) for name, one in facts.items()}
            found = folder.sums(sites, empty)
            if found is not None:
                rows.change(_full(path, "weight"), *found)
                self._changed += 1
                for name in names:
                    if name != "weight":
                        self._put(_full(path, name), self._now(_full(path, name)), False)
                return
        tensors = {name: self._now(_full(path, name)) for name in names}
        changed = folder.folded(sites, tensors)
        if not changed.keys() <= tensors.keys():
            raise NeedsModel(f"`{path}` gets a bias that it had not")
        for name in names:
            was, now = tensors.pop(name), changed.pop(name, None)
            self._put(_full(path, name), was if now is None else now, now is not None)
            del was, now  # not to be there beside the next layer's

    def _is_as_stored(self, name: str) -> bool:
        """Whether a tensor is made from the one of its name in the files, in the same number format."""
        stored = self._job.shards.tensors.get(name)
        if stored is None or name not in self._job.given or name in self._whole or name in self._job.twins:
            return False
        return torch_dtype(stored.dtype) is self._dtypes[name]

    def _load(self, any_base: bool) -> Loadable:
        job = self._job
        config, file = opened(job.adapter, None, LoadOptions())
        found = loadable(self._model, NAME, config, file, LoadOptions())
        name = config.base_model_name_or_path
        other = identity.told_of(self._weight, file.folder, name, None if any_base else Severity.ERROR)
        if any_base:
            warn(other)
        else:
            refuse_other_base(other)
        return found

    def _brought(self) -> Iterator[tuple[str, str]]:
        """Parameters of the base that the adapter's file has whole, each with its key: trained, or only carried along."""
        plan, find = self._loaded.adapter, self._loaded.report.sources
        keys = [p.name for p in replace(plan, maps=(), modules=(), saves=()).parameters()] if plan.trains else []
        found = [(_full(site.path, site.name), key) for key, site in zip(keys, plan.trains, strict=True)]
        for save in plan.saves:
            for tail, _ in (*save.tensors, *save.buffers):
                found.append((_full(save.path, tail), f"{plan.root}{save.path}.{tail}"))
        session = session_of(self._model)
        assert session is not None
        for carried in session.base.vocabulary(plan):
            found.append((_full(carried.path, carried.disk.rpartition(".")[2]), carried.disk))
        yield from ((name, key) for name, key in found if key in find)

    def _stored(self, name: str) -> Tensor | None:
        """A tensor of the base, in the number format that the model has it in; None if the files have none."""
        names = (name, *(self._job.twins if name in self._job.twins else ()))
        key = next((key for key in names if key in self._job.shards.tensors), None)
        return None if key is None else self._job.shards.tensor(key).to(self._dtypes[name])

    def _weight(self, name: str) -> Tensor | None:
        """The same for comparing with what an adapter's file says of its base."""
        tensor = self._stored(name) if name in self._job.shards.tensors and name in self._dtypes else None
        counts = tensor is not None and tensor.is_floating_point() and tensor.numel() > 1 and tensor.dim() > 1
        return tensor if counts else None

    def _now(self, name: str) -> Tensor:
        """A tensor of the base with what the adapter has in its place, before anything is folded in."""
        key = self._whole.get(name)
        found = None if key is None else self._loaded.source(key)
        tensor = self._stored(name) if found is None else found.to(self._dtypes[name])
        if tensor is None:
            raise NeedsModel(f"`{name}` is neither in the base's files nor in the adapter's")
        return tensor

    def _put(self, name: str, tensor: Tensor, changed: bool) -> None:
        self._changed += changed
        if name in self._job.twins:
            self._twins[name] = tensor
        else:
            self._out.put(name, _content(tensor))

    def _put_twins(self, plan: AdapterPlan) -> None:
        """What becomes of embeddings that were one tensor. Raises `PeftcError` if they would differ and may not."""
        job = self._job
        if not job.twins:
            return
        first, second = (self._twins[name] for name in job.twins)
        if not torch.equal(first, second) and not job.untie:
            if not copied_by([plan], job.twins):
                raise PeftcError(lost_by_ties([job.twins]))
            self.parted = True
            warn([parted_for_good([job.twins])])
        for name in job.twins:
            if name in job.given:
                self._out.put(name, _content(self._twins[name]))


def _by_path(plan: AdapterPlan) -> Mapping[str, list[MapSite]]:
    """An adapter's sites by layer, in the order of the plan."""
    found: dict[str, list[MapSite]] = {}
    for site in plan.maps:
        found.setdefault(site.path, []).append(site)
    return found


def _full(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _content(tensor: Tensor) -> memoryview:
    content: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content
