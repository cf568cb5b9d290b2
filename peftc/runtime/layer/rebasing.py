"""Base weights that starts of adapters change: in place while these act, the original otherwise, bit for bit.

The weight's parameter stays the same object and gets other memory. What is merged into it was made of the weight that was in
place then: where another belongs there, it is taken out and folded in anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.runtime.bases import places
from peftc.runtime.bases.backend import Backend
from peftc.runtime.call import Shared
from peftc.runtime.journal import keep, keep_entries, keep_entry, keep_memory
from peftc.runtime.layer.starting import WEIGHT, Held


class Rebased:
    """The weight of one base layer, and the adapters that change it. Wrappers round the layer share it."""

    def __init__(self) -> None:
        #: adapters that change the weight, with how
        self.held: dict[str, Held] = {}
        #: those of which the changes are in place, in their order
        self.placed: tuple[str, ...] = ()
        #: the memory of the original while another is in its place
        self.original: Tensor | None = None
        #: those of which the changes were in place when something was merged into it
        self.folded: tuple[str, ...] = ()
        #: what was put in its place last, and for which adapters: so that switching off and on computes nothing
        self._made: Tensor | None = None
        self._made_for: tuple[str, ...] = ()
        #: the count of changes in place of the original when it came back
        self._version = -1

    def hold(self, adapter: str, held: Held) -> None:
        """Know of an adapter's change; it is not in place yet."""
        keep_entry(self.held, adapter)
        self.held[adapter] = held

    def drop(self, adapter: str) -> None:
        """Forget an adapter's change, once it is not in place."""
        keep(self)
        keep_entries(self.held)
        self.held.pop(adapter, None)
        self._made, self._made_for = None, ()

    def among(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the adapters that change the weight."""
        return tuple(name for name in dict.fromkeys(names) if name in self.held)

    def place(self, parameter: nn.Parameter, names: tuple[str, ...], backend: Backend) -> None:
        """Have the changes of these adapters in place, and of no others."""
        if names == self.placed:
            return
        keep(self)
        keep_memory(parameter)
        if self.original is None and parameter._version != self._version:  # another original since
            self._made, self._made_for = None, ()
        original = parameter.data if self.original is None else self.original
        with torch.no_grad():
            data = self._changed(original, parameter, names, backend) if names else original
        parameter.data = data.to(parameter.device, parameter.dtype)
        self.original, self.placed, self._version = (original if names else None), names, parameter._version

    def _changed(self, original: Tensor, parameter: nn.Parameter, names: tuple[str, ...], backend: Backend) -> Tensor:
        made = self._made
        if made is None or names != self._made_for or made.dtype != parameter.dtype:
            weight = backend.to_logical(WEIGHT, original.to(parameter.device))
            whole = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
            changed = [self.held[name].changed(weight) for name in self._counting(names)]
            total = changed[0] if len(changed) == 1 else whole + sum(each - whole for each in changed)
            made = backend.to_stored(WEIGHT, total.reshape(weight.shape), original).to(parameter.dtype).contiguous()
            self._made, self._made_for = made, names
        return made

    def _counting(self, names: tuple[str, ...]) -> list[str]:
        """Those whose changes add up: of adapters whose changes hold one another, the largest."""
        largest: dict[str, str] = {}
        for name in names:
            held = self.held[name]
            key = held.chosen.value if held.chosen.start.nests else f"{name} alone"
            first = largest.setdefault(key, name)
            if held.facts.rank > self.held[first].facts.rank:
                largest[key] = name
        return list(largest.values())


class Rebasing:
    """The part of a layer's wrapper that is about these."""

    _rebased: Rebased | None
    merged_adapters: list[str]
    _is_aside: bool
    _active: tuple[str, ...]
    _disabled: bool
    _shared: Shared

    # given by the layer -------------------------------------------------------------------------------------------

    def aside(self) -> dict[str, Any]:
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        raise NotImplementedError

    def pristine(self) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def whole_chain(self) -> Sequence[Rebasing]:
        """All wrappers round the base layer, the innermost first."""
        raise NotImplementedError

    def take_out_merged(self) -> Sequence[Sequence[str]]:
        """Take out what is merged; by wrapper what that was."""
        raise NotImplementedError

    def fold_in(self, names: Sequence[Sequence[str]]) -> None:
        """Merge these again."""
        raise NotImplementedError

    @property
    def backend(self) -> Backend:
        raise NotImplementedError

    # changing -----------------------------------------------------------------------------------------------------

    @property
    def rebased(self) -> Rebased | None:
        """What changes the base weight here, if anything does."""
        return next((layer._rebased for layer in self.whole_chain() if layer._rebased is not None), None)

    def unchanged(self) -> Mapping[str, Tensor]:
        """The base layer's parameters before any adapter, logical and frozen: before a merge, and before a start."""
        rebased = self.rebased
        if rebased is None or rebased.original is None:
            return self.pristine()
        weight = self.backend.to_logical(WEIGHT, rebased.original.to(places.device_of(self.get_base_layer())))
        return {**self.pristine(), WEIGHT: weight}

    def memory_of(self, name: str) -> Tensor | None:
        """A base parameter's own memory before any adapter, where another is in its place; else None."""
        rebased = self.rebased
        if name == WEIGHT and rebased is not None and rebased.original is not None:
            return rebased.original
        return self.whole_chain()[-1].aside().get(name)

    def hold(self, adapter: str, held: Held | None, path: str) -> None:
        """Let an adapter have a base weight of its own, from when it acts. Raises `PeftcError` where that cannot be."""
        if held is None:
            return
        why = "its start changes the base weight"
        places.refuse_absent(self.get_base_layer(), path, why)
        if self.backend.opens_anew:
            what = f"The weight of `{path}` is packed, and {why}"
            raise PeftcError(
                rules.START_UNFIT(what, fix="Load the base unquantised, or choose another start.", where=path)
            )
        own = self._own_weight()
        if own is None or own.is_meta:
            what = f"`weight` of `{path}` is not with the layer, and {why}"
            raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix="Keep the layer's weight on a device.", where=path))
        rebased = self.rebased
        keep(self, self._shared)
        if rebased is None:
            rebased = self.__dict__["_rebased"] = Rebased()
        self._shared.rebases = True
        rebased.hold(adapter, held)

    def beside_original(self, adapter: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of an adapter's update `B A` with those of its change of the base weight, so that they are beside the original.

        Raises `PeftcError` if that change is no product of factors."""
        rebased = self.rebased
        held = None if rebased is None else rebased.held.get(adapter)
        if held is None:
            return A, B
        if not held.chosen.start.is_offset:
            what = f"`{held.chosen.value}` made of the base weight what is no low-rank change of it"
            raise PeftcError(
                rules.OTHER_WEIGHTS(what, fix="Keep the adapter as it is: what was kept of the start is with it.")
            )
        first, second = held.kept["A"].to(A) * held.facts.scaling, held.kept["B"].to(B)
        return torch.cat([A, first]), torch.cat([B, -second], dim=1)

    def hold_anew(self, adapter: str, kept: Mapping[str, Tensor]) -> None:
        """Let an adapter's change of the base weight follow from other tensors, in place if it acts."""
        rebased = self.rebased
        assert rebased is not None
        self.rebase(tuple(name for name in rebased.placed if name != adapter))
        held = rebased.held[adapter]
        rebased.drop(adapter)
        rebased.hold(adapter, replace(held, kept=kept))
        self.rebase()

    def _own_weight(self) -> nn.Parameter | None:
        """The parameter that is the base layer's own, in place or aside."""
        kept = self.whole_chain()[-1].aside()
        return kept[WEIGHT] if WEIGHT in kept else self.get_base_layer()._parameters.get(WEIGHT)

    def wanted(self, merging: Iterable[str] = ()) -> tuple[str, ...]:
        """Adapters whose changes belong in the base weight: of what acts, and of what is being merged."""
        rebased = self.rebased
        chain = [layer for layer in self.whole_chain() if not layer._disabled]
        acting = [name for layer in chain for name in (*layer._active, *layer.merged_adapters)]
        return () if rebased is None else rebased.among([*acting, *merging])

    def rebase(self, wanted: tuple[str, ...] | None = None) -> None:
        """Have the base weight in place that belongs there: to what acts, or to these adapters."""
        rebased = self.rebased
        if rebased is None:
            return
        wanted = self.wanted() if wanted is None else wanted
        own, in_place = self._own_weight(), any(w.merged_adapters and not w._is_aside for w in self.whole_chain())
        if own is None or (wanted == rebased.placed and not (in_place and wanted != rebased.folded)):
            return
        again = self.take_out_merged() if in_place and wanted != rebased.folded else ()
        rebased.place(own, wanted, self.backend)
        if again:
            self.fold_in(again)

    def rest(self) -> None:
        """Have what is merged in place alone: nothing acts beside the weight from now on."""
        if self._shared.rebases and (rebased := self.rebased) is not None:
            in_place = [layer for layer in self.whole_chain() if not layer._is_aside]
            self.rebase(rebased.among(name for layer in in_place for name in layer.merged_adapters))

    def forget(self, adapter: str) -> None:
        """Let an adapter that acts no more have no base weight of its own."""
        rebased = self.rebased
        if rebased is not None:
            self.rebase()
            rebased.drop(adapter)
