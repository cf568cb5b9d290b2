"""Adapters on disk: the ecosystem's layout in safetensors, written all at once, read with every difference named."""

from peftc.checkpoint.atomic import replace_files
from peftc.checkpoint.load import AdapterFile, load_adapter_tensors, open_adapter
from peftc.checkpoint.names import PLAN_NAME, WEIGHTS_NAME
from peftc.checkpoint.report import LoadReport, expected_tensors, match, match_file
from peftc.checkpoint.save import save_adapter

__all__ = [
    "PLAN_NAME",
    "WEIGHTS_NAME",
    "AdapterFile",
    "LoadReport",
    "expected_tensors",
    "load_adapter_tensors",
    "match",
    "match_file",
    "open_adapter",
    "replace_files",
    "save_adapter",
]
