"""Adapters in the base weights: folded in, set aside while they are not to act, and taken out again.

A base layer has one set of parameters in place at a time. Every wrapper round it keeps what it found when it merged, and,
while its adapters are switched off, what it made of it; so each state comes back bit for bit, with the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host.torch_modules import KeepsAside
from peftc.runtime.bases import places
from peftc.runtime.bases.backend import Backend
from peftc.runtime.call import Shared
from peftc.runtime.journal import keep, keep_entries, whole
from peftc.runtime.layer.folding import adapted
from peftc.runtime.layer.merged import merged_parameters
from peftc.runtime.layer.parts import Part, Under
from peftc.runtime.layer.rebasing import Rebasing


class Merging(Rebasing, KeepsAside):
    """The part of a layer's wrapper that is about merging."""

    merged_adapters: list[str]
    parameter: str
    #: whether the parameters that this wrapper found are in place, and what it made of them is in `_folded`
    _is_aside: bool
    #: from where the values of what it found, and of what it made of it, are brought, for those that are elsewhere
    _found_at: dict[str, Mapping[str, Tensor] | None]
    _folded_at: dict[str, Mapping[str, Tensor] | None]
    _active: tuple[str, ...]
    _disabled: bool
    _parts: dict[str, Part]
    _shared: Shared
    _under: Under
    #: the wrapper round this one
    _outer: ReferenceType[Merging] | None

    # given by the layer -------------------------------------------------------------------------------------------

    def chain(self) -> Sequence[Merging]:
        raise NotImplementedError

    @property
    def backend(self) -> Backend:
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        raise NotImplementedError

    def _choose_path(self) -> None:
        raise NotImplementedError

    # what adapters make of the weights ----------------------------------------------------------------------------

    def merged_parameters(self, names: Sequence[str], check: bool = False) -> dict[str, Any]:
        """What takes the place of base parameters with these adapters, of wrappers below too, folded in; the layer stays as it is."""
        parts = [
            wrapper._parts[name].fixed(training=False)
            for wrapper in self.chain()
            for name in names
            if name in wrapper._parts and name not in wrapper.merged_adapters
        ]
        return merged_parameters(self._under, parts, check)

    @property
    def gained(self) -> list[str]:
        """Parameters that the base layer has only because of what is merged into it."""
        return [name for name, own in self._pristine.items() if own is None]

    def changes(self, adapter: str) -> dict[str, Tensor]:
        """What one adapter adds to each parameter that it changes, by name, in logical order and the adapter's dtype."""
        with torch.no_grad():
            before = self.backend.opened(self.get_base_layer())
            after = adapted(self._under, [self._parts[adapter].fixed(training=False)])
            changed = {name: tensor for name, tensor in after.items() if tensor is not before.get(name)}
            return {n: t - before[n].to(t.dtype) if n in before else t for n, t in changed.items()}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`W' - W` of one adapter, in storage order, in the adapter's dtype."""
        name = self.parameter or "weight"
        like, change = places.tensor_of(self.get_base_layer(), name), self.changes(adapter)[name]
        return change if like is None else self.backend.to_stored(name, change, like)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter, or any if it is not here, adds a matrix to the weight that does not depend on the weight.

        Others that change weights alone are converted as well (`peftc.convert_adapter`), if with a larger error.
        """
        part = self._parts.get(adapter_name)
        return all(p.tuner.additive for p in ([part] if part is not None else self._parts.values()))

    # merging ------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @whole
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters into the base weights, those of wrappers below first. Raises `PeftcError`, with nothing changed,
        with `safe_merge` on NaN or infinity, and where an adapter below would act after one that it now acts before.

        The base's own parameter objects are kept aside, so that `unmerge` restores them bit for bit. While adapters are
        switched off they are merged and set aside.
        """
        chain, own = self._outermost().chain(), len(self.chain())
        wanted = [layer._to_merge(adapter_names) if place < own else [] for place, layer in enumerate(chain)]
        first = next((place for place, names in enumerate(wanted) if names), None)
        if first is None:
            return
        off = [layer for layer in chain if layer.disable_adapters]
        for layer in off:
            layer.enable_adapters(True)
        based = self.wanted([name for names in wanted for name in names]) if self._shared.rebases else None
        moves = based is not None and self.rebased is not None and self.rebased.placed != based
        low = 0 if moves else first
        # what lies over it is folded in anew; all is, if it is to be merged into another weight
        again = [layer._take_out() for layer in reversed(chain[low if moves else low + 1 :])]
        if moves:
            self.rebase(based)
        merged = [*reversed(again)] if moves else [[], *reversed(again)]
        for layer, names, new in zip(chain[low:], merged, wanted[low:], strict=True):
            layer._merge_own(safe_merge, [*names, *new])
        for layer in off:
            layer.enable_adapters(False)

    def _to_merge(self, wanted: Sequence[str] | None) -> list[str]:
        wanted = self._active if wanted is None else wanted
        return [name for name in dict.fromkeys(wanted) if name in self._parts and name not in self.merged_adapters]

    def _merge_own(self, check: bool, names: Sequence[str]) -> None:
        if not names:
            return
        self._refuse_order(names)
        base = self.get_base_layer()
        places.refuse_absent(base, self._parts[names[0]].path, "merged, the adapter would be lost")
        keep(self, self._shared, base)
        keep_entries(self.merged_adapters, self._pristine, base._parameters, base._buffers)
        places.keep_brought(base)
        parameters = self.merged_parameters(names, check)
        was = places.state_of(base, parameters)
        self._found_at = {**{name: was[name].kept for name in parameters}, **self._found_at}
        for name in parameters:
            self._pristine.setdefault(name, was[name].parameter)
        places.change(base, parameters)
        self.merged_adapters.extend(names)
        self._shared.merges = True
        if (rebased := self.rebased) is not None:
            keep(rebased)
            rebased.folded = rebased.placed
        self._choose_path()

    def _refuse_order(self, names: Sequence[str]) -> None:
        """Merged, these act before what is pending below: only sums may change places."""
        below = self._under.between()
        own = [self._parts[name] for name in names]
        if not below or all(part.tuner.additive for part in (*below, *own)):
            return
        where, first = own[0].path, ", ".join(f"`{part.view.adapter}`" for part in below)
        what = f"Merging {', '.join(f'`{name}`' for name in names)} alone would change places with {first}"
        fix = f"Merge {first} as well, or deactivate it before."
        raise PeftcError(rules.MERGE_ORDER(what, fix=fix, where=where))

    @whole
    def unmerge(self) -> None:
        """Put the base's own parameters back; wrappers below unmerge as well, since what they merged lies beneath. What
        others merged over it is folded in anew."""
        chain, own = self._outermost().chain(), len(self.chain())
        again = self.take_out_merged()
        if self._shared.rebases:
            self.rebase(self.wanted([name for names in again[own:] for name in names]))
        for layer, names in zip(chain[own:], again[own:], strict=True):
            layer._merge_own(False, names)
        self.settle()

    def whole_chain(self) -> Sequence[Merging]:
        return self._outermost().chain()

    def take_out_merged(self) -> list[list[str]]:
        return [layer._take_out() for layer in reversed(self.whole_chain())][::-1]

    def fold_in(self, names: Sequence[Sequence[str]]) -> None:
        for layer, own in zip(self.whole_chain(), names, strict=True):
            layer._merge_own(False, own)
        self.settle()

    def _found(self) -> dict[str, Any]:
        """What this wrapper found when it merged, with values."""
        if not self._pristine:
            return {}
        device, at = places.device_of(self.get_base_layer()), self._found_at
        return {name: places.Original(own, at.get(name)).value(name, device) for name, own in self._pristine.items()}

    def _take_out(self) -> list[str]:
        """Put back what this wrapper found; returns what it had merged."""
        names = self.merged_adapters
        if names:
            self._put(self._pristine, self._found_at)
            self.merged_adapters, self._pristine, self._folded, self._is_aside = [], {}, {}, False
            self._found_at, self._folded_at = {}, {}
            self._choose_path()
        return names

    def _put(
        self, parameters: Mapping[str, nn.Parameter | None], at: Mapping[str, Mapping[str, Tensor] | None]
    ) -> None:
        """Have these in the base layer; what was there, and this wrapper's state, are kept for undoing."""
        base = self.get_base_layer()
        keep(self, base)
        keep_entries(base._parameters, base._buffers)
        places.keep_brought(base)
        places.restore(base, {name: places.Original(own, at.get(name)) for name, own in parameters.items()})

    # switched off -------------------------------------------------------------------------------------------------

    @whole
    def settle(self) -> None:
        """Have the weights in place that belong there: with what was merged by wrappers whose adapters act, up to the first
        whose do not. What is merged further out acts beside the weights meanwhile."""
        merged = [layer for layer in self._outermost().chain() if layer.merged_adapters]
        acting = next((place for place, layer in enumerate(merged) if layer.disable_adapters), len(merged))
        changed = [layer for place, layer in enumerate(merged) if layer._is_aside is (place < acting)]
        for layer in reversed(merged[acting:]):
            layer._set_aside()
        for layer in merged[:acting]:
            layer._put_in()
        for layer in changed:
            layer._choose_path()

    def _outermost(self) -> Merging:
        outer = self._outer() if self._outer is not None else None
        return self if outer is None else outer._outermost()

    def _set_aside(self) -> None:
        if not self._is_aside:
            was = places.state_of(self.get_base_layer(), self._pristine)
            folded = {name: own for name in self._pristine if (own := was[name].parameter) is not None}
            self._put(self._pristine, self._found_at)
            self._folded, self._is_aside = folded, True
            self._folded_at = {name: was[name].kept for name in folded}

    def _put_in(self) -> None:
        if self._is_aside:
            self._put(self._folded, self._folded_at)
            self._folded, self._folded_at, self._is_aside = {}, {}, False
