"""Arrow: a router weighs the other adapters on a layer, token by token (Ostapenko et al., arXiv:2405.11157, section 4.2).

Each adapter has a direction, the input that its update `B A` stretches most. A token's likeness to it is `|x · v|`; those with the
largest ones act, weighed by their softmax. With general adapters, the mean of their factors is taken off those of the others first
(GenKnowSub, https://aclanthology.org/2025.acl-short.54/), in what the router computes with: the adapters stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftc import plugin as p

from .config import LoraConfig
from .nested import ArrowConfig
from .plain import LoraTuner

if TYPE_CHECKING:
    from peftc import PeftModel

#: What `create_arrow_model` calls them.
ROUTER, TASK, GENERAL = "arrow_router", "task_", "gks_"
_GENERAL = re.compile(rf"{GENERAL}\d+")
#: Steps of the power iteration, and what keeps it from a division by zero; both are the reference's.
_STEPS, _TINY = 15, 1e-8
#: Options by which an adapter does something else than `s · B A` with factors of the layer's size, or not for all tokens.
_OTHERWISE = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "variant")

_T = TypeVar("_T")
_Factors = tuple[list["p.Tensor"], list["p.Tensor"]]


class ArrowTuner(LoraTuner):
    """`y = W x + Σ_e w_e(x) · s_e · B_e A_e x`. The factors that the router itself has do nothing; files have them."""

    supports = p.LINEAR_KINDS
    stacks_experts = False
    weighs_siblings = True
    dropout_option = ""  # what is dropped is dropped of the sum
    beside = "tokens choose among the other adapters, each for itself. Cannot merge an active Arrow router adapter"
    additive = False
    thin = p.MapTuner.thin
    of_rank = p.MapTuner.of_rank
    of_thin = p.MapTuner.of_thin  # no start, and no change of the base

    def branch(self, a: p.View[LoraConfig], x: p.Tensor, y0: p.Tensor) -> p.Tensor:
        import torch

        own, siblings = _options(a.config), a.siblings
        experts, general = _sorted({name: view.config for name, view in siblings.items()}, siblings)
        problems = [
            *_misfits({name: view.config for name, view in (experts | general).items()}),
            *_too_few(own, len(experts), len(general)),
        ]
        if problems:
            raise p.PeftcError(problems)
        weighed = {**experts, **(general if own.use_gks else {})}
        As, Bs = _factors([*weighed.values()], len(experts))

        def directions() -> p.Tensor:
            return torch.stack([_direction(A, B, own.rng_seed) for A, B in zip(As, Bs, strict=True)])

        kept = a.kept("directions", directions, slots=("lora_A", "lora_B"), of=[*weighed])
        x = x.to(kept.dtype)
        likeness = (x @ kept.T).abs()  # (..., experts)
        top, chosen = likeness.topk(own.top_k, -1)
        shares = torch.zeros_like(likeness).scatter(-1, chosen, (top / own.router_temperature).softmax(-1))
        scaled = [shares[..., place, None] * view.scaling for place, view in enumerate(experts.values())]
        weights = torch.cat([each.expand(*x.shape[:-1], len(A)) for each, A in zip(scaled, As, strict=True)], -1)
        update = (x @ torch.cat(As).T * weights) @ torch.cat(Bs, 1).T
        return torch.nn.functional.dropout(update, a.config.lora_dropout, a.training)


def _options(c: LoraConfig) -> ArrowConfig:
    assert c.arrow_config is not None
    return c.arrow_config


def _sorted(configs: Mapping[str, LoraConfig], items: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """Adapters to weigh, and general ones; routers are neither."""
    found = {name: item for name, item in items.items() if configs[name].arrow_config is None}
    general = {name: item for name, item in found.items() if _GENERAL.fullmatch(name)}
    return {name: item for name, item in found.items() if name not in general}, general


def _factors(views: Sequence[p.View[LoraConfig]], count: int) -> _Factors:
    """A `(r, in)` and B `(out, r)` of the first `count` adapters, without the mean of those of all further ones."""
    pairs: list[tuple[p.Tensor, p.Tensor]] = [(view.lora_A, view.lora_B) for view in views]
    As, Bs = ([pair[which] for pair in pairs[:count]] for which in (0, 1))
    if len(pairs) == count:
        return As, Bs
    share = [1 / (len(pairs) - count)] * (len(pairs) - count)
    A, B = (p.weighted_sum([pair[which] for pair in pairs[count:]], share) for which in (0, 1))
    return [each - A for each in As], [each - B for each in Bs]


def _direction(A: p.Tensor, B: p.Tensor, seed: int | None) -> p.Tensor:
    """The first right singular vector of `B A`, `(in,)`, up to its sign, by power iteration in single precision."""
    import torch

    wide, square = A.float(), B.float().T @ B.float()
    generator = None if seed is None else torch.Generator(A.device).manual_seed(seed)
    v = torch.randn(A.shape[1], device=A.device, dtype=wide.dtype, generator=generator)
    v = v / (v.norm() + _TINY)
    for _ in range(_STEPS):
        w = wide.T @ (square @ (wide @ v))
        v = w / (w.norm() + _TINY)
    found: p.Tensor = v.to(A.dtype)
    return found


# what cannot be weighed ------------------------------------------------------------------------------------------------


def _misfits(configs: Mapping[str, Any]) -> p.Problems:
    """Adapters on one layer that do something else than add `B A x`, or of another rank than the first."""
    first = next(iter(configs), "")
    for name, config in configs.items():
        option = next((option for option in _OTHERWISE if getattr(config, option)), None)
        if option is not None:
            what = f"`{name}` cannot be weighed by a router: it has `{option}`"
            why = "What a router weighs are updates `B A` of the layer's own size, for every token."
            yield p.rules.CANNOT_GATE(what, why=why, fix="Leave it out, or train it without.")
        if config.r != configs[first].r:
            what = f"`{name}` has a rank mismatch: {config.r} != {configs[first].r} of `{first}`"
            fix = "Weigh adapters of one rank; take the others off the model."
            yield p.rules.CANNOT_GATE(what, why="All that a router weighs have one rank.", fix=fix)


def _too_few(own: ArrowConfig, experts: int, general: int) -> p.Problems:
    """Fewer adapters than the options need."""
    if not experts:
        what = "A router has no adapters to weigh on a layer that it is on"
        why = "It adds what the others would, and nothing of its own."
        fix = "Load trained LoRA adapters beside it, as `create_arrow_model` does, or do not activate it."
        yield p.rules.CANNOT_GATE(what, why=why, fix=fix)
    elif own.top_k > experts:
        what = f"`top_k` is {own.top_k}, but there are {experts} adapters to weigh"
        yield p.rules.BAD_VALUE(what, fix="Choose fewer, or load more adapters.", where="arrow_config")
    if own.use_gks and not general:
        what = f"`use_gks` takes off what general adapters have, and none is called `{GENERAL}0` or the like"
        yield p.rules.CONTRADICTION(what, fix="Give general adapters, or leave it out.", where="arrow_config")


def _apart(model: PeftModel, names: Sequence[str]) -> p.Problems:
    """Adapters that are not on the same layers, or on other than linear ones, or do not fit together there."""
    method = model.session.plans[names[0]].peft_type
    if method != VARIANT.peft_type:
        what = f"`{names[0]}` is of {method}, and a router weighs adapters of {VARIANT.peft_type}"
        yield p.rules.CANNOT_GATE(what, fix="Name others.")
        return
    sites = {name: {site.path: site for site in model.session.plans[name].maps} for name in names}
    first = sites[names[0]]
    for name, own in sites.items():
        if own.keys() != first.keys():
            stray = sorted(own.keys() ^ first.keys())[0]
            what = f"`{name}` has a target_modules mismatch: it and `{names[0]}` are not both on `{stray}`"
            fix = "Weigh adapters of the same layers."
            yield p.rules.CANNOT_GATE(what, why="A router is on all layers of what it weighs.", fix=fix, where=stray)
        for path, site in own.items():
            if site.layer.kind not in p.LINEAR_KINDS or site.parameter:
                what = f"LoRA adapters must only target Linear-like layers, and `{name}` is on `{path}`"
                fix = "Weigh adapters of linear layers."
                yield p.rules.BAD_TARGET(what, why="Each token has to choose for itself.", fix=fix, where=path)
                break
    for path in first:
        problems = [*_misfits({name: own[path].config for name, own in sites.items() if path in own})]
        if problems:
            yield from problems
            return


def _targets(model: PeftModel, name: str) -> set[str]:
    """The last names of an adapter's layers if they mean these alone, else their paths."""
    paths = {site.path for site in model.session.plans[name].maps}
    names = {path.rpartition(".")[2] for path in paths}
    meant = {node.path for node in model.session.graph.nodes if node.path and p.matches(names, node.path)}
    return names if meant == paths else paths


def _rank(model: PeftModel, name: str) -> int:
    """The rank that an adapter has on its first layer."""
    config = model.session.plans[name].maps[0].config
    assert isinstance(config, LoraConfig)
    return config.r


# making one -----------------------------------------------------------------------------------------------------------


def create_arrow_model(
    base_model: p.nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model with trained LoRA adapters, `task_0` and so on, and an active router over them, `arrow_router`.

    Paths are folders, or repositories of the hub with a folder in it (`user/repo/folder`). With `use_gks` the general
    adapters are loaded as `gks_0` and so on. Further keywords go to `from_pretrained`. Raises `PeftcError`, with the base
    model as it was, for adapters that cannot be weighed together.
    """
    from peftc import PeftModel

    tasks, general = list(task_specific_adapter_paths or ()), list(general_adapter_paths or ())
    general = general if arrow_config.use_gks else []
    if not tasks:
        what = "`task_specific_adapter_paths` should contain at least one adapter path"
        raise p.PeftcError(p.rules.BAD_VALUE(what, fix="Name the adapters to weigh.", where="arrow_config"))
    problems = [*_too_few(arrow_config, len(tasks), len(general))]
    if problems:
        raise p.PeftcError(problems)
    named = {f"{TASK}{number}": path for number, path in enumerate(tasks)}
    named |= {f"{GENERAL}{number}": path for number, path in enumerate(general)}
    names = list(named)
    with ExitStack() as undo:
        model: PeftModel | None = None
        for name, path in named.items():
            origin, options = _origin(path, adapter_kwargs)
            if model is None:
                model = PeftModel.from_pretrained(base_model, origin, adapter_name=name, **options)
                undo.callback(model.unload)
            else:
                model.load_adapter(origin, adapter_name=name, **options)
        assert model is not None
        apart = [*_apart(model, names)]
        if apart:
            raise p.PeftcError(apart)
        known = {"task_adapter_names": names[: len(tasks)], "gks_adapter_names": names[len(tasks) :]}
        router = LoraConfig(
            arrow_config=arrow_config.model_copy(update=known),
            target_modules=_targets(model, names[0]),
            r=_rank(model, names[0]),
        )
        model.add_adapter(ROUTER, router)
        model.set_adapter(ROUTER)
        undo.pop_all()
    return model


def _origin(path: str, given: p.Options) -> tuple[str, dict[str, Any]]:
    """What to load, and how: a folder here, or a repository with a folder in it."""
    if Path(path).is_dir():
        return path, dict(given)
    owner, *rest = path.strip("/").split("/")
    if len(rest) < 2:
        return path, dict(given)
    return f"{owner}/{rest[0]}", {"subfolder": "/".join(rest[1:]), **given}


VARIANT = p.Variant(
    "LORA",
    "arrow",
    ArrowTuner(),
    chosen=lambda c: c.arrow_config is not None,
    option="arrow_config",
    summary="A router weighs a layer's other adapters by token.",
    paper="arXiv:2405.11157",
    chosen_by={"arrow_config": {"top_k": 1}},  # alone it acts on nothing, so that there is no example
)
