"""How much an adapter counts on a layer: users multiply its own scaling, which is its method's."""

from __future__ import annotations

from typing import Any

from peftc.compiler.plan.sites import MapSite
from peftc.runtime.journal import keep_entries, keep_entry, whole
from peftc.tuner.maps import MapTuner


class Scaling:
    """The part of a layer's wrapper that is about scaling."""

    #: numbers, or tensors where something compiled reads them; other libraries put another dictionary in its place
    scaling: dict[str, Any]
    _sites: dict[str, tuple[MapSite, MapTuner[Any]]]
    _active: tuple[str, ...]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's own scaling by `scale`."""
        if adapter in self._sites:
            site, tuner = self._sites[adapter]
            keep_entry(self.scaling, adapter)
            self.scaling[adapter] = scale * tuner.scaling(site.config, site.layer)

    @whole
    def scale_layer(self, scale: float) -> None:
        """Multiply the current scaling of the active adapters."""
        keep_entries(self.scaling)
        for name in self._active:
            self.scaling[name] *= scale

    @whole
    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the current scaling of the active adapters; without a number, back to their own."""
        keep_entries(self.scaling)
        for name in self._active:
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale
