"""TRL's trainers on a tiny chat model: one section for each way that adapters get into them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import drawn, fill, parameters, redrawn, sums, write
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.integration import tiny

QUESTIONS = ["one plus one", "the sky", "a colour", "who is it"]
ANSWERS = ["two", "is blue", "red", "nobody"]
START = Path("start")
COMMON: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def config(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )


def base(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Logits far enough from uniform for the losses to tell something.

    In float64, because rewards are differences of long sums, and Adam makes steps of rounding errors.
    """
    model = tiny.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(drawn(name, parameter.shape, 0.2))
    return model.to(dtype)


def loaded(dtype: torch.dtype = torch.float64) -> PeftModel:
    """The saved adapter that everything starts from."""
    return PeftModel.from_pretrained(base(dtype), START, is_trainable=True)


def turns() -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]


def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": q, "chosen": " " + a, "rejected": " " + b}
        for q, a, b in zip(QUESTIONS, ANSWERS, reversed(ANSWERS), strict=True)
    ]


def outcome(trainer: Any, folder: str, **train: Any) -> dict[str, Any]:
    """Train, save, and say what happened."""
    set_seed(0)  # how many numbers were drawn for an adapter before is not promised
    at_start = parameters(trainer.model)
    trainer.train(**train)
    trainer.save_model(folder)
    return {
        "log": trainer.state.log_history,
        "parameters": at_start,
        "trained": sums(trainer.model),
        "adapters": [list(trainer.model.peft_config), trainer.model.active_adapters, trainer.model.prefix],
    }


def sft(model: Any, folder: str, peft_config: Any = None, **options: Any) -> SFTTrainer:
    return SFTTrainer(
        model,
        SFTConfig(output_dir=f"{folder}-run", max_length=64, **{**COMMON, **options}),
        train_dataset=Dataset.from_list(turns()),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def sft_loaded() -> dict[str, Any]:
    """A `PeftModel` is handed over; checkpoints, and resuming from one."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = outcome(sft(loaded(), "sft_loaded", **saving), "sft_loaded")
    again = outcome(
        sft(loaded(), "sft_loaded", **saving),
        "sft_resumed",
        resume_from_checkpoint="sft_loaded-run/checkpoint-2",
    )
    return {"first": first, "resumed": again}


def sft_single() -> dict[str, Any]:
    """The same in float32, as it is mostly done."""
    return outcome(sft(loaded(torch.float32), "sft_single"), "sft_single")


def sft_config() -> dict[str, Any]:
    """The trainer makes the adapter."""
    trainer = sft(base(), "sft_config", peft_config=config(modules_to_save=["embed_tokens"]))
    fill(trainer.model)
    return outcome(trainer, "sft_config")


def sft_half() -> dict[str, Any]:
    """A base in bfloat16: adapters are kept in float32, and the forward runs under autocast."""
    trainer = sft(base(torch.bfloat16), "sft_half", peft_config=config(), bf16=True)
    trainer.model.load_adapter(START, "default", is_trainable=True)
    return outcome(trainer, "sft_half")


def dpo(model: Any, folder: str, peft_config: Any = None) -> DPOTrainer:
    return DPOTrainer(
        model,
        args=DPOConfig(output_dir=f"{folder}-run", max_length=64, beta=0.5, **COMMON),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def dpo_reference_adapter() -> dict[str, Any]:
    """The trainer copies the loaded adapter into a second one, `ref`, and switches between the two."""
    return outcome(dpo(loaded(), "dpo_reference_adapter"), "dpo_reference_adapter")


def dpo_base_as_reference() -> dict[str, Any]:
    """The trainer makes the adapter; the reference is the model without it."""
    trainer = dpo(base(), "dpo_base_as_reference", peft_config=config())
    trainer.model.load_adapter(START, "default", is_trainable=True)
    return outcome(trainer, "dpo_base_as_reference")


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Likes vowels."""
    return [sum(letter in "aeiou" for letter in str(text)) / 8 for text in completions]


def grpo(model: Any, folder: str, peft_config: Any = None) -> GRPOTrainer:
    return GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=f"{folder}-run",
            num_generations=4,
            max_completion_length=8,
            beta=0.1,
            **{**COMMON, "per_device_train_batch_size": 4},
        ),
        train_dataset=Dataset.from_list([{"prompt": q} for q in QUESTIONS]),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def grpo_reference_adapter() -> dict[str, Any]:
    return outcome(grpo(loaded(), "grpo_reference_adapter"), "grpo_reference_adapter")


def grpo_config() -> dict[str, Any]:
    trainer = grpo(base(), "grpo_config", peft_config=config())
    trainer.model.load_adapter(START, "default", is_trainable=True)
    return outcome(trainer, "grpo_config")


def weights_for_an_engine() -> dict[str, Any]:
    """Merge, strip the names as TRL does before it sends weights to vLLM, and take the merge back."""
    model = loaded()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    sent = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p.double().sum().item()
        for name, p in model.named_parameters()
        if model.prefix not in name and "original_module" not in name
    }
    model.unmerge_adapter()
    back = max((p - before[name]).abs().max().item() for name, p in model.named_parameters())
    expected = {name for name, _ in base().named_parameters()}
    return {"sent": sent, "complete": sorted(expected - set(sent)), "back": back < 1e-6}


def refused() -> dict[str, Any]:
    """What TRL itself refuses, because it recognises the configs, models and layers."""
    on_head = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    attempts: dict[str, Callable[[], Any]] = {
        "adapter on the head": lambda: sft(base(), "refused", peft_config=on_head),
        "model and config": lambda: sft(loaded(), "refused", peft_config=config()),
        "no config": lambda: sft(base(), "refused", peft_config={"r": 4}),
    }
    return {name: raised(attempt) for name, attempt in attempts.items()}


def raised(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


SECTIONS: list[Callable[[], dict[str, Any]]] = [
    sft_loaded,
    sft_single,
    sft_config,
    sft_half,
    dpo_reference_adapter,
    dpo_base_as_reference,
    grpo_reference_adapter,
    grpo_config,
    weights_for_an_engine,
    refused,
]


def main() -> None:
    get_peft_model(base(), config()).save_pretrained(START)
    redrawn(START)
    wanted = sys.argv[1:]
    write({section.__name__: section() for section in SECTIONS if not wanted or section.__name__ in wanted})


if __name__ == "__main__":
    main()
