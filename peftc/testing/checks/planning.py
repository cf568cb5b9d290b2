"""The plan is the model: what another process plans from the config is what the applied model has, no more and no less."""

from __future__ import annotations

import torch

from peftc.compiler.compile import compile_plan
from peftc.compiler.plan.serial import plan_from_json, plan_to_json
from peftc.model.peft_model import PeftModel
from peftc.runtime.applying.apply import apply_plan
from peftc.testing.compare import same_names
from peftc.testing.elsewhere import Planned
from peftc.testing.report import broken
from peftc.testing.subjects import Subject, quiet


def plan_equals_model(s: Subject, planned: Planned) -> None:
    """What a plan shows before anything is loaded is what the applied model has."""
    if planned.plan is None:
        raise broken(f"Another process cannot plan it:\n{planned.error}", "Let `slots` need the config and facts only.")
    base = s.build()
    old = {id(p) for p in base.parameters()}
    with quiet():
        model = PeftModel(base, s.config())
    applied = dict(model.named_parameters())
    new = {name for name, p in applied.items() if id(p) not in old}
    added = {p.name for p in planned.plan.parameters() if not p.base}
    same_names(new, added, "Compared with its plan, the applied model", "Declare every tensor in `slots`.")
    for p in planned.plan.parameters():
        live = applied[p.name]
        found = (tuple(live.shape), str(live.dtype).removeprefix("torch."), live.requires_grad)
        if found != (p.shape, p.dtype, p.trainable):
            what = f"`{p.name}` is planned as {(p.shape, p.dtype, p.trainable)} and is {found}"
            raise broken(what, "Correct its slot, or what `init` does to it.", p.name)
    counts = model.get_nb_trainable_parameters()
    if counts != planned.plan.counts():
        raise broken(
            f"The plan counts {planned.plan.counts()} parameters, the model has {counts}", "Correct the slots."
        )


def loads_without_torch(s: Subject, planned: Planned) -> None:
    """Validating, planning and listing methods take a fraction of a second because nothing imports torch."""
    if planned.heavy:
        what = f"Loading the plugin and planning imports {', '.join(planned.heavy)}"
        raise broken(what, "Import it inside the functions that compute.")


def plan_survives_json(s: Subject) -> None:
    """A plan is saved, reviewed, and applied later."""
    plan = compile_plan(s.model.graph, {"default": s.config()})
    again = plan_from_json(plan_to_json(plan))
    if again != plan:
        raise broken("The plan read back from JSON is another one", "Give slots plain values.")
    with quiet():
        apply_plan(s.build(), again)


def works_without_storage(s: Subject) -> None:
    """Large models are prepared on the meta device, where tensors have no content."""
    base = s.build().to("meta")
    with quiet():
        model = PeftModel(base, s.config())
    real = [name for name, p in model.named_parameters() if p.device != torch.device("meta")]
    if real:
        raise broken(f"`{real[0]}` has storage although its base has none", "Fill slots in place in `init`.")
