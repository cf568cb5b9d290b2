"""Names of the files of an adapter folder; the config's is `peftc.config.base.CONFIG_NAME`."""

from __future__ import annotations

WEIGHTS_NAME = "adapter_model.safetensors"
#: What others wrote before there was safetensors, and write where a program asks for it.
PICKLE_NAME = "adapter_model.bin"
PLAN_NAME = "peftc_plan.json"
#: The print of the base model that the adapter was saved on.
BASE_NAME = "peftc_base.json"
#: How that was quantised, in the same file.
QUANTIZATION = "quantization"
#: What the base weights follow from that an adapter's start changed.
START_NAME = "peftc_start.safetensors"
