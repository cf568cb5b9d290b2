"""What one process holds of a plan when many share it: a mesh of processes by axis, and each one's parameters, gradients and
optimiser states.

All is computed from the plan and its graph. Of shares that are not equal the largest is told: that has to fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from peftc import rules
from peftc.compiler.plan.cost import Cost, cost_of
from peftc.compiler.plan.plan import InjectionPlan
from peftc.diagnostics import Diagnostic, PeftcError, Where, did_you_mean
from peftc.graph.former import starred
from peftc.graph.nodes import ModuleGraph
from peftc.graph.tensors import DTYPE_BYTES, TensorFacts
from peftc.registry.optimizers import ChosenOptimizer

#: Axes of a mesh, and what processes along each share.
AXES: Mapping[str, str] = {
    "dp": "nothing: each has all",
    "fsdp": "every parameter, gradient and optimiser state, in equal parts",
    "tp": "weights of the base that the model's own plan splits",
}
#: More processes than any machine has.
MAX_RANKS = 10**6


@dataclass(frozen=True, slots=True)
class Mesh:
    """Processes by axis; an axis that is not named has one."""

    dp: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.dp * self.fsdp * self.tp

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "one process"


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes of one process, and what was taken for granted about them."""

    mesh: Mesh
    cost: Cost
    assumed: tuple[str, ...] = ()


def read_mesh(text: str) -> Mesh:
    """The mesh of a text such as `fsdp=8,tp=2`. Raises `PeftcError` with all that is wrong with it.

    >>> read_mesh("fsdp=8, tp=2").ranks
    16
    """
    found: dict[str, int] = {}
    seen: set[str] = set()
    problems: list[Diagnostic] = []
    for part in text.split(","):
        axis, sign, number = (piece.strip() for piece in part.partition("="))
        what = _wrong(axis, sign, number, seen)
        seen.add(axis)
        if what is None:
            found[axis] = int(number)
        else:
            fix = did_you_mean(axis, AXES) if axis not in AXES else ""
            problems.append(rules.MESH_INVALID(what, fix=fix or _FIX, where=Where(path="--mesh")))
    if not problems and math.prod(found.values()) > MAX_RANKS:
        what = f"`{text}` are {math.prod(found.values()):,} processes; there are at most {MAX_RANKS:,}"
        problems.append(rules.MESH_INVALID(what, fix=_FIX, where=Where(path="--mesh")))
    if problems:
        raise PeftcError(problems)
    return Mesh(**found)


_FIX = "Give axes of " + ", ".join(f"`{axis}`" for axis in AXES) + ", each once, with a number: `fsdp=8,tp=2`."


def _wrong(axis: str, sign: str, number: str, seen: Set[str]) -> str | None:
    """What is wrong with one part of a mesh, if anything."""
    if not axis and not sign:
        return "A mesh has an empty part"
    if axis not in AXES:
        return f"A mesh has no axis `{axis[:40]}`"
    if axis in seen:
        return f"The axis `{axis}` is given twice"
    if not (number.isascii() and number.isdigit() and len(number) < len(str(MAX_RANKS)) + 1 and int(number) > 0):
        return f"`{axis}={number[:40]}` is not a number of processes from 1 to {MAX_RANKS:,}"
    return None


def share_of(plan: InjectionPlan, mesh: Mesh, chosen: ChosenOptimizer | None = None) -> Share:
    """What each process of the mesh holds, trained by this optimiser, AdamW if none is given.

    `fsdp` divides all parameters, gradients and states. `tp` divides what the model's plan names, which the graph knows;
    adapters are whole along it.
    """
    whole = cost_of(plan, chosen)
    adapters, gradients, states = (
        _part(number, mesh.fsdp) for number in (whole.adapters, whole.gradients, whole.optimiser)
    )
    graph = plan.graph
    assumed: list[str] = []
    base = _part(whole.base, mesh.fsdp) if graph is None else _of_base(graph, mesh)
    if mesh.tp > 1:
        if graph is None or not graph.splits:
            assumed.append("the model has no plan for tensor parallelism: every process along `tp` has the whole base")
        assumed.append("adapters are whole in every process along `tp`")
    if whole.originals and mesh.ranks > 1:
        assumed.append("base weights that a start keeps are whole in every process")
    return Share(mesh, Cost(base, adapters, gradients, states, whole.originals), tuple(assumed))


def _of_base(graph: ModuleGraph, mesh: Mesh) -> int:
    """Bytes of the base that one process has. Of a packed weight all that holds it is taken to be split like one."""
    styles = dict(graph.splits)
    packed = {node.path: node.facts.packed for node in graph.nodes if node.facts.packed is not None}
    total = 0
    for name, tensor in graph.parameters():
        path, _, own = name.rpartition(".")
        style = styles.get(starred(name)) or styles.get(starred(path), "")
        if path not in packed or own == "bias":
            total += _split(tensor, style, mesh)
    for path, weight in packed.items():
        style = styles.get(starred(f"{path}.weight")) or styles.get(starred(path), "")
        held = weight.nbytes if _dim(style, 2) is None else _part(weight.nbytes, mesh.tp)
        total += _part(held, mesh.fsdp)
    return total


def _split(tensor: TensorFacts, style: str, mesh: Mesh) -> int:
    """Bytes that one process has of a parameter: of the dimension that the style splits, and of that an equal part."""
    shape, number = list(tensor.shape), DTYPE_BYTES.get(tensor.dtype, 4)
    dim = _dim(style, len(shape))
    if dim is not None:
        shape[dim] = _part(shape[dim], mesh.tp)
    return _part(math.prod(shape), mesh.fsdp) * number


def _dim(style: str, dims: int) -> int | None:
    """Which dimension a style of transformers splits, of a tensor with that many; None for what stays whole."""
    if not dims:
        return None
    if "colwise" in style:
        return dims - 1 if style.startswith("embedding") else max(dims - 2, 0)
    if "rowwise" in style:
        return 0 if style.startswith("embedding") else dims - 1 if dims > 1 else None
    return None


def _part(number: int, parts: int) -> int:
    return -(-number // parts)
