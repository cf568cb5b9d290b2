"""Variants of LoRA beside the reference: files, outputs, gradients, merging, dropout, several adapters, half precision."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import monteclora
from peft.tuners.lora import variants as reference
from peftc_plugins.lora import VARIANTS
from torch import nn

import peftc
from peftc import LoraConfig, PeftcError, PeftModel, get_peft_model
from peftc.testing.models import MODELS
from tests.e2e.test_interop import Case
from tests.methods.exchange import assert_exchanged, trained_alike

DORA = {"r": 3, "use_dora": True}
BIAS = {"r": 3, "lora_bias": True}
QUANT = {"r": 3, "use_qalora": True, "qalora_group_size": 4}


#: The reference draws all that it buffers when it starts, and fills its memory with it.
MONTE = {"r": 3, "monteclora_config": {"num_samples": 4, "sample_scaler": 0.2, "use_entropy": True, "buffer_size": 2}}


def velora(**options: Any) -> dict[str, Any]:
    return {"r": 3, "velora_config": {"num_groups": 4, **options}}


def blocks(of_a: list[str], of_b: list[str], strict: bool = True) -> dict[str, Any]:
    own = {"target_modules_bd_a": of_a, "target_modules_bd_b": of_b, "nblocks": 2, "match_strict": strict}
    return {"r": 4, "use_bdlora": own}


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has QALoRA for GPTQ's layers alone; its mathematics is that of any linear layer. As it cannot merge it,
    its delta is given here."""
    cls = peft.tuners.lora.layer.Linear
    resolve = cls.resolve_lora_variant

    class OnLinear(reference.QALoraLinearVariant):
        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: Any) -> None:
            A, size = module.lora_A[active_adapter].weight, module.qalora_group_size[active_adapter]
            whole = A.repeat_interleave(size, dim=1) * (A.shape[1] / size)
            orig_weight.data += module.scaling[active_adapter] * module.lora_B[active_adapter].weight @ whole

    def resolved(layer: Any, *, config: Any, **kwargs: Any) -> Any:
        return OnLinear() if config.use_qalora else resolve(layer, config=config, **kwargs)

    monkeypatch.setattr(cls, "resolve_lora_variant", resolved)
    monkeypatch.setattr(monteclora.BufferedMontecloraSampler, "get", drawn)


def drawn(sampler: Any) -> dict[str, Any]:
    """What a sampler of the reference gives: drawn when it is needed, as here."""
    of = sampler.model
    normal = torch.randn(of.num_samples, of.in_features, of.out_features)
    wishart = torch.randn(of.out_features, of.out_features).square().sum(0).diag()
    return {"z_mvn": normal, "z_wishart": wishart, "z_dirichlet": torch.randn(of.num_samples)}


CASES = [
    Case("LoraConfig", "mlp", {**DORA, "target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"]}),
    Case("LoraConfig", "mlp", {**DORA, "target_modules": "lin[012]", "use_rslora": True, "rank_pattern": {"lin1": 2}}),
    Case("LoraConfig", "conv1d", {**DORA, "target_modules": ["conv0"]}),
    Case("LoraConfig", "conv2d", {**DORA, "target_modules": ["conv1", "head"]}),
    Case("LoraConfig", "conv3d", {**DORA, "target_modules": ["conv0", "head"]}),
    Case("LoraConfig", "embedding", {**DORA, "target_modules": ["emb", "lin0"]}),
    Case("LoraConfig", "llama", {**DORA}),
    Case("LoraConfig", "gpt2", {**DORA, "fan_in_fan_out": True}),
    Case("LoraConfig", "mlp", {**BIAS, "target_modules": ["lin0", "lin1"]}),
    Case("LoraConfig", "mlp", {**BIAS, "target_modules": ["lin0"], "init_lora_weights": False, "bias": "lora_only"}),
    Case("LoraConfig", "conv1d", {**BIAS, "target_modules": ["conv0"]}),
    Case("LoraConfig", "conv2d", {**BIAS, "target_modules": ["conv1"], "init_lora_weights": False}),
    Case("LoraConfig", "gpt2", {**BIAS, "fan_in_fan_out": True}),
    Case("LoraConfig", "mlp", {**blocks(["lin0"], ["lin1"]), "target_modules": ["lin0", "lin1"]}),
    Case("LoraConfig", "mlp", {**blocks([], ["lin0"], False), "target_modules": ["lin0", "lin1"]}),
    Case(
        "LoraConfig",
        "llama",
        {**blocks(["o_proj", "down_proj"], ["q_proj", "up_proj"], False), "target_modules": "all-linear"},
    ),
    Case("LoraConfig", "mlp", {**QUANT, "target_modules": ["lin0", "lin1"]}),
    Case("LoraConfig", "mlp", {**velora(), "target_modules": ["lin0", "lin1"]}),
    Case(
        "LoraConfig",
        "mlp",
        {**velora(num_groups=5, scale=0.5, init_type="batch_average_once"), "target_modules": "lin[012]"},
    ),
    Case("LoraConfig", "llama", {**velora(num_groups=3), "target_modules": "all-linear"}),
    Case("LoraConfig", "mlp", {**MONTE, "target_modules": ["lin0", "lin1"]}),
    Case("LoraConfig", "llama", {**MONTE}),
    Case("LoraConfig", "llama", {"r": 3, "kasa_config": {"beta": 0.1}, "target_modules": "all-linear"}),
]
#: One case for each variant and kind of layer with which two adapters, rows and half precision are tried.
SHORT = [
    case
    for case in CASES
    if case.model in ("mlp", "conv2d", "embedding") and not {"modules_to_save", "bias"} & case.options.keys()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_the_references(case: Case, tmp_path: Path) -> None:
    assert_exchanged(case, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_references(case: Case, dropout: float) -> None:
    """From one seed, with what is dropped alike."""
    theirs, ours = trained_alike(Case(case.config, case.model, {**case.options, "lora_dropout": dropout}))
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=3e-5 * scale)


def both(case: Case, dtype: torch.dtype, *adapters: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The model in both libraries with these adapters, moved at random alike; theirs first; and what it is called with."""
    model = next(model for model in MODELS if model.name == case.model)
    made = []
    for library in (peft, peftc):
        config = getattr(library, case.config)(**case.options)
        wrapped = library.get_peft_model(model.build(dtype), config, adapters[0])
        for other in adapters[1:]:
            wrapped.add_adapter(other, config)
        made.append(wrapped.eval())
    theirs, ours = made
    torch.manual_seed(5)
    with torch.no_grad():
        own = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if any(f".{adapter}" in name for adapter in adapters):
                parameter.add_(0.2 * torch.randn_like(parameter))
                own[name].copy_(parameter)
    return theirs, ours, model.arguments(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_two_active_at_once(case: Case) -> None:
    theirs, ours, arguments = both(case, torch.float32, "a", "b")
    for model in (theirs, ours):
        model.base_model.set_adapter(["a", "b"])
    expected = theirs(**arguments)
    torch.testing.assert_close(ours(**arguments), expected, rtol=1e-4, atol=1e-5)
    for model in (theirs, ours):
        model.merge_adapter()
    torch.testing.assert_close(ours(**arguments), theirs(**arguments), rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(**arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_base_in_half_precision(case: Case) -> None:
    theirs, ours, arguments = both(case, torch.bfloat16, "a")
    y = ours(**arguments)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, theirs(**arguments), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    theirs(**arguments).float().square().sum().backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1e-6
            torch.testing.assert_close(
                own[name].grad.float() / scale, parameter.grad.float() / scale, rtol=0, atol=3e-2
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_each_row_by_its_own_adapter(case: Case) -> None:
    """The reference refuses DoRA here; each row is as with its adapter alone."""
    _, ours, arguments = both(case, torch.float32, "a", "b")
    rows = len(next(iter(arguments.values())))
    alone = {}
    for name in ("a", "b"):
        ours.set_adapter(name)
        alone[name] = ours(**arguments)
    names = [("a", "b")[row % 2] for row in range(rows)]
    mixed = ours(**arguments, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)


# DoRA -----------------------------------------------------------------------------------------------------------------


def dora(layer: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], **{**DORA, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_the_formula_of_dora() -> None:
    model = dora(nn.Linear(12, 10), lora_alpha=6)
    layer = model.get_base_model()[0]
    A, B, m = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    weight = layer.base_layer.weight + 2 * B @ A
    x = torch.randn(4, 12)
    expected = x @ (weight * (m / weight.norm(dim=1)).unsqueeze(1)).T + layer.base_layer.bias
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_magnitudes_begin_as_the_norm(start: bool | str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 10)), LoraConfig(target_modules=["0"], init_lora_weights=start, **DORA)
    )
    layer = model.get_base_model()[0]
    delta = layer.get_delta_weight("default")
    updated = layer.base_layer.weight + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 3)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, updated.norm(dim=1))
    torch.testing.assert_close(layer.base_layer.weight + delta, updated)


def swapped(layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight.detach() * 3)


def written(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)


def scaled(layer: Any) -> None:
    layer.set_scale("default", 0.1)


def based(layer: Any) -> None:
    with torch.no_grad():
        layer.base_layer.weight.mul_(-0.3)


def merged_beside(layer: Any) -> None:
    """Another parameter is in the base's place then, as large as the first."""
    layer.merge()
    layer.forward(torch.ones(1, 12))
    layer.unmerge()
    layer.scaling["default"] = 0.5


def trained(layer: Any) -> None:
    """As an optimiser that writes past torch's counters does it, between calls in training."""
    layer.train()
    layer(torch.ones(1, 12))
    layer.lora_B["default"].weight.data.mul_(4)
    layer.eval()


@pytest.mark.parametrize("change", [swapped, written, scaled, based, trained, merged_beside])
def test_a_kept_norm_is_dropped_when_what_it_is_of_changes(change: Any) -> None:
    model = dora(nn.Linear(12, 10)).eval()
    layer, x = model.get_base_model()[0], torch.randn(3, 12)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            model(x)
    change(layer)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, model.merge_and_unload()(x), rtol=1e-4, atol=1e-5)


def test_no_matrix_of_the_weights_size_is_made_in_a_call() -> None:
    """Neither in training nor in evaluation, with the base in half precision too, is as much memory used at once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made = isinstance(out, torch.Tensor) and "view" not in str(function) and not out._is_view()
            if made and str(function) not in ("aten.detach.default", "aten.t.default"):
                self.most = max(self.most, out.numel())
            return out

    for dtype in (torch.float32, torch.bfloat16):
        model = dora(nn.Linear(2048, 4096).to(dtype))
        x = torch.randn(2, 2048, dtype=dtype)
        with Largest() as seen:
            model(x).sum().backward()
            model.eval()(x)
        assert seen.most <= 1024 * 2048  # rows that are widened together


def test_second_derivatives() -> None:
    model = dora(nn.Linear(5, 4).double())
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x), (x,))
    layer = model.get_base_model()[0]
    slots = [layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight]

    def penalty(fused: bool) -> list[torch.Tensor]:
        y = model(x) if fused else nn.functional.linear(x, layer.weight * 0 + folded(layer), layer.bias)
        first = torch.autograd.grad(y.square().sum(), slots, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), slots))

    for own, plain in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(own, plain)


def folded(layer: Any) -> torch.Tensor:
    """The adapted weight with the norm held constant."""
    A, B, m = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    weight = layer.base_layer.weight + layer.scaling["default"] * B @ A
    return weight * (m / weight.norm(dim=1).detach()).unsqueeze(1)


def test_experts_and_groups_are_refused() -> None:
    with pytest.raises(PeftcError, match=r"(?s)PC401.*groups"):
        dora(nn.Conv2d(4, 4, 3, groups=2), r=2)
    model = next(model for model in MODELS if model.parameters)
    with pytest.raises(PeftcError, match="use_dora"):
        get_peft_model(model.build(), LoraConfig(target_parameters=list(model.parameters), **DORA))
    with pytest.raises(PeftcError, match="use_dora"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(target_modules=["0"], **DORA))


def test_every_variant_has_a_case_with_the_reference() -> None:
    for variant in VARIANTS:
        if variant.name in ("alora", "arrow"):  # need what these cases do not have: places in rows, other adapters
            continue
        assert any(variant.acts(LoraConfig(**case.options)) for case in CASES), variant.name


def test_a_second_adapter_with_another_merged_into_the_base() -> None:
    model, x = dora(nn.Linear(12, 10)).eval(), torch.randn(3, 12)
    model.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False, r=2))
    with torch.no_grad():
        before = model(x)
        model.base_model.merge_adapter(adapter_names=["other"])
        model(x)
        model.base_model.unmerge_adapter()
        torch.testing.assert_close(model(x), before)


# VeLoRA ---------------------------------------------------------------------------------------------------------------


def one(**options: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 6))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False, **options))
    return model, model.get_base_model()[0]


def test_backward_keeps_no_input() -> None:
    model, _ = one(**velora(num_groups=2))
    kept: list[int] = []
    x = torch.randn(64, 10)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    assert x.numel() not in kept


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
def test_when_the_direction_moves(kind: str) -> None:
    model, layer = one(**velora(num_groups=2, init_type=kind))
    seen = [layer.lora_velora_embed["default"].clone()]
    for step in range(3):
        torch.manual_seed(step)
        model.train(step != 1)(torch.randn(8, 10) + step)
        seen.append(layer.lora_velora_embed["default"].clone())
    moved = [not torch.equal(one, other) for one, other in pairwise(seen)]
    assert moved == {"random": [False] * 3, "batch_average_once": [True, False, False]}.get(kind, [True, False, True])
    assert all(torch.isclose(direction.norm(), torch.tensor(1.0)) for direction in seen[1:])


def test_an_input_of_zeros_has_a_direction() -> None:
    model, layer = one(**velora(num_groups=2))
    model.train()(torch.zeros(2, 10)).sum().backward()
    torch.testing.assert_close(layer.lora_velora_embed["default"], torch.full((5,), 5**-0.5))


def test_a_model_that_calls_a_layer_twice_before_backward() -> None:
    model, _ = one(**velora(num_groups=2))
    model.train()
    (model(torch.randn(4, 10)).sum() + model(torch.randn(4, 10)).sum()).backward()


# MonteCLoRA -----------------------------------------------------------------------------------------------------------


class Losing(nn.Module):
    """A model that computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        from types import SimpleNamespace

        y = self.lin(x)
        return SimpleNamespace(logits=y, loss=None if labels is None else (y - labels).square().mean())


def sampled() -> list[Any]:
    """The model in both libraries, theirs first, in training and moved alike."""
    found = []
    for library in (peft, peftc):
        torch.manual_seed(0)
        model = library.get_peft_model(Losing(), library.LoraConfig(target_modules=["lin"], **MONTE)).train()
        torch.manual_seed(1)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data.normal_()
        found.append(model)
    return found


def test_the_term_of_the_loss_is_added_once() -> None:
    """By the model's loss where it has one, else when it is asked for. The reference's divergence of Dirichlet weights has a
    sign wrong, and is compared by what remains."""
    theirs, ours = sampled()
    x = torch.randn(4, 8)
    torch.manual_seed(2)
    whole = ours(x, labels=x)
    plain = (whole.logits - x).square().mean()
    assert ours._get_monteclora_loss() == 0.0
    torch.manual_seed(2)
    ours(x)
    term = ours._get_monteclora_loss()
    torch.testing.assert_close(whole.loss - plain, term)
    assert ours._get_monteclora_loss() == 0.0
    torch.manual_seed(2)
    theirs(x)
    (sampler,) = (m for m in theirs.modules() if isinstance(m, monteclora.MontecloraSampler))
    alpha = sampler.expert_weights_prior.exp()
    prior = torch.distributions.Dirichlet(torch.full_like(alpha, sampler.dirichlet_prior))
    right = torch.distributions.kl_divergence(torch.distributions.Dirichlet(alpha), prior)
    expected = theirs._get_monteclora_loss() + sampler.kl_loss_weight * (right - sampler.dirichlet_kl(alpha))
    torch.testing.assert_close(term, expected)
    for loss in (term, expected):
        loss.backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "sampler" in name:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_nothing_is_sampled_outside_of_training() -> None:
    _, ours = sampled()
    ours.eval()
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    y = ours(x, labels=x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(y.loss, (y.logits - x).square().mean())
    torch.testing.assert_close(ours.merge_and_unload()(x).logits, y.logits)
