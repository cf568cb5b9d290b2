"""The table of bases: for each way of storing a weight, how a tiny model stored so is made, and why it is not if it is not.

Every model is the same Llama (hidden 64, two layers, 128 tokens, seeded), quantised by the library itself: through
`from_pretrained` on a folder where transformers does it, else by the library's own call. Packages that cannot be had
here are stood in for by layers of the same name and layout, which the record says (`stands_in`).
"""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers of every model that are stored so; `lm_head`, the embedding and the norms never are."""

FIRST = "model.layers.0.self_attn.q_proj"
"""A layer to look at: 64 inputs, 64 outputs, no bias."""

IDS = torch.arange(24).reshape(2, 12) * 5 % 128
"""Token ids (2, 12) to call the models with: enough rows for every kernel."""


@dataclass(frozen=True)
class Base:
    """One way of storing weights, as a tiny model.

    `build` gets a folder to write in; `dtype` is that of the model's activations; `flows` says whether gradients go
    through its layers to their inputs; `runs` whether the layers run on the CPU as they are stored, or why not.
    """

    name: str
    package: str
    build: Callable[[Path], nn.Module]
    dtype: torch.dtype = torch.float32
    flows: bool = True
    opens: bool = False
    lets_through: bool = False
    stands_in: bool = False
    runs: str = ""
    needs: tuple[str, ...] = field(default=())

    @property
    def passes(self) -> bool:
        """Whether gradients pass once adapters are on the model."""
        return self.flows or self.lets_through

    def missing(self) -> str:
        """Why this base cannot be made here, or nothing: which package is not installed."""
        for package in () if self.stands_in else (self.package, *self.needs):
            if not installed(package):
                return f"{self.name}: the package {package} is not installed"
        return ""

    def made(self, folder: Path) -> nn.Module:
        """The model, freshly made; the test is skipped with the reason if the package is missing."""
        if reason := self.missing():
            pytest.skip(reason)
        return self.build(folder)


def installed(package: str) -> bool:
    """Whether `package` can be imported, by its name and those of the packages around it."""
    parts = package.split(".")
    return all(find_spec(".".join(parts[: end + 1])) is not None for end in range(len(parts)))


@functools.cache
def float_folder() -> Path:
    """The folder of the float model that all are made from, in float32; written once per session."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.mkdtemp(prefix="bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=128,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The model of `folder` (the float one by default) as transformers loads it, in silence."""
    from transformers import AutoModelForCausalLM

    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder or float_folder(), dtype=dtype, **options)
    finally:
        quiet.setLevel(level)
    return model


def exchanged(make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The float model with what `make` makes of each of its linear layers in their place."""
    model = loaded(dtype=dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in LINEARS:
            model.set_submodule(name, make(layer))
    model.requires_grad_(False)
    return model


def bitsandbytes(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[Path], nn.Module]:
    """bitsandbytes through transformers; `options` are those of `BitsAndBytesConfig`."""

    def build(folder: Path) -> nn.Module:
        from transformers import BitsAndBytesConfig

        return loaded(dtype=dtype, quantization_config=BitsAndBytesConfig(**options))

    return build


def four_bits(kind: str, dtype: torch.dtype = torch.float32, double: bool = False) -> Callable[[Path], nn.Module]:
    """bitsandbytes in 4 bits of `kind`, computing in `dtype`."""
    return bitsandbytes(
        dtype,
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
    )


def torchao(config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Callable[[Path], nn.Module]:
    """torchao through transformers; `config` makes the library's own configuration."""

    def build(folder: Path) -> nn.Module:
        from transformers import TorchAoConfig

        return loaded(dtype=dtype, quantization_config=TorchAoConfig(config()))

    return build


def torchao_int8() -> Any:
    """int8 per row, weight only."""
    return importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()


def torchao_int8_dynamic() -> Any:
    """int8 per row, inputs in int8 too, at every call."""
    return importlib.import_module("torchao.quantization").Int8DynamicActivationInt8WeightConfig()


def torchao_float8() -> Any:
    """float8 per row, weight only."""
    return importlib.import_module("torchao.quantization").Float8WeightOnlyConfig()


def torchao_intx4() -> Any:
    """int4 in groups of 32, one byte each: the form of int4 that torchao has for every device."""
    from torchao.quantization.granularity import PerGroup

    library = importlib.import_module("torchao.quantization")
    return library.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def torchao_int4_opaque(folder: Path) -> nn.Module:
    """int4 in groups of 32, packed for the CPU's kernel: torchao's own call, since transformers has none for it."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = loaded(dtype=torch.bfloat16)
    config = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    quantize_(model, config, lambda layer, name: isinstance(layer, nn.Linear) and name.rpartition(".")[2] in LINEARS)
    model.requires_grad_(False)
    return model


def quanto(weights: str) -> Callable[[Path], nn.Module]:
    """optimum-quanto through transformers."""

    def build(folder: Path) -> nn.Module:
        from transformers import QuantoConfig

        return loaded(quantization_config=QuantoConfig(weights=weights))

    return build


def hqq(bits: int) -> Callable[[Path], nn.Module]:
    """HQQ by its own call: transformers 5.24 raises NotImplementedError for it."""

    def build(folder: Path) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        return exchanged(lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"))

    return build


def compressed(activations: bool = False, **weights: Any) -> Callable[[Path], nn.Module]:
    """A compressed-tensors checkpoint, written with scales by rounding to nearest and loaded through transformers."""

    def build(folder: Path) -> nn.Module:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(symmetric=True, **weights)
        inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True) if activations else None
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
        model = loaded()
        apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and "weight_scale" in layer._parameters:
                groups = layer.weight.detach().unflatten(1, (-1, args.group_size or layer.in_features))
                scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
                layer.weight_scale.data.copy_(scale)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(str(folder))
        return loaded(folder)

    return build


def gguf_transformers(kind: str) -> Callable[[Path], nn.Module]:
    """transformers' `GgufLinear`, put in by hand: loading keeps blocks packed only with a kernel of the hub."""

    def build(folder: Path) -> nn.Module:
        import gguf
        from transformers.integrations.gguf.utils import GgufLinear

        chosen = gguf.GGMLQuantizationType[kind]

        def make(layer: nn.Linear) -> nn.Module:
            packed = GgufLinear(layer.in_features, layer.out_features, int(chosen))
            packed.weight.data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), chosen).copy())
            return packed

        return exchanged(make)

    return build


def gguf_diffusers(kind: str) -> Callable[[Path], nn.Module]:
    """diffusers' `GGUFLinear` with its `GGUFParameter`, as its loader puts them in."""

    def build(folder: Path) -> nn.Module:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        chosen = gguf.GGMLQuantizationType[kind]

        def make(layer: nn.Linear) -> nn.Module:
            packed = GGUFLinear(layer.in_features, layer.out_features, False, compute_dtype=torch.float32)
            blocks = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), chosen).copy())
            packed.weight = GGUFParameter(blocks, quant_type=chosen)
            return packed

        return exchanged(make)

    return build


def layerwise(folder: Path) -> nn.Module:
    """diffusers' layerwise casting: weights rest in float8, each layer is cast for its own call."""
    from diffusers.hooks import apply_layerwise_casting

    model = loaded(dtype=torch.bfloat16)
    apply_layerwise_casting(
        model,
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=torch.bfloat16,
        skip_modules_pattern=("norm", "lm_head", "embed_tokens"),
    )
    model.requires_grad_(False)
    return model


def gptq(folder: Path) -> nn.Module:
    """GPTQ in 4 bits, by the stand-in for gptqmodel's layer."""
    from tests.bases.standins import TorchQuantLinear

    return exchanged(TorchQuantLinear)


def awq(folder: Path) -> nn.Module:
    """AWQ in 4 bits, by the stand-in for gptqmodel's layer."""
    from tests.bases.standins import AwqTorchLinear

    return exchanged(AwqTorchLinear)


def fp8(folder: Path) -> nn.Module:
    """transformers' `FP8Linear` in blocks of 32, put in by hand: loading opens FP8 where there is no GPU."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    def make(layer: nn.Linear) -> nn.Module:
        packed = FP8Linear(layer.in_features, layer.out_features, block_size=(32, 32))
        blocks = layer.weight.detach().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        packed.weight.data = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        packed.weight_scale_inv.data = scales
        return packed

    return exchanged(make)


HALF = torch.bfloat16
MADE = (
    Base("bitsandbytes 8-bit", "bitsandbytes", bitsandbytes(load_in_8bit=True)),
    Base("bitsandbytes fp4", "bitsandbytes", four_bits("fp4")),
    Base("bitsandbytes nf4", "bitsandbytes", four_bits("nf4")),
    Base("bitsandbytes nf4 double", "bitsandbytes", four_bits("nf4", double=True)),
    Base("bitsandbytes nf4 double bfloat16", "bitsandbytes", four_bits("nf4", HALF, double=True), dtype=HALF),
    Base("torchao int8", "torchao", torchao(torchao_int8)),
    Base("torchao int8 dynamic", "torchao", torchao(torchao_int8_dynamic), flows=False),
    Base("torchao intx4", "torchao", torchao(torchao_intx4)),
    Base("torchao int4 opaque", "torchao", torchao_int4_opaque, dtype=HALF, flows=False),
    Base("torchao float8", "torchao", torchao(torchao_float8)),
    Base("quanto int8", "optimum.quanto", quanto("int8")),
    Base("quanto int4", "optimum.quanto", quanto("int4"), needs=("ninja",)),
    Base("quanto float8", "optimum.quanto", quanto("float8")),
    Base("hqq 8-bit", "hqq", hqq(8), needs=("termcolor",)),
    Base("hqq 4-bit", "hqq", hqq(4), needs=("termcolor",)),
    Base(
        "compressed-tensors int4",
        "compressed_tensors",
        compressed(num_bits=4, type="int", strategy="group", group_size=32),
        opens=True,
    ),
    Base(
        "compressed-tensors int8",
        "compressed_tensors",
        compressed(num_bits=8, type="int", strategy="channel"),
        opens=True,
    ),
    Base(
        "compressed-tensors float8",
        "compressed_tensors",
        compressed(num_bits=8, type="float", strategy="channel"),
        opens=True,
    ),
    Base(
        "compressed-tensors float8 dynamic",
        "compressed_tensors",
        compressed(activations=True, num_bits=8, type="float", strategy="channel"),
        flows=False,
        opens=True,
        lets_through=True,
    ),
    Base("gguf transformers q8_0", "gguf", gguf_transformers("Q8_0")),
    Base("gguf transformers q4_0", "gguf", gguf_transformers("Q4_0")),
    Base("gguf diffusers q8_0", "diffusers", gguf_diffusers("Q8_0"), needs=("gguf",)),
    Base("gguf diffusers q4_0", "diffusers", gguf_diffusers("Q4_0"), needs=("gguf",)),
    Base("layerwise float8", "diffusers", layerwise, dtype=HALF),
    Base("gptq", "gptqmodel", gptq, stands_in=True),
    Base("awq", "gptqmodel", awq, stands_in=True),
    Base("fp8", "transformers", fp8, runs="transformers' kernel for FP8 exists for GPUs alone"),
)

BASES: Mapping[str, Base] = {base.name: base for base in MADE}
"""Every base by its name."""
