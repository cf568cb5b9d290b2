"""The base models of the golden cases: transformers models by class and config, and four small ones by their layers."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from peftc.testing.models import Mlp

DATA = Path(__file__).with_name("data")


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv1(self.conv0(x).relu()).mean((-1, -2)))


class SequenceNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv0(x).relu().mean(-1))


class IdsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.lin0 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.emb(x).mean(1))


class AttentionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lin0 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


SMALL: dict[str, type[nn.Module]] = {
    "mlp": Mlp,
    "conv": ConvNet,
    "conv1d": SequenceNet,
    "emb": IdsNet,
    "mha": AttentionNet,
}


def base_model(name: str) -> nn.Module:
    """The base model of that name with its weights, in evaluation mode."""
    described = json.loads((DATA / "models" / f"{name}.json").read_text(encoding="utf-8"))
    model = SMALL[name]() if described["class"] is None else _of_transformers(described)
    missing, unexpected = model.load_state_dict(load_file(DATA / "models" / f"{name}.safetensors"), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    assert not unexpected
    assert set(missing) <= tied
    return model.eval()


def _of_transformers(described: dict) -> nn.Module:
    options = dict(described["config"])
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, described["class"])(config)
    return model
