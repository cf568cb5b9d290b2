"""Factors of an adapter that are given anew from outside, layer by layer: for starts that make up for what a quantised base has lost.

Which layers are asked for, and what their weights were before, is decided here; what the factors are, by the function that is
given. It finishes, or the model is as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.load import open_weights
from peftc.checkpoint.shards import Shards, open_shards
from peftc.diagnostics import PeftcError, Where, did_you_mean
from peftc.graph.base_ref import BaseRef
from peftc.graph.locate import folder_of, locate
from peftc.integrations.quantization import dequantize_module_weight, get_bnb_param_type
from peftc.model.functions.gathering import to_fill
from peftc.model.peft_model import PeftModel
from peftc.registry.boundary import boundary
from peftc.runtime.journal import keep_values, whole
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.tuner.slots import labelled


@dataclass(frozen=True)
class FactorLayer:
    """A layer of an adapter with thin factors, by its path in the base model."""

    path: str
    wrapper: TunerLayer
    adapter: str

    @property
    def stored(self) -> Literal["", "4bit", "8bit"]:
        """How the base weight is quantised; empty for one that is not."""
        weight = self.wrapper.get_base_layer()._parameters.get("weight")
        return (get_bnb_param_type(weight) or "") if weight is not None else ""

    @property
    def weight(self) -> Tensor:
        """The base weight as it is used, in floating point of at least 32 bits, `(out, in)`."""
        found = dequantize_module_weight(self.wrapper.get_base_layer()).detach()
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self._places()[0][1].shape[0])

    @property
    def scaling(self) -> float:
        """The factor `s` of the update `s · B A`."""
        return float(self.wrapper.scaling[self.adapter])

    def _places(self) -> list[tuple[str, Tensor]]:
        """Label and tensor of the two factors."""
        site, part = self.wrapper.site(self.adapter), self.wrapper.part(self.adapter)
        slots = labelled(site.slots)
        found = []
        for label in part.tuner.thin_slots(site.config, site.layer):
            container, key = self.wrapper.where(self.adapter, slots[label])
            found.append((label, container[key]))
        return found

    def fill(self, A: Tensor, B: Tensor) -> Callable[[], None]:
        """Put in other factors, A `(r, in)` and B `(out, r)`, and return what puts the old ones back."""
        site, tuner = self.wrapper.site(self.adapter), self.wrapper.part(self.adapter).tuner
        places = self._places()
        with boundary(str(site.config.peft_type), "of_thin", self.path):
            made = tuner.of_thin(site.config, site.layer, A, B)
        before = [(tensor, tensor.detach().clone()) for _, tensor in places]
        for label, tensor in places:
            keep_values(tensor)
            tensor.detach().copy_(made[label])

        def back() -> None:
            for tensor, values in before:
                tensor.detach().copy_(values)

        return back


#: The factors of a layer; None for a layer that is left as it is.
Found = tuple[Tensor, Tensor] | None


@whole
@torch.no_grad()
def refill(
    model: nn.Module,
    adapter_name: str,
    find: Callable[[FactorLayer], Found],
    keep: Callable[[Any, str], bool] | None = None,
) -> int:
    """Let the factors of an adapter's layers be those that `find` gives, one layer after the other; `keep` is called with the
    model and the path after each, and says whether they stay. Returns for how many layers there were others.

    Raises `PeftcError` with the model as it was: no such adapter, one that is merged. So it is after any error of the two functions.
    """
    session = to_fill(model, adapter_name).session
    count = 0
    for path, wrapper in session.layers.items():
        for layer in _on(wrapper, adapter_name):
            found = find(FactorLayer(path, layer, adapter_name))
            if found is None:
                continue
            back = FactorLayer(path, layer, adapter_name).fill(*found)
            count += 1
            if keep is not None and not keep(model, path):
                back()
    return count


def _on(wrapper: nn.Module, adapter: str) -> list[TunerLayer]:
    """The wrapper of an adapter on a layer that is one map, with factors that can be given; those of others are round it."""
    found, module = [], wrapper
    while isinstance(module, TunerLayer):
        if module.holds(adapter) and not module.site(adapter).parameter and module.part(adapter).tuner.is_startable:
            found.append(module)
        module = module.base_layer  # type: ignore[assignment]
    return found


class BaseWeights:
    """Weights of an unquantised base model in safetensors, by the path of the layer; read one at a time."""

    def __init__(self, files: Shards, prefix: str) -> None:
        self._files, self._prefix = files, prefix

    def __call__(self, path: str) -> Tensor:
        """The weight of a layer. Raises `PeftcError` if the file has none of its name."""
        name = f"{path}.weight"
        names = [name]
        if self._prefix:
            names += [name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"]
        found = next((key for key in names if key in self._files.tensors), None)
        if found is None:
            what = f"The base's files have no `{name}`"
            near = did_you_mean(name, self._files.tensors)
            fix = f"{near} Name the files of the model that was quantised.".strip()
            raise PeftcError(rules.START_DATA(what, fix=fix, where=Where(file=str(self._files.folder), path=path)))
        return self._files.tensor(found)


def base_weights(model: nn.Module, path: str | os.PathLike[str] | None = None) -> BaseWeights:
    """The weights of the base in a folder, or in a file `model.safetensors`; left out, in the folder or on this machine's copy of the
    repository that the model's config names. Raises `PeftcError` if there are none."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = getattr(base, "base_model_prefix", "")
    folder = _named(base) if path is None else Path(path)
    if folder.is_file():
        return BaseWeights(Shards(folder.parent, {folder.name: open_weights(folder)}, None), prefix)
    files = open_shards(folder.parent if folder.suffix == ".safetensors" else folder)
    if files is None:
        what = f"Could not find file for `{folder}`: there is no `model.safetensors`, in one file or in several"
        fix = "Name the folder of the model before it was quantised; `save_pretrained` writes such files."
        raise PeftcError(rules.START_DATA(what, fix=fix, where=Where(file=str(folder)), also=FileNotFoundError))
    return BaseWeights(files, prefix)


def _named(base: Any) -> Path:
    config = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None) if not isinstance(config, Mapping) else None
    folder = None
    if isinstance(name, str) and name:
        folder = Path(name) if Path(name).is_dir() else folder_of(locate(BaseRef(model=name)))
    if folder is None:
        what = "The model does not say which files it was loaded from"
        fix = "Give `model_path`: the folder of the model before it was quantised."
        raise PeftcError(rules.START_DATA(what, fix=fix, also=ValueError))
    return folder
