"""What the layers of one kind have in common when they get an adapter: found once for each kind, not for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peftc.compiler.plan.sites import MapSite
from peftc.registry.boundary import guarded
from peftc.runtime.slots.filling import Storage, half_of, storage_of
from peftc.tuner.maps import MapTuner


@dataclass(frozen=True, slots=True)
class Kind:
    """Sites that share options, facts and slots: `site` is the first of them.

    `scaling` and `dropout` are what the method says for them, `half` is the dtype of layers in half precision.
    """

    site: MapSite
    storage: Storage
    scaling: float
    dropout: float
    half: torch.dtype | None

    @classmethod
    def of(cls, site: MapSite, tuner: MapTuner[Any]) -> Kind:
        """The kind of a site. What the method raises names it and the site."""
        who = str(site.config.peft_type), site.path
        scaling = guarded(tuner.scaling, *who)(site.config, site.layer)
        dropout = guarded(tuner.dropout, *who)(site.config)
        return cls(site, storage_of(site.slots, site.dtype), scaling, dropout, half_of(site.layer))
