"""A program written for `peft`: it trains an adapter of a small model, saves it and loads it again."""

import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


folder = sys.argv[1]
tokens = torch.arange(48).reshape(2, 24)

model = get_peft_model(base(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(60):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(folder)

again = PeftModel.from_pretrained(base(), folder)
start = tokens[:, :4]
written = again.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False)
print(written.tolist())
print(f"a {type(again).__name__} of peft {peft.__version__}")
