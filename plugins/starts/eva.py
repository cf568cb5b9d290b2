"""EVA: A are the directions in which the inputs of a layer vary most, and layers get ranks by how much these explain
(Paischer et al., arXiv:2410.07170).

An adapter is made first, with B zero, and then begun by `initialize_lora_eva_weights`, which runs sample data through the model
until the directions settle.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, ClassVar

from peftc import plugin as p

from .corda import observed
from .incremental import Components

if TYPE_CHECKING:
    from peftc import PeftModel

#: Above this `rho` is taken for as much as the model's widths allow.
LARGE_RHO = 1000
#: After so many batches the directions are taken not to settle.
MOST_BATCHES = 10_000
#: What stands before paths in a wrapped model.
ROOT = "base_model.model."


class EvaConfig(p.ConfigModel):
    """How directions and ranks are found (`eva_config`)."""

    rho: int | float = p.Field(default=2.0, ge=1)
    """How many times its rank a layer may get; 1 leaves all ranks as they are."""
    tau: int | float = p.Field(default=0.99, ge=0, le=1)
    """The cosine of a direction before and after a batch from which on it has settled."""
    use_label_mask: bool = True
    """Leave tokens out that have no label."""
    label_mask_value: int = -100
    """The label that means none."""
    whiten: bool = False
    """Divide each direction by the square root of its singular value."""
    adjust_scaling_factors: bool = True
    """Let the scaling of a layer stay as it was where its rank changes."""


class Eva(p.Start):
    """A of what was found for the layer, else as the method drew it; B is zero."""

    name: ClassVar[str] = "eva"
    summary: ClassVar[str] = (
        "A in the directions in which the inputs of sample data vary most, with ranks to match; B is zero."
    )
    paper: ClassVar[str] = "arXiv:2410.07170"
    reads: ClassVar[p.Reads] = p.Reads.INPUTS
    can_wait: ClassVar[bool] = True
    helper: ClassVar[str] = "initialize_lora_eva_weights"
    options: ClassVar[str] = "eva_config"

    def factors(self, s: p.StartView) -> p.Begun:
        found = s.data.get("A")
        A = None if found is None else found.to(s.weight)
        return p.Begun(A, s.weight.new_zeros(s.weight.shape[0], s.rank))

    def prepare(self, model: p.nn.Module, c: p.PeftConfig, batches: Sequence[p.Tensors]) -> p.PeftConfig:
        return _begun_with(model, c, get_eva_state_dict(model, batches, c))


def _config(c: p.PeftConfig) -> EvaConfig:
    return getattr(c, "eva_config", None) or EvaConfig()


# what goes through the model ------------------------------------------------------------------------------------------


def forward_fn_dict(model: p.nn.Module, inputs: Any) -> Any:
    """Call a model with a batch that is a dictionary."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: p.PeftConfig) -> Any:
    """Which tokens of a batch count: `(n, 2)` of row and place, without padding and, if asked for, without tokens that have
    no label. Raises `PeftcError` for a batch that is no dictionary."""
    import torch

    if not isinstance(model_input, Mapping):
        what = f"The batch is a {type(model_input).__name__}, not a dictionary of a language model's inputs"
        fix = "Give another `prepare_model_inputs_fn`, and a `prepare_layer_inputs_fn` that goes with it; None uses all rows."
        raise p.PeftcError(p.rules.START_DATA(what, fix=fix))
    how = _config(peft_config)
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if how.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != how.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> p.Tensor:
    """The inputs `(n, features)` of a layer for the tokens that count."""
    found: p.Tensor = _first(layer_input)[model_input.T.unbind()]
    return found


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> p.Tensor:
    x = _first(layer_input)
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x


def _first(layer_input: Any) -> p.Tensor:
    x: p.Tensor = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x


PrepareModel = Callable[[Any, p.PeftConfig], Any]
PrepareLayer = Callable[[Any, Any, str], "p.Tensor"]


# finding directions ---------------------------------------------------------------------------------------------------


def get_eva_state_dict(
    model: p.nn.Module,
    dataloader: Iterable[Any],
    peft_config: p.PeftConfig | None = None,
    forward_fn: Callable[[p.nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer | dict[str, PrepareLayer] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, p.Tensor]:
    """The directions of each layer `(rank, features)`, as many as the rank that it gets, by its name in the model.

    Works on a base model, with a config, and on an adapted one, whose adapters do not act meanwhile. The dataloader is gone
    through until the directions settle. `show_progress_bar` is accepted, and nothing is shown. Raises `PeftcError`: no config, no data,
    functions for layers that are not there, directions that do not settle.
    """
    import torch

    adapted = getattr(model, "peft_config", None)
    peft_config = adapted[adapter_name] if peft_config is None and adapted else peft_config
    if peft_config is None:
        what = "peft_config is required if model is not a PeftModel"
        raise p.PeftcError(p.rules.START_DATA(what, fix="Give the config of the adapter."))
    root = ROOT if adapted else ""
    targets = p.start_targets(model.get_base_model() if adapted else model, peft_config)  # type: ignore[operator]
    names = {f"{root}{path}": target for path, target in targets.items()}
    functions = _by_layer(names, prepare_layer_inputs_fn)
    search = _Search(
        model, peft_config, names, functions, forward_fn, prepare_model_inputs_fn, gather_distributed_inputs
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if adapted else nullcontext():  # type: ignore[operator]
            return search.run(dataloader)
    finally:
        model.train(training)


def _by_layer(names: Iterable[str], given: PrepareLayer | Mapping[str, PrepareLayer] | None) -> dict[str, PrepareLayer]:
    if isinstance(given, Mapping):
        strange = given.keys() - set(names)
        if strange:
            what = f"`prepare_layer_inputs_fn` names {sorted(strange)[0]!r}, which is no layer that the adapter is on"
            raise p.PeftcError(p.rules.START_DATA(what, fix="Use names of `model.named_modules()`."))
        return {name: given.get(name, _all_rows) for name in names}
    return dict.fromkeys(names, given or _all_rows)


class _Search:
    """One search for directions. Layers with the same input share them."""

    def __init__(
        self,
        model: p.nn.Module,
        config: p.PeftConfig,
        layers: Mapping[str, Any],
        functions: Mapping[str, PrepareLayer],
        forward: Callable[[p.nn.Module, Any], Any],
        prepare: PrepareModel | None,
        gathers: bool,
    ) -> None:
        self._model, self._config, self._how = model, config, _config(config)
        self._layers, self._functions = layers, functions
        self._forward, self._prepare, self._gathers = forward, prepare, gathers

    def run(self, dataloader: Iterable[Any]) -> dict[str, p.Tensor]:
        first = next(iter(dataloader), None)
        if first is None:
            raise p.PeftcError(p.rules.START_DATA("dataloader is empty", fix="Give some examples."))
        ranks = {name: layer.rank for name, layer in self._layers.items()}
        rho = (
            self._how.rho if "rank_pattern" in type(self._config).pattern_options else 1
        )  # else all ranks are one option
        if rho > LARGE_RHO:
            rho = min(rho, max(max(own.shape) for own in self._model.parameters()) // max(ranks.values()))
        most = {name: min(round(rank * rho), self._layers[name].site.layer.fan_in) for name, rank in ranks.items()}
        same = self._same_inputs(first)
        for name in same:  # layers with one input have one number of directions
            alike = [other for other in same if same[other] == same[name]]
            most[name] = max(most[other] for other in alike)
        found = {name: Components(most[name], self._how.tau) for name in dict.fromkeys(same.values())}
        given, budget = dict(most), sum(ranks.values())
        for batch in islice(cycle(dataloader), MOST_BATCHES):
            open_ = [name for name, own in found.items() if not bool(own.settled[: given[name]].all())]
            if not open_:
                return self._directions(found, same, given)
            self._observe(batch, {name: found[name].add for name in open_})
            if all(own.components is not None for own in found.values()):
                given = _distributed(found, same, budget, most)
        what = f"Directions did not settle in {MOST_BATCHES:,} batches"
        fix = f"Give larger batches: `rho` {self._how.rho} and the rank need at least {max(most.values())} tokens in one; or a smaller `tau`."
        raise p.PeftcError(p.rules.START_DATA(what, fix=fix))

    def _same_inputs(self, batch: Any) -> dict[str, str]:
        """Layer -> the first layer with the same input."""
        digests: dict[str, bytes] = {}

        def note(name: str) -> Callable[[p.Tensor], None]:
            def take(rows: p.Tensor) -> None:
                told = rows.detach().to("cpu").float().contiguous()
                digests[name] = hashlib.sha256(repr(told.shape).encode() + told.numpy().tobytes()).digest()

            return take

        self._observe(batch, {name: note(name) for name in self._layers})
        lacking = [name for name in self._layers if name not in digests]
        if lacking:
            what = f"The data does not reach `{lacking[0]}`, one of {len(lacking)} such layers"
            raise p.PeftcError(p.rules.START_DATA(what, fix="Leave them out of the adapter.", where=lacking[0]))
        first: dict[bytes, str] = {}
        return {name: first.setdefault(digests[name], name) for name in self._layers}

    def _observe(self, batch: Any, take: Mapping[str, Callable[[p.Tensor], None]]) -> None:
        batch = _moved(batch, next((own.device for own in self._model.parameters() if not own.is_meta), None))
        about = deepcopy(batch) if self._prepare is None else self._prepare(batch, self._config)

        def observe(name: str, x: Any) -> None:
            rows = self._functions[name](x, about, name)
            take[name](_gathered(rows) if self._gathers else rows)

        with observed({name: self._layers[name].called for name in take}, observe):
            self._forward(self._model, batch)

    def _directions(
        self, found: Mapping[str, Components], same: Mapping[str, str], ranks: Mapping[str, int]
    ) -> dict[str, p.Tensor]:
        result = {}
        for name in [*found, *(name for name in same if name not in found)]:
            own = found[same[name]]
            assert own.components is not None and own.values is not None
            rows = own.components[: ranks[name]]
            if self._how.whiten:
                rows = rows / own.values[: ranks[name]].sqrt()[:, None]
            result[name] = rows.clone()
        return result


def _distributed(
    found: Mapping[str, Components], same: Mapping[str, str], budget: int, most: Mapping[str, int]
) -> dict[str, int]:
    """How many directions each layer gets: all layers' shares of variance compete for the sum of the ranks."""
    import torch

    order = [*found, *(name for name in same if name not in found)]
    shares = [(name, share) for name in order for share in found[same[name]].shares[: most[same[name]]]]  # type: ignore[index]
    strongest = torch.stack([share for _, share in shares]).argsort(descending=True)[:budget]
    counts = Counter(shares[index][0] for index in strongest.tolist())
    ranks = {name: counts.get(name, 0) for name in order}
    for name in order:  # who has the directions of several has at least as many as they
        first = same[name]
        if ranks[first] < ranks[name]:
            ranks[first], ranks[name] = ranks[name], ranks[first]
    return ranks


def _moved(batch: Any, device: Any) -> Any:
    to = getattr(batch, "to", None)
    if device is None or callable(to):
        return to(device) if callable(to) and device is not None else batch
    if isinstance(batch, Mapping):
        return {name: _moved(part, device) for name, part in batch.items()}
    return type(batch)(_moved(part, device) for part in batch) if isinstance(batch, (tuple, list)) else batch


def _gathered(rows: p.Tensor) -> p.Tensor:
    """Those of all processes, where there are several."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return rows
    import torch

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.to("cpu"))
    return torch.cat(parts).to(rows.device)


# beginning ------------------------------------------------------------------------------------------------------------


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, p.Tensor] | None = None,
    forward_fn: Callable[[p.nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer | dict[str, PrepareLayer] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter with `init_lora_weights: eva` begin in the directions of a dataloader, or of what `get_eva_state_dict`
    gave. Layers get other ranks (`rank_pattern`); one that gets none is left out of the adapter.

    Raises `PeftcError`, with the model as it was: another start, several active adapters, neither data nor directions.
    """
    config = model.peft_config[adapter_name]
    _refuse(model, config, dataloader, eva_state_dict)
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(
            model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    found = {name.removeprefix(ROOT): rows for name, rows in eva_state_dict.items()}
    p.begin_anew(model, _begun_with(model.get_base_model(), config, found), adapter_name)


def _begun_with(base: p.nn.Module, config: p.PeftConfig, found: Mapping[str, p.Tensor]) -> p.PeftConfig:
    """The options with the ranks that go with directions, by path; these are gathered for the layers. Where the scaling is no
    option by layer, there is none to adjust."""
    how, targets, options = _config(config), p.start_targets(base, config), type(config).pattern_options
    ranks = {path: len(found[path]) if path in found else target.rank for path, target in targets.items()}
    ranks = {path: rank for path, rank in ranks.items() if rank}
    changes: dict[str, Any] = {"target_modules": set(ranks)}
    if "rank_pattern" in options:
        usual = getattr(config, options["rank_pattern"])
        changes["rank_pattern"] = {path: rank for path, rank in ranks.items() if rank != usual}
    if "alpha_pattern" in options:
        name = options["alpha_pattern"]
        alphas = {path: getattr(targets[path].config, name) for path in ranks}
        if how.adjust_scaling_factors:
            alphas = {path: alpha * (ranks[path] / targets[path].rank) for path, alpha in alphas.items()}
        changes["alpha_pattern"] = {path: alpha for path, alpha in alphas.items() if alpha != getattr(config, name)}
    if Eva.options in type(config).model_fields:
        changes[Eva.options] = how
    lacking = [path for path in ranks if path not in found]
    if lacking:
        what = f"No directions are given for {len(lacking)} layers, such as `{lacking[0]}`: they begin at random"
        p.warn([p.rules.START_SPARED(what, fix="Leave them out, if that is not meant.", where=lacking[0])])
    for path in ranks:
        if path in found:
            targets[path].gather(A=found[path])
    return config.model_copy(update=changes)


def _refuse(model: PeftModel, config: p.PeftConfig, dataloader: object, found: object) -> None:
    if len(model.active_adapters) > 1:
        what = "`initialize_lora_eva_weights` currently only works with a single active adapter"
        raise p.PeftcError(p.rules.START_DATA(what, fix="Activate that adapter alone."))
    if getattr(config, "init_lora_weights", None) != "eva":
        what = "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        raise p.PeftcError(p.rules.START_DATA(what, fix="Make the adapter with that option."))
    if dataloader is None and found is None:
        what = "dataloader is required if eva_state_dict is not provided"
        raise p.PeftcError(p.rules.START_DATA(what, fix="Give one of them."))


peftc_start = p.starting(Eva())
