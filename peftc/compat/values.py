"""Constants of the reference that other libraries read. Those of torch are made when they are asked for."""

from __future__ import annotations

from typing import Any, Final

from peftc.checkpoint import names
from peftc.compiler.match import ALL_LINEAR
from peftc.config.base import CONFIG_NAME as CONFIG_NAME

WEIGHTS_NAME: Final = names.PICKLE_NAME
SAFETENSORS_WEIGHTS_NAME: Final = names.WEIGHTS_NAME
TOKENIZER_CONFIG_NAME: Final = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND: Final = ALL_LINEAR
EMBEDDING_LAYER_NAMES: Final = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES: Final = ["score", "classifier"]
DUMMY_TARGET_MODULES: Final = "dummy-target-modules"
DUMMY_MODEL_CONFIG: Final = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION: Final = 20
#: floating-point types that adapters compute with
_COMPUTE = ("float16", "bfloat16", "float32")
#: floating-point types that adapters are cast up from
UPCAST_DTYPES: Final = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def _compute_dtypes() -> tuple[Any, ...]:
    import torch  # below the torch line

    return tuple(getattr(torch, name) for name in _COMPUTE)


def __getattr__(name: str) -> Any:
    if name == "ALLOWED_COMPUTE_DTYPES":
        return _compute_dtypes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
