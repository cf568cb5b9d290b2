"""CorDA: components of the weight by how the inputs of sample data lie (Yang et al., arXiv:2406.05223).

Of `W C`, with C the covariance of a layer's inputs, the SVD tells which directions the data uses. The instruction-previewed mode
adapts the strongest of them, the knowledge-preserved mode the weakest; the base keeps the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from peftc import plugin as p

from .decomposed import shared

#: The diagonal that is added to a covariance, in parts of its mean, and the error up to which its inverse is taken.
DAMPING, WORST_INVERSE = 0.01, 0.05
#: The rows of what is cached: `<path>.eigens.S_WC`.
EIGENS = ("S_WC", "U_WC", "V_WC")


class CordaConfig(p.ConfigModel):
    """How the components are found (`corda_config`)."""

    cache_file: str | None = None
    """Where the components are kept: read if it is there, else written."""
    covariance_file: str | None = None
    """Where the covariances are kept, which serve all ranks: read if it is there, else written."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """`ipm` adapts the directions that the data uses most, `kpm` those that it uses least."""
    verbose: bool = False
    """Accepted for files of the reference: nothing is shown."""
    use_float16_for_covariance: bool = False
    """Gather covariances in half precision, where the model is: half the memory, less exact."""
    prune_temporary_fields: bool = True
    """Accepted for files of the reference: nothing temporary is left on the model."""

    @p.model_validator(mode="before")
    @classmethod
    def _paths_are_texts(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}


class Corda(p.Start):
    """`W C = U S V`: A and B of r of its components, with C taken out of V again."""

    name: ClassVar[str] = "corda"
    summary: ClassVar[str] = "Components of the weight by how the inputs of sample data lie, taken out of the base."
    paper: ClassVar[str] = "arXiv:2406.05223"
    changes_base: ClassVar[bool] = True
    within_rank: ClassVar[bool] = True
    reads: ClassVar[p.Reads] = p.Reads.INPUTS
    helper: ClassVar[str] = "preprocess_corda"
    options: ClassVar[str] = "corda_config"

    def factors(self, s: p.StartView) -> p.Begun:
        values, left, right = (s.data[name].to(s.weight) for name in EIGENS)
        wanted = (left.shape[0], s.rank, right.shape[0])
        if (*s.weight.shape[:1], len(values), s.weight.shape[1]) != wanted:
            what = f"What was gathered is of rank {len(values)} for {right.shape[0]}→{left.shape[0]}, the adapter of rank {s.rank}"
            raise p.PeftcError(p.rules.START_DATA(what, fix="Call `preprocess_corda` with the options of the adapter."))
        return shared(left, values / s.scaling, right)

    def prepare(self, model: p.nn.Module, c: p.PeftConfig, batches: Sequence[p.Tensors]) -> p.PeftConfig:
        preprocess_corda(model, c, lambda: _run(model, batches))
        return c


def _run(model: p.nn.Module, batches: Iterable[p.Tensors]) -> None:
    for batch in batches:
        model(**batch)


def preprocess_corda(
    model: p.nn.Module,
    lora_config: p.PeftConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: p.nn.Module | None = None,
) -> None:
    """Find the components that an adapter with these options begins with, before it is put on the model.

    `run_model` runs sample data through the model, or through `hooked_model`, if that is another with the same layers; it is
    not needed if there is a file of the config already. Raises `PeftcError`: without data, or where the data gives no finite
    numbers.
    """
    import torch

    targets, how = p.start_targets(model, lora_config), _config(lora_config)
    cached = _read(how.cache_file)
    with torch.no_grad():
        if cached is None:
            observed = targets if hooked_model is None else p.start_targets(hooked_model, lora_config)
            covariances = _read(how.covariance_file)
            if covariances is None:
                covariances = _covariances(observed, run_model, hooked_model or model, how)
                _write(how.covariance_file, covariances)
            cached = {}
            for path, target in targets.items():
                found = _components(target.weight, covariances[path].to(target.weight), target.rank, how.corda_method)
                cached |= {f"{path}.eigens.{name}": tensor for name, tensor in zip(EIGENS, found, strict=True)}
            _write(how.cache_file, cached)
    for path, target in targets.items():
        target.gather(**{name: cached[f"{path}.eigens.{name}"] for name in EIGENS})


def _config(c: p.PeftConfig) -> CordaConfig:
    return getattr(c, "corda_config", None) or CordaConfig()


def _covariances(
    targets: Mapping[str, Any], run_model: Callable[[], None] | None, model: p.nn.Module, how: CordaConfig
) -> dict[str, p.Tensor]:
    """Of each layer the mean over calls of `X^T X`, X being the inputs by their largest number."""
    if run_model is None:
        what = "Neither `run_model` nor a file of covariances is given"
        raise p.PeftcError(p.rules.START_DATA(what, fix="Give a function that runs sample data through the model."))
    sums: dict[str, p.Tensor] = {}
    counts = dict.fromkeys(targets, 0)

    def observe(path: str, x: p.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows if how.use_float16_for_covariance else rows.float()
        rows = rows / rows.max().abs()
        product = rows.t() @ rows
        if not product.isfinite().all():
            what = f"The inputs of `{path}` give a covariance that is not finite"
            fix = "Check the data; leave out `use_float16_for_covariance`."
            raise p.PeftcError(p.rules.START_DATA(what, fix=fix, where=path))
        sums[path] = sums[path] + product if path in sums else product
        counts[path] += 1

    model.eval()
    with observed({path: target.called for path, target in targets.items()}, observe):
        run_model()
    lacking = [path for path in targets if not counts[path]]
    if lacking:
        what = f"`run_model` did not call `{lacking[0]}`, one of {len(lacking)} such layers"
        raise p.PeftcError(p.rules.START_DATA(what, fix="Run the model that was given.", where=lacking[0]))
    return {path: total / counts[path] for path, total in sums.items()}


@contextmanager
def observed(modules: Mapping[str, p.nn.Module], observe: Callable[[str, p.Tensor], None]) -> Iterator[None]:
    """Within, every call of these modules is told, with the path and the input."""

    def hook(path: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, output: observe(path, args[0])

    handles = [module.register_forward_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _components(weight: p.Tensor, covariance: p.Tensor, rank: int, method: str) -> tuple[p.Tensor, p.Tensor, p.Tensor]:
    """`S (r)`, `U (out, r)`, `V (in, r)` of the weight, by the covariance `(in, in)`."""
    import torch

    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    damping = DAMPING
    while True:
        fixed = covariance + torch.diag(covariance.diagonal().mean().expand(len(covariance)) * damping)
        inverse = torch.linalg.inv(fixed)
        if float(torch.dist(fixed @ inverse, identity)) < WORST_INVERSE or damping > 1 / DAMPING:
            break
        damping *= 2
    left, values, rows = torch.linalg.svd(weight @ fixed, full_matrices=False)
    right = (rows @ inverse).t()
    part = slice(None, rank) if method == "ipm" else slice(len(values) - rank, None)
    return values[part].clone(), left[:, part].clone(), right[:, part].clone()


def _read(path: str | None) -> dict[str, p.Tensor] | None:
    import torch

    if path is None or not os.path.exists(path) or not os.path.getsize(path):
        return None
    found: dict[str, p.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _write(path: str | None, tensors: Mapping[str, p.Tensor]) -> None:
    import torch

    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        torch.save(dict(tensors), path)


peftc_start = p.starting(Corda())
