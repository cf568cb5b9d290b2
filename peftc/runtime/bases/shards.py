"""Models that FSDP or DeepSpeed holds in shards. Their calls compute with whole tensors; what is asked outside of calls is done
where it can be, and refused by name where it would be done to a part, or lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.keys import listed
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError, warn
from peftc.host import parallel


def refuse_sharded(modules: Iterable[nn.Module], why: str) -> None:
    """Raise `PeftcError` for modules whose parameters somebody puts back into them for each call, whole or not just now."""
    by = parallel.sharded_by(modules)
    if by is not None:
        what = f"{by} holds the model in shards, and puts its own parameters back for each call: {why}"
        fix = "Save the adapter, load it onto a whole model, and do it there."
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix))


def refuse_parts(plan: AdapterPlan, tensors: Mapping[str, Tensor], why: str) -> None:
    """Raise `PeftcError` if one of an adapter's tensors, by checkpoint key, is not here as large as planned."""
    shapes = {planned.disk: planned.shape for planned in plan.parameters()}
    parts = [key for key, tensor in tensors.items() if key in shapes and not parallel.is_whole(tensor, shapes[key])]
    if parts:
        what = f"Of {listed(parts)} this process has a part, if anything: {why}"
        fix = (
            "Gather the state dict of the whole wrapped model in every process and pass it as `state_dict`, or do it within "
            "`FSDP.summon_full_params` or `deepspeed.zero.GatheredParameters`."
        )
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix))


def refuse_distributed(tensors: Mapping[str, Tensor]) -> None:
    """Raise `PeftcError` if tensors that are to be written are in shards, which torch would gather from all processes."""
    parts = [key for key, tensor in tensors.items() if parallel.is_distributed(tensor)]
    if parts:
        what = f"{listed(parts)}: each process has a shard, and a file would get those of this one"
        fix = "Pass `state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`."
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix=fix))


def note_adding(model: nn.Module, on_the_way: Iterable[nn.Module]) -> None:
    """Warn before an adapter is put into a model that is held in shards: those who hold it do not know of the new tensors. They are
    looked for among the modules `on_the_way` to what is adapted.

    Raises `PeftcError` where not even shapes can be seen.
    """
    by = parallel.sharded_by(on_the_way)
    if by is None:
        return
    if parallel.is_flattened(model.modules()):
        what = f"{by} holds each weight of the model as a part of a flat tensor, without its shape"
        raise PeftcError(rules.WEIGHT_ELSEWHERE(what, fix="Put the adapter on first, and wrap the model then."))
    what = f"{by} held the model in shards before: the adapter is whole in each process, and its gradients are that process's own"
    fix = "Put the adapter on first, or see to it that all processes start with the same numbers and average the gradients."
    warn([rules.BESIDE_SHARDS(what, fix=fix)])
