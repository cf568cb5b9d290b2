"""The trainers of transformers on tiny models: checkpoints, resuming, the best model, and what they ask a model for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import drawn, fill, parameters, redrawn, sums, write
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tests.integration import tiny

START = Path("start")
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def base() -> LlamaForCausalLM:
    """A causal language model whose logits are far from uniform."""
    return redrawn_base(tiny.model())


def redrawn_base(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(drawn(name, parameter.shape, 0.2))
    return model


def loaded() -> PeftModel:
    """The saved adapter that everything starts from."""
    return PeftModel.from_pretrained(base(), START, is_trainable=True)


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Token ids with labels; `more` are columns that no model takes."""
    ids = [[(7 * row + 3 * i) % 90 + 3 for i in range(10)] for row in range(count)]
    return [{"input_ids": r, "attention_mask": [1] * len(r), "labels": r, **more} for r in ids]


def outcome(trainer: Any, folder: str, **train: Any) -> dict[str, Any]:
    """Train, save, and say what happened."""
    set_seed(0)
    at_start = parameters(trainer.model)
    trainer.train(**train)
    trainer.save_model(folder)
    return {
        "log": trainer.state.log_history,
        "best": trainer.state.best_model_checkpoint,
        "label_names": trainer.label_names,
        "parameters": at_start,
        "trained": sums(trainer.model),
    }


def trainer(model: nn.Module, folder: str, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=f"{folder}-run", **{"max_steps": 3, "save_strategy": "no", **COMMON, **options}
    )
    return Trainer(model, arguments, train_dataset=rows(8), eval_dataset=rows(4))


def checkpoints() -> dict[str, Any]:
    """Checkpoints, the best of them loaded at the end, and going on from one in another process's stead."""
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    first = outcome(trainer(loaded(), "checkpoints", **options), "checkpoints")
    again = trainer(loaded(), "resumed", **options)
    resumed = outcome(again, "resumed", resume_from_checkpoint="checkpoints-run/checkpoint-2")
    return {"first": first, "resumed": resumed, "evaluated": again.evaluate()["eval_loss"]}


def best_is_not_last() -> dict[str, Any]:
    """The best checkpoint's weights replace those of the last step."""
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 2,
    }
    return outcome(trainer(loaded(), "best_is_not_last", **options), "best_is_not_last")


def label_smoothing() -> dict[str, Any]:
    """A causal model is known through the wrapper, so that labels are shifted."""
    return outcome(trainer(loaded(), "label_smoothing", label_smoothing_factor=0.1), "label_smoothing")


def neftune() -> dict[str, Any]:
    """Noise on the input embeddings, found through the wrapper; gone after training."""
    made = trainer(loaded(), "neftune", neftune_noise_alpha=5.0)
    found = outcome(made, "neftune")
    return {**found, "hooks": len(made.model.get_input_embeddings()._forward_hooks)}


def columns() -> dict[str, Any]:
    """Columns that the base model's forward does not take are dropped."""
    from datasets import Dataset

    made = trainer(loaded(), "columns")
    made.train_dataset = Dataset.from_list(rows(8, extra="text", length=10))
    return outcome(made, "columns")


def checkpointing(model: PeftModel, reentrant: bool) -> dict[str, Any]:
    folder = f"gradient_checkpointing-{reentrant}"
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    return outcome(trainer(model, folder, **options), folder)


def gradient_checkpointing() -> dict[str, Any]:
    """Activations computed again in backward."""
    return {str(reentrant): checkpointing(loaded(), reentrant) for reentrant in (True, False)}


def accumulation() -> dict[str, Any]:
    """Losses are averaged over the tokens of all parts of a step; gradients are clipped; the rate decays."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "warmup_steps": 1, "lr_scheduler_type": "cosine"}
    return outcome(trainer(loaded(), "accumulation", **options), "accumulation")


def half() -> dict[str, Any]:
    """A base in bfloat16 under autocast; the adapter's tensors are kept in float32."""
    made = trainer(PeftModel.from_pretrained(base().to(torch.bfloat16), START, is_trainable=True), "half", bf16=True)
    return {"parameters": parameters(made.model), "loss": made.train().training_loss, "trained": sums(made.model)}


class Network(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.second(self.first(features).relu())
        if labels is None:
            return {"scores": scores}
        return {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}


def generic() -> dict[str, Any]:
    """The wrapper without a task, round a model of one's own."""
    set_seed(0)
    network = redrawn_base(Network())
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    fill(model)
    examples = [{"features": [float((i * j) % 5) for j in range(6)], "labels": i % 3, "extra": "x"} for i in range(8)]
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **COMMON}
    made = Trainer(model, TrainingArguments(output_dir="generic-run", **options), train_dataset=examples)
    return {"class": type(model).__name__, **outcome(made, "generic")}


def generic_language_model() -> dict[str, Any]:
    """The wrapper without a task, round a language model."""
    set_seed(0)
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    fill(model)
    return outcome(trainer(model, "generic_language_model", label_smoothing_factor=0.1), "generic_language_model")


def classifier() -> dict[str, Any]:
    """A sequence classifier: its head is trained whole."""
    config = BertConfig(
        vocab_size=98, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = get_peft_model(
        redrawn_base(BertForSequenceClassification(config)),
        LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], bias="lora_only"),
    )
    fill(model)
    examples = [{**row, "labels": i % 3} for i, row in enumerate(rows(8))]
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **COMMON}
    made = Trainer(
        model, TrainingArguments(output_dir="classifier-run", **options), train_dataset=examples, eval_dataset=examples
    )
    found = outcome(made, "classifier")
    again = Trainer(model, made.args, train_dataset=examples, eval_dataset=examples)
    resumed = outcome(again, "classifier-again", resume_from_checkpoint="classifier-run/checkpoint-2")
    return {
        **found,
        "resumed": resumed,
        "predicted": made.predict(examples).predictions.tolist(),
    }


def prompts() -> dict[str, Any]:
    """Virtual tokens before the input: labels and masks are widened; the checkpoint has the table alone."""
    model = get_peft_model(base(), PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM))
    fill(model)
    options = {"save_strategy": "steps", "save_steps": 2}
    first = outcome(trainer(model, "prompts", **options), "prompts")
    again = trainer(model, "prompts-again", **options)
    return {
        "first": first,
        "resumed": outcome(again, "prompts-again", resume_from_checkpoint="prompts-run/checkpoint-2"),
    }


def t5() -> Any:
    config = T5Config(
        vocab_size=98,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return redrawn_base(AutoModelForSeq2SeqLM.from_config(config))


def seq2seq() -> dict[str, Any]:
    """The usage that the reference's first page shows: fine-tune, save, load, generate."""
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.0
    )
    model = get_peft_model(t5(), peft_config)
    fill(model)
    model.print_trainable_parameters()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "predict_with_generate": True, **COMMON}
    made = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(output_dir="seq2seq-run", generation_max_length=8, **options),
        train_dataset=rows(8),
        eval_dataset=rows(4),
    )
    found = outcome(made, "seq2seq")
    predicted = made.predict(rows(4)).predictions.tolist()
    model.save_pretrained("seq2seq-adapter")
    again = PeftModel.from_pretrained(t5(), "seq2seq-adapter").eval()
    ids = torch.tensor([row["input_ids"] for row in rows(2)])
    return {**found, "predicted": predicted, "generated": again.generate(input_ids=ids, max_new_tokens=6).tolist()}


SECTIONS: list[Callable[[], dict[str, Any]]] = [
    checkpoints,
    best_is_not_last,
    label_smoothing,
    neftune,
    columns,
    gradient_checkpointing,
    accumulation,
    half,
    generic,
    generic_language_model,
    classifier,
    prompts,
    seq2seq,
]

#: the others in float64: the order of additions must not decide what comes out
IN_FLOAT32 = (checkpoints, prompts)


def main() -> None:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base(), config).save_pretrained(START)
    redrawn(START)
    wanted = sys.argv[1:]
    found = {}
    for section in SECTIONS:
        if not wanted or section.__name__ in wanted:
            torch.set_default_dtype(torch.float32 if section in IN_FLOAT32 else torch.float64)
            found[section.__name__] = section()
    write(found)


if __name__ == "__main__":
    main()
