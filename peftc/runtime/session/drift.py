"""How an adapter's plan meets a live model: whether that is still what the plan was made for, modules, shapes and parameters
that others adapt; and which wrapper a site joins.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftc import rules
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.compiler.plan.sites import MapSite
from peftc.diagnostics import Diagnostic
from peftc.host.parallel import whole_shape
from peftc.runtime.layer.wrapper import TunerLayer
from peftc.runtime.session.applied import Applied


def drift(session: Applied, plan: AdapterPlan) -> Iterator[Diagnostic]:
    """What of the plan the model has not, or otherwise."""
    for site in plan.maps:
        module = session.find(site.path)
        if module is None:
            yield session.gone(site.path)
            continue
        for name, planned in site.layer.params.items():
            own = module._parameters.get(name)
            if own is not None and own.shape != planned.shape and whole_shape(own) != planned.shape:
                what = f"`{site.path}.{name}` is {whole_shape(own)}, the plan was made for {planned.shape}"
                yield rules.MODEL_DRIFTED(what, fix="Plan again for this model.", where=site.path)
    yield from _other_parameters(session, plan)
    for path in (*(site.path for site in plan.modules), *(save.path for save in plan.saves)):
        if session.find(path) is None:
            yield session.gone(path)


def _other_parameters(session: Applied, plan: AdapterPlan) -> Iterator[Diagnostic]:
    """Modules of which another adapter has other parameters: names tell them apart by their order alone."""
    wanted: dict[str, set[str]] = {}
    for site in plan.maps if plan.adapts_parameters else ():
        wanted.setdefault(site.path, set()).add(site.parameter)
    for path, names in wanted.items():
        have = (
            {layer.parameter for layer in session.layers[path].chain() if layer.parameter == layer.spot}
            if path in session.layers
            else names
        )
        if have != names:
            what = f"Of `{path}` other adapters have {', '.join(sorted(have))}, not {', '.join(sorted(names))}"
            fix = "Give all adapters the same `target_parameters`."
            yield rules.ADAPTERS_CONFLICT(what, fix=fix, where=path)


def home_of(outermost: TunerLayer | None, site: MapSite) -> TunerLayer | None:
    """The wrapper that a site's adapter joins: of its method, for its parameter, under no other method's. Rows that train
    beside a method have one of their own, the innermost."""
    if site.inside:
        innermost = None if outermost is None else outermost.chain()[0]
        return innermost if innermost is not None and innermost.spot == site.inside else None
    module: nn.Module | None = outermost
    while isinstance(module, TunerLayer) and module.peft_type == str(site.config.peft_type):
        if module.spot == site.spot:
            return module
        module = module.base_layer
    return None
