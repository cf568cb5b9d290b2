"""A tiny Stable Diffusion pipeline: everything that diffusers does with adapters, on the UNet and the text encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from common import drawn, fill, parameters, write
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = "pytorch_lora_weights.safetensors"


def pipeline() -> StableDiffusionPipeline:
    """The same weights in every process; in float64, because denoising multiplies rounding errors."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=8)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
        )
    )
    with torch.no_grad():
        for part in (unet, vae, text):
            for name, parameter in part.named_parameters():
                if parameter.dim() > 1:
                    parameter.copy_(drawn(name, parameter.shape, 0.15))
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made.to(dtype=torch.float64)


def image(pipe: StableDiffusionPipeline, scale: float | None = None) -> list[float]:
    """Some latents of two steps of denoising."""
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        hidden = pipe.text_encoder(ids)[0]
        made = pipe(
            prompt_embeds=hidden,
            negative_prompt_embeds=torch.zeros_like(hidden),
            latents=drawn("latents", (1, 4, 8, 8), 1.0).double(),
            num_inference_steps=2,
            output_type="latent",
            cross_attention_kwargs=None if scale is None else {"scale": scale},
        ).images
    return made.flatten()[::7].tolist()


def adapters(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    return {"active": pipe.get_active_adapters(), "all": pipe.get_list_adapters()}


def train() -> dict[str, Any]:
    """As the training scripts do: adapters on both parts, a few steps, and a file each with its metadata."""
    results: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {
        "first": {"r": 4, "lora_alpha": 4},
        "second": {"r": 2, "lora_alpha": 6, "init_lora_weights": "gaussian"},
        "same_rank": {"r": 4, "lora_alpha": 4},
        "ranks": {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2, "attn2.to_out.0": 3}},
        "convolutions": {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "conv1", "conv2"]},
    }
    for name, chosen in options.items():
        pipe = pipeline()
        pipe.unet.requires_grad_(False)
        pipe.text_encoder.requires_grad_(False)
        chosen = {"target_modules": ATTENTION, **chosen}
        pipe.unet.add_adapter(LoraConfig(**chosen))
        on_text = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        pipe.text_encoder.add_adapter(on_text)
        fill(pipe.unet, name)
        fill(pipe.text_encoder, name)
        results[name] = {"unet": parameters(pipe.unet), "losses": losses(pipe)}
        pipe.save_lora_weights(
            save_directory=name,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
            text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
            # without it, as in most files on the hub, diffusers makes the config from ranks and names of the tensors
            **(
                {}
                if name == "ranks"
                else _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
            ),
        )
        pipe.unet.save_lora_adapter(f"{name}-unet", weight_name=FILE)
    return results


def losses(pipe: StableDiffusionPipeline) -> list[float]:
    chosen = [p for part in (pipe.unet, pipe.text_encoder) for p in part.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(chosen, lr=0.1), []
    for step in range(2):
        hidden = pipe.text_encoder(torch.arange(12).reshape(1, 12))[0]
        out = pipe.unet(drawn(f"noisy {step}", (1, 4, 8, 8), 1.0).double(), 5, hidden).sample
        loss = (out - drawn(f"noise {step}", (1, 4, 8, 8), 1.0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def load() -> dict[str, Any]:
    """One file after another under their own names; weights, scales, switching off, deleting, unloading."""
    pipe = pipeline()
    results = {"base": image(pipe)}
    for name in ("first", "second"):
        pipe.load_lora_weights(name, weight_name=FILE, adapter_name=name)
        results[name] = image(pipe)
    results["scaled"] = image(pipe, scale=0.4)
    results["loaded"] = adapters(pipe)
    results["parameters"] = parameters(pipe.unet)
    pipe.set_adapters(["first", "second"], [0.5, 0.8])
    results["two"] = image(pipe)
    results["two at zero"] = image(pipe, scale=0.0)
    by_block = {"unet": {"down": 0.9, "mid": 0.2, "up": {"block_0": 0.6}}, "text_encoder": 0.5}
    pipe.set_adapters(["first", "second"], [by_block, 0.3])
    results["by block"] = image(pipe)
    pipe.set_adapters("second")
    pipe.disable_lora()
    results["off"] = image(pipe)
    pipe.enable_lora()
    results["on"] = image(pipe)
    pipe.set_lora_device(["first"], "cpu")
    pipe.delete_adapters("first")
    results["deleted"] = [image(pipe), adapters(pipe)]
    pipe.load_lora_weights("same_rank", weight_name=FILE, adapter_name="first")
    pipe.set_adapters(["first", "second"], [0.5, 0.8])
    results["again"] = [image(pipe), adapters(pipe)]
    pipe.unload_lora_weights()
    results["unloaded"] = [image(pipe), adapters(pipe), parameters(pipe.unet)]
    pipe.load_lora_weights("first", weight_name=FILE)
    pipe.load_lora_weights("second", weight_name=FILE)
    results["unnamed"] = [image(pipe), adapters(pipe)]
    return results


def part() -> dict[str, Any]:
    """The plain file of one part, with adapters of convolutions; and the functions that training scripts use."""
    pipe = pipeline()
    results: dict[str, Any] = {}
    pipe.unet.load_lora_adapter("convolutions-unet", weight_name=FILE, prefix=None, adapter_name="b")
    results["image"] = [image(pipe), image(pipe, scale=0.5), parameters(pipe.unet)]
    pipe.unet.save_lora_adapter("convolutions-unet-again", adapter_name="b")
    state = get_peft_model_state_dict(pipe.unet, adapter_name="b")
    results["state"] = {key: value.double().sum().item() for key, value in state.items()}
    halved = {key: value / 2 for key, value in state.items()}
    outcome = set_peft_model_state_dict(pipe.unet, {**halved, "stray.lora_A.weight": torch.zeros(1)}, "b")
    results["unexpected"] = list(outcome.unexpected_keys)
    results["halved"] = image(pipe)
    return results


def plain() -> dict[str, Any]:
    """A file that is nothing but tensors, of several ranks; scaled like the tensors, as there is no alpha."""
    pipe = pipeline()
    pipe.load_lora_weights("ranks", weight_name=FILE, adapter_name="a")
    found = pipe.unet.peft_config["a"]
    scalings = {name: m.scaling["a"] for name, m in pipe.unet.named_modules() if isinstance(m, BaseTunerLayer)}
    return {
        "image": image(pipe),
        "parameters": parameters(pipe.unet),
        "config": [found.r, found.lora_alpha, found.rank_pattern, found.alpha_pattern, sorted(found.target_modules)],
        "scalings": scalings,
    }


def fuse() -> dict[str, Any]:
    pipe = pipeline()
    for name in ("first", "second"):
        pipe.load_lora_weights(name, weight_name=FILE, adapter_name=name)
    pipe.set_adapters(["first", "second"], [0.5, 0.8])
    results: dict[str, Any] = {"before": image(pipe)}
    pipe.set_adapters("first", 0.5)
    pipe.fuse_lora(components=["unet", "text_encoder"], adapter_names=["first"], lora_scale=0.7, safe_fusing=True)
    results["one"] = [image(pipe), pipe.num_fused_loras, sorted(pipe.fused_loras)]
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    results["back"] = [image(pipe), pipe.num_fused_loras]
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.load_lora_weights("same_rank", weight_name=FILE, adapter_name="third")
    results["taken out for another"] = [image(pipe), adapters(pipe)]
    pipe.set_adapters(["first", "second"], [1.0, 1.0])
    pipe.fuse_lora(components=["unet", "text_encoder"])
    results["both"] = [image(pipe), sorted(pipe.fused_loras)]
    pipe.unload_lora_weights()
    results["kept"] = [image(pipe), adapters(pipe)]
    return results


def hotswap() -> dict[str, Any]:
    """An adapter's numbers are replaced where they are; another rank and scale after preparing for it."""
    pipe = pipeline()
    pipe.unet.load_lora_adapter("first-unet", weight_name=FILE, prefix=None, adapter_name="a")
    results: dict[str, Any] = {"first": image(pipe)}
    held = {name: p.data_ptr() for name, p in pipe.unet.named_parameters()}
    pipe.unet.load_lora_adapter("same_rank-unet", weight_name=FILE, prefix=None, adapter_name="a", hotswap=True)
    results["swapped"] = image(pipe)
    results["in place"] = held == {name: p.data_ptr() for name, p in pipe.unet.named_parameters()}
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.unet.load_lora_adapter("first-unet", weight_name=FILE, prefix=None, adapter_name="a")
    results["padded"] = [image(pipe), parameters(pipe.unet)]
    pipe.unet.load_lora_adapter("second-unet", weight_name=FILE, prefix=None, adapter_name="a", hotswap=True)
    results["other rank"] = image(pipe)
    results["scaled"] = image(pipe, scale=0.5)
    return results


def layerwise_casting() -> dict[str, Any]:
    """Base weights are stored in eight bits and computed with in more; adapters stay as they are.

    Without patterns diffusers asks the layer classes of three methods by name which slots to leave out.
    """
    results = {}
    for name, patterns in {
        "by default": None,
        "by patterns": (*DEFAULT_SKIP_MODULES_PATTERN, "lora_A", "lora_B"),
    }.items():
        pipe = pipeline()
        pipe.unet.load_lora_adapter("first-unet", weight_name=FILE, prefix=None, adapter_name="a")
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float64, skip_modules_pattern=patterns)
        results[name] = {"image": image(pipe), "parameters": parameters(pipe.unet)}
    return results


def refused() -> dict[str, Any]:
    """What must fail, must fail as what diffusers looks for."""
    pipe = pipeline()
    results = {}
    attempts: dict[str, Callable[[], Any]] = {
        "unknown option": lambda: LoraConfig(r=4, no_such_option=1),
        "name taken": lambda: [pipe.load_lora_weights("first", weight_name=FILE, adapter_name="a") for _ in range(2)],
        "swap of an absent one": lambda: pipe.load_lora_weights(
            "first", weight_name=FILE, adapter_name="z", hotswap=True
        ),
        "unknown to set": lambda: pipe.set_adapters("z"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            results[name] = "passed"
        except (TypeError, ValueError) as error:
            results[name] = "TypeError" if isinstance(error, TypeError) else "ValueError"
    return {**results, "after": adapters(pipe)}


SECTIONS = [train, load, part, plain, fuse, hotswap, layerwise_casting, refused]


def main() -> None:
    wanted = sys.argv[1:]
    write({s.__name__: s() for s in SECTIONS if not wanted or s.__name__ in wanted})


if __name__ == "__main__":
    main()
