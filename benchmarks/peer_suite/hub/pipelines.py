"""Stand-ins for models of images, of images and text, and for parts of pipelines of diffusers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peer_suite.hub import tokenizers
from benchmarks.peer_suite.hub.models import COMMON, HF, IDS, LLAMA, PEFT, TRL, VOCABULARY
from benchmarks.peer_suite.hub.repos import repo


@repo(f"{PEFT}/tiny-random-ResNetForImageClassification")
def _resnet(folder: Path, hub: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}
    config = transformers.ResNetConfig(**sizes, num_labels=3)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(folder)


@repo(f"{PEFT}/tiny-LlavaForConditionalGeneration", f"{HF}/tiny-random-LlavaForConditionalGeneration")
def _llava(folder: Path, hub: Path) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizers.llama(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    vision: dict[str, Any] = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 224, "patch_size": 32, "projection_dim": 32},
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**size),
        tokenizer=tokenizer,
        patch_size=32,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)


@repo(f"{TRL}/tiny-Qwen2_5_VLForConditionalGeneration")
def _qwen_vl(folder: Path, hub: Path) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1], "rope_theta": 1e4}
    vision = {
        **{"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 16},
        **{"patch_size": 14, "fullatt_block_indexes": [1]},
    }
    config = transformers.Qwen2_5_VLConfig(text_config={**COMMON, "rope_scaling": rope, **IDS}, vision_config=vision)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


@repo(f"{PEFT}/tiny-random-gemma4-E2B")
def _gemma(folder: Path, hub: Path) -> None:
    torch.manual_seed(0)
    text = {
        **{**COMMON, "hidden_size": 32, "num_hidden_layers": 4, "num_key_value_heads": 1},
        **{"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
        **{"vocab_size_per_layer_input": VOCABULARY, "sliding_window": 32, **IDS},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    transformers.Gemma4ForConditionalGeneration(config).save_pretrained(folder)


@repo(f"{HF}/tiny-sd-pipe")
def _stable_diffusion(folder: Path, hub: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=32,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    sizes: dict[str, Any] = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5},
        **{"num_attention_heads": 4, "max_position_embeddings": 77},
        **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    }
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)),
        tokenizer=_clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _clip_tokenizer() -> Any:
    """CLIP's class, with RoBERTa's vocabulary."""
    with tempfile.TemporaryDirectory() as scratch:
        base = tokenizers.roberta(Path(scratch))
    vocabulary = json.loads(base.backend_tokenizer.to_str())["model"]["vocab"]
    ends = {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    tokenizer = transformers.CLIPTokenizer(vocab={**vocabulary, **ends}, merges=[])
    tokenizer.model_max_length = 77
    return tokenizer


@repo(f"{HF}/tiny-flux2")
def _flux(folder: Path, hub: Path) -> None:
    import diffusers

    torch.manual_seed(3)  # as for the small OPT: a test compares errors of approximations
    diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    ).save_pretrained(folder / "transformer")
