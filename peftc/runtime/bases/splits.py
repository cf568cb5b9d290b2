"""Models whose weights transformers splits between processes by tensors (`tp_plan`): what an adapter can be put on there.

Adapters are whole in every process and act on the whole input and output of a layer, so that all processes compute the same
update and the same gradients of it. What would act on a part of something is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from peftc import rules
from peftc.checkpoint.keys import listed
from peftc.compiler.plan.adapter import AdapterPlan
from peftc.diagnostics import PeftcError
from peftc.host import parallel, tensor_parallel


def is_split(model: nn.Module) -> bool:
    """Whether the layers of a model are split between processes."""
    return any(tensor_parallel.split_of(module) is not None for module in model.modules())


def refuse_unknown_splits(model: nn.Module) -> None:
    """Raise `PeftcError` for a model that is split, and not into layers of which it is known how they are called."""
    parts = parallel.parts(model)
    if parts > 1 and not is_split(model):
        what = f"The weights of this `{type(model).__name__}` are split between {parts} processes, in a way that is not known here"
        fix = "Load the base without `tp_plan` or `distributed_config`, or shard it with FSDP or DeepSpeed."
        raise PeftcError(rules.SPLIT_BASE(what, fix=fix))


def refuse_split_sites(model: nn.Module, plan: AdapterPlan, at: Callable[[str], nn.Module]) -> None:
    """Raise `PeftcError` with all that an adapter would do to parts of a split model; `at` finds modules of the base by path."""
    if parallel.parts(model) < 2:
        return
    problems = [rules.SPLIT_BASE(what, fix=fix) for what, fix in _misplaced(plan, at)]
    if problems:
        raise PeftcError(problems)


def _misplaced(plan: AdapterPlan, at: Callable[[str], nn.Module]) -> Iterator[tuple[str, str]]:
    """What each kind of site would do to parts, with what helps."""
    strange = [s.path for s in plan.maps if _is_strange(at(s.path), s.parameter or s.layer.packed)]
    if strange:
        what = f"How processes share {listed(strange)} does not say what a whole input and output of it are"
        yield what, f"Leave {'them' if len(strange) > 1 else 'it'} out: `exclude_modules`, or other `target_modules`."
    around = [site.path for site in plan.modules if _has_split(at(site.path))]
    if around:
        yield f"{plan.peft_type} acts around {listed(around)}, of which each process has a part", _OTHER
    copied = [save.path for save in plan.saves if _has_split(at(save.path))]
    if copied:
        yield (
            f"`modules_to_save` would copy this process's part of {listed(copied)}",
            "Leave it out of `modules_to_save`.",
        )
    trained = [train.path for train in plan.trains if tensor_parallel.is_split(at(train.path))]
    if trained:
        yield f"Of what would train itself in {listed(trained)} each process has a part", 'Set `bias="none"`.'
    if plan.prompt is not None and plan.prompt.place.is_cache:
        yield f"{plan.peft_type} gives keys and values for all heads, of which each process has some", _OTHER


_OTHER = "Take a method that adapts layers, or load the base without `tp_plan`."


def _is_strange(module: nn.Module, inside: object) -> bool:
    """Whether a module is split in a way that is not known, or one is that has what is adapted inside: experts, a packed weight."""
    return tensor_parallel.is_split(module) and (bool(inside) or tensor_parallel.split_of(module) is None)


def _has_split(module: nn.Module) -> bool:
    return any(tensor_parallel.is_split(part) for part in module.modules())


def agree(model: nn.Module, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
    """Have all processes of a split model begin with the same numbers, those of the first: what each drew is its own."""
    if parallel.parts(model) > 1:
        found = (tensor_parallel.split_of(module) for module in model.modules())
        split = next((one for one in found if one is not None), None)
        if split is not None:
            tensor_parallel.agree(tensors(), split.mesh)
