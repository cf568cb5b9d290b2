"""Adapters inside transformers' own models, pipelines, and accelerate, on tiny models."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common import drawn, fill, parameters, redrawn, sums, write
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments, pipeline, set_seed
from transformers.trainer_utils import unwrap_peft_model

from tests.integration import tiny

BASE, START, OTHER, COPIES = (Path(name) for name in ("base", "start", "other", "copies"))
IDS = torch.tensor([[3, 14, 15, 92, 65, 35], [8, 97, 93, 23, 84, 62]])


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], **options})


def base() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE)


def prepare() -> None:
    """A base model and three adapters on the disk, from which both libraries start."""
    model = tiny.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(drawn(name, parameter.shape, 0.2))
    model.save_pretrained(BASE)
    tiny.tokenizer().save_pretrained(BASE)
    made = {
        START: config(),
        OTHER: config(r=2, target_modules="all-linear"),
        COPIES: config(modules_to_save=["lm_head"]),
    }
    for folder, options in made.items():
        options.task_type = "CAUSAL_LM"
        get_peft_model(base(), options).save_pretrained(folder)
        redrawn(folder, salt=folder.name)


def logits(model: Any) -> list[float]:
    """A few numbers that every weight is in."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found.double()[:, -1, ::7].flatten().tolist()


def generated(model: Any) -> list[list[int]]:
    tokens: Tensor = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    return tokens.tolist()


def loaded_into() -> dict[str, Any]:
    """`load_adapter` of the model: one adapter, a second, switching, disabling, deleting."""
    model = base()
    found: dict[str, Any] = {"base": logits(model)}
    report = model.load_adapter(str(START))
    found["first"] = [logits(model), model.active_adapters(), sorted(model.peft_config), parameters(model)]
    found["report"] = [sorted(report.missing_keys), sorted(report.unexpected_keys)]
    model.load_adapter(str(OTHER), "other", is_trainable=True)
    found["second"] = [logits(model), model.active_adapters(), sorted(model.peft_config), parameters(model)]
    for names in ("default", "other", ["default", "other"]):
        model.set_adapter(names)
        found[f"active {names}"] = [logits(model), model.active_adapters(), parameters(model), generated(model)]
    model.disable_adapters()
    found["disabled"] = logits(model)
    model.enable_adapters()
    found["enabled"] = logits(model)
    model.set_adapter("other")
    found["state"] = {k: v.double().sum().item() for k, v in model.get_adapter_state_dict("other").items()}
    model.save_pretrained("loaded_into")
    model.delete_adapter("default")
    found["deleted one"] = [logits(model), sorted(model.peft_config), parameters(model)]
    model.delete_adapter("other")
    found["deleted both"] = [logits(model), model._hf_peft_config_loaded]
    return found


def added_to() -> dict[str, Any]:
    """`add_adapter` of the model, training, saving, and loading what was saved."""
    model = base()
    model.add_adapter(config(), "fresh")
    fill(model)
    arguments = TrainingArguments(
        output_dir="added_to-run", max_steps=3, save_steps=2, learning_rate=1e-2, logging_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist() * 4]
    set_seed(0)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    found = {"log": trainer.state.log_history, "trained": sums(model), "parameters": parameters(model)}
    model.save_pretrained("added_to")
    again = base()
    again.load_adapter("added_to", "again")
    return {
        **found,
        "again": logits(again),
        "same": logits(model),
        "wrapped": logits(PeftModel.from_pretrained(base(), "added_to")),
    }


def copies() -> dict[str, Any]:
    """A module that the adapter has trained whole is loaded into the model."""
    model = base()
    model.load_adapter(str(COPIES), "copies")
    found = {"first": logits(model), "parameters": parameters(model), "active": model.active_adapters()}
    model.disable_adapters()
    return {**found, "disabled": logits(model)}


def from_tensors() -> dict[str, Any]:
    """An adapter that comes as tensors, and one under a name that is taken."""
    from safetensors.torch import load_file

    model = base()
    tensors = load_file(START / "adapter_model.safetensors")
    model.load_adapter(peft_config=PeftConfig.from_pretrained(START), adapter_state_dict=tensors, adapter_name="given")
    found: dict[str, Any] = {"given": logits(model)}
    try:
        model.load_adapter(str(START), "given")
    except ValueError as error:
        found["taken"] = str(error)
    return found


def from_adapter_folder() -> dict[str, Any]:
    """`from_pretrained` of a folder that holds nothing but an adapter."""
    model = AutoModelForCausalLM.from_pretrained(START)
    return {"logits": logits(model), "active": model.active_adapters(), "class": type(model).__name__}


def auto() -> dict[str, Any]:
    """From the folder of an adapter to a model that generates, as the reference's first page shows."""
    model = AutoPeftModelForCausalLM.from_pretrained(START)
    report = model.load_adapter(OTHER, "other")
    model.set_adapter("other")
    return {
        "class": [type(model).__name__, type(model.base_model).__name__, type(model.get_base_model()).__name__],
        "generated": generated(model),
        "logits": logits(model),
        "keys": [sorted(report.missing_keys), sorted(report.unexpected_keys)],
    }


def another_method() -> dict[str, Any]:
    """A method whose slots are parameters, not modules."""
    model = base()
    options = IA3Config(
        target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    get_peft_model(base(), options).save_pretrained("ia3")
    redrawn("ia3")
    model.load_adapter("ia3", "scaled")
    found = {"logits": logits(model), "parameters": parameters(model)}
    model.save_pretrained("another_method")
    return found


def swapped() -> dict[str, Any]:
    """An adapter's tensors replaced by those of another file, the parameters staying what they are."""
    model = base()
    model.load_adapter(str(START), "mine")
    held = dict(model.named_parameters())
    shutil.copytree(START, "swap")
    redrawn("swap", salt="swap")
    model.load_adapter("swap", "mine", hotswap=True)
    return {
        "logits": logits(model),
        "parameters": parameters(model),
        "names": sorted(held) == sorted(dict(model.named_parameters())),
    }


def pipelines() -> dict[str, Any]:
    """Text generation with a wrapped model, and with the folder of an adapter."""
    tokenizer = tiny.tokenizer()
    wrapped = PeftModel.from_pretrained(base(), START)
    made = pipeline("text-generation", model=wrapped, tokenizer=tokenizer, device="cpu")
    tokenizer.save_pretrained("folder")
    shutil.copytree(START, "folder", dirs_exist_ok=True)
    from_folder = pipeline("text-generation", model="folder", device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False}
    return {"wrapped": made("one plus", **options), "folder": from_folder("one plus", **options)}


def attributes() -> dict[str, Any]:
    """What other libraries read off a wrapped model."""
    model = PeftModel.from_pretrained(base(), START, is_trainable=True)
    names = (
        "main_input_name",
        "is_gradient_checkpointing",
        "prefix",
        "active_adapter",
        "active_adapters",
        "device",
        "dtype",
    )
    return {
        **{name: str(getattr(model, name)) for name in names},
        "parameters": parameters(model),
        "counts": [
            model.num_parameters(),
            model.num_parameters(only_trainable=True),
            *model.get_nb_trainable_parameters(),
        ],
        "base": [
            type(model.get_base_model()).__name__,
            type(model.base_model).__name__,
            type(unwrap_peft_model(model)).__name__,
        ],
        "config": model.config.to_dict() == model.get_base_model().config.to_dict(),
        "generation": model.generation_config.to_dict() == model.get_base_model().generation_config.to_dict(),
        "embeddings": [type(model.get_input_embeddings()).__name__, type(model.get_output_embeddings()).__name__],
        "kept": [
            getattr(model, name, "none")
            for name in ("is_quantized", "hf_quantizer", "quantization_method", "hf_device_map")
        ],
        "hf": model._hf_peft_config_loaded,
    }


def accelerated() -> dict[str, Any]:
    """accelerate: prepare, clip, save and load the state, unwrap, collect the state dict."""
    accelerator = Accelerator(cpu=True)
    model = PeftModel.from_pretrained(base(), START, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    losses: list[float] = []
    norms: list[float] = []

    def step() -> None:
        loss = model(input_ids=IDS, labels=IDS).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state("state")
    step()
    accelerator.load_state("state")
    Path("state/random_states_0.pkl").unlink()  # a pickle of the state of torch
    step()
    whole = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained("accelerated", state_dict=whole, is_main_process=accelerator.is_main_process)
    gathered = accelerator.gather(model(input_ids=IDS).logits.detach())
    return {
        "losses": losses,
        "norms": norms,
        "whole": {name: tensor.double().sum().item() for name, tensor in whole.items()},
        "same": unwrapped is model,
        "gathered": gathered.double().sum().item(),
    }


SECTIONS: list[Callable[[], dict[str, Any]]] = [
    loaded_into,
    added_to,
    copies,
    from_tensors,
    from_adapter_folder,
    auto,
    another_method,
    swapped,
    pipelines,
    attributes,
    accelerated,
]


def main() -> None:
    torch.set_default_dtype(torch.float64)  # the order of additions must not decide what is compared
    prepare()
    wanted = sys.argv[1:]
    write({section.__name__: section() for section in SECTIONS if not wanted or section.__name__ in wanted})


if __name__ == "__main__":
    main()
