"""One adapter in both libraries: made by the reference, its tensors moved at random, and handed over as a state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftc
from peftc.testing.models import MODELS, TinyModel, seeded

TINY: Mapping[str, TinyModel] = {model.name: model for model in MODELS}
LIBRARIES: tuple[Any, Any] = (peft, peftc)

#: Adapters by name: the tiny model, the config's class, and its options.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("mlp", "LoraConfig", {"target_modules": ["lin0", "lin1"], "r": 3}),
    "lora with biases": ("mlp", "LoraConfig", {"target_modules": ["lin0"], "r": 3, "bias": "all"}),
    "lora with a module": (
        "mlp",
        "LoraConfig",
        {"target_modules": ["lin0"], "r": 3, "modules_to_save": ["lin2", "norm"]},
    ),
    "lora on embeddings": ("llama", "LoraConfig", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 3}),
    "lora on convolutions": ("conv2d", "LoraConfig", {"target_modules": ["conv1", "head"], "r": 3}),
    "ia3": ("mlp", "IA3Config", {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}),
    "hra": ("mlp", "HRAConfig", {"target_modules": ["lin0", "lin1"], "r": 2}),
}


@dataclass
class Pair:
    """The same tiny model twice, and what adapts it."""

    tiny: TinyModel
    theirs: Any
    ours: Any

    def add(self, name: str, config: str, seed: int, **options: Any) -> None:
        """A further adapter with equal tensors on both sides."""
        for library, model in ((peft, self.theirs), (peftc, self.ours)):
            model.add_adapter(name, getattr(library, config)(**options))
        self.equalise(name, seed)

    def equalise(self, name: str, seed: int) -> None:
        moved(self.theirs, name, seed)
        peftc.set_peft_model_state_dict(self.ours, peft.get_peft_model_state_dict(self.theirs, adapter_name=name), name)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.output(self.theirs), self.output(self.ours)

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model(**self.tiny.arguments())
        return out if isinstance(out, Tensor) else out.logits

    def assert_alike(self) -> None:
        torch.testing.assert_close(*self.outputs(), rtol=1e-4, atol=1e-5)

    def assert_same_updates(self, adapter: str) -> None:
        """On every layer, what the adapter adds to the weight."""
        updates = [
            {name: m.get_delta_weight(adapter) for name, m in model.named_modules() if _adapts(m, adapter)}
            for model in (self.theirs, self.ours)
        ]
        assert updates[0] and updates[0].keys() == updates[1].keys()
        for name, update in updates[0].items():
            torch.testing.assert_close(updates[1][name], update, rtol=1e-4, atol=1e-5)


def _adapts(module: nn.Module, adapter: str) -> bool:
    scaling = getattr(module, "scaling", None)
    return isinstance(scaling, dict) and adapter in scaling


def pair(model: str, config: str, seed: int = 1, name: str = "default", **options: Any) -> Pair:
    """Both libraries' `PeftModel` on a tiny model, one adapter with equal tensors."""
    tiny = TINY[model]
    if tiny.is_language_model:
        options = {"task_type": "CAUSAL_LM", **options}
    made = [
        library.get_peft_model(tiny.build(), getattr(library, config)(**options), name).eval()
        for library in (peft, peftc)
    ]
    both = Pair(tiny, *made)
    both.equalise(name, seed)
    return both


def moved(model: nn.Module, adapter: str, seed: int) -> None:
    """Move every tensor of an adapter."""
    with torch.no_grad():
        for i, (key, parameter) in enumerate(sorted(model.named_parameters())):
            if f".{adapter}." in f"{key}.":
                with seeded(seed * 1000 + i):
                    parameter.add_(0.3 * torch.randn(parameter.shape))


def shaken(model: nn.Module, scale: float = 0.2) -> None:
    """Move every trainable tensor, in an order that both libraries share."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(trainable(model))):
            with seeded(seed):
                parameter.add_(scale * torch.randn(parameter.shape))


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same keys, and the same tensors bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def described(model: nn.Module) -> dict[str, Any]:
    """Shape, dtype, device and flag of every parameter by name."""
    return {n: (tuple(p.shape), p.dtype, p.device.type, p.requires_grad) for n, p in model.named_parameters()}
