"""Packed layers made plain ones of the same numbers: for who merges into them, or goes on without the library that packed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import nn

from peftc import rules
from peftc.diagnostics import PeftcError
from peftc.host.layers import is_pretrained, is_transposed_linear
from peftc.host.loading import forget_quantization
from peftc.registry.boundary import boundary
from peftc.runtime.applying.apply import session_of
from peftc.runtime.bases.storages import storage_of
from peftc.runtime.journal import keep, keep_entry, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)


@whole
def dequantize(model: M, dtype: torch.dtype | None = None) -> M:
    """Give each packed layer of a base model, in place, an ordinary one, `nn.Linear` but in GPT-2 and the like, with the weight that it computes with, frozen; in
    `dtype`, or the one that the weight is opened in. A model of transformers calls itself quantised no more. Returns the model.

    Of one layer at a time both forms are there. Raises `PeftcError`, with nothing changed, if the model has adapters, whose
    plan is about the layers as they are.
    """
    if session_of(model) is not None:
        what = "The model has adapters, which were planned for its layers as they are"
        fix = "Call it on the base model, and load the adapter afterwards."
        raise PeftcError(rules.WHILE_ADAPTED(what, fix=fix))
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            storage = None if child is None else storage_of(child)
            if child is None or storage is None:
                continue
            if id(child) not in made:
                with boundary(f"the storage `{storage.name}`", "open", name):
                    made[id(child)] = _plain(child, storage.open(child), dtype)
            keep_entry(parent._modules, name)
            parent._modules[name] = made[id(child)]
    if made and is_pretrained(model):
        keep(model, model.config)
        forget_quantization(cast("PreTrainedModel", model))
    return model


def _plain(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype | None) -> nn.Module:
    bias = getattr(layer, "bias", None)
    made = _empty(layer, weight.shape[1], weight.shape[0], bias is not None).train(layer.training)
    own = (weight.T if is_transposed_linear(type(made)) else weight).detach()
    made.weight = nn.Parameter(own.to(dtype or weight.dtype).clone(), requires_grad=False)
    if isinstance(bias, torch.Tensor):
        made.bias = nn.Parameter(bias.detach().to(made.weight.dtype).clone(), requires_grad=False)
    return made


def _empty(layer: nn.Module, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """One without numbers, of transformers' class that stores `(in, out)` if the packed one stands for such: files have it so."""
    source = getattr(layer, "source_cls", nn.Linear)
    with torch.device("meta"):
        if isinstance(source, type) and is_transposed_linear(source):
            made: nn.Module = source(outputs, inputs)
            return made
        return nn.Linear(inputs, outputs, bias)
