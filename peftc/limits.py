"""How much is read of what others wrote: the one place for every bound on documents, plans, graphs, headers and data.

A bound is far above what is ever meant and far below what would hang or fill a machine. What goes beyond it is refused
with a diagnostic. `tests/fuzz` holds that nothing is missing here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Files, in bytes ------------------------------------------------------------------------------------------------------
#: YAML is written by people.
MAX_YAML = 1 << 20
#: JSON of a config may list every module of a large model.
MAX_JSON = 16 << 20
#: A plan of the largest models there are has a few megabytes, a graph likewise.
MAX_PLAN = 64 << 20
MAX_GRAPH = 64 << 20
#: A model's config is a few kilobytes; some list every label of a large classifier.
MAX_BASE_CONFIG = 32 << 20
#: One line of training data: a book has a megabyte.
MAX_DATA_LINE = 32 << 20
#: A model card that is written anew with its text kept.
MAX_CARD = 4 << 20

# Text -----------------------------------------------------------------------------------------------------------------
#: Levels of lists and mappings in each other.
MAX_DEPTH = 64
#: Values of a YAML document, aliases counted as if they were written out.
MAX_NODES = 20_000
#: Adapters of one spec.
MAX_ADAPTERS = 200
#: The largest whole number that a file can say: 64 bits, as in every other program.
MAX_INTEGER = 2**63 - 1
#: The longest regular expression; recipes for language models have up to 2,000 characters.
MAX_PATTERN = 10_000
#: The largest product of the counts in a regular expression: the engine unrolls `(a{100}){100}`.
MAX_REPEATS = 100_000
#: Seconds that all regular expressions of one pass may take together.
DEADLINE = 2.0

#: Bytes of an adapter's name, which becomes the name of a folder.
MAX_NAME = 200

# Models ---------------------------------------------------------------------------------------------------------------
#: Layers that a config may ask for; the deepest model that was ever published has 1,000.
MAX_LAYERS = 1_000
#: Experts of a layer, and classes that are told apart, that a config may ask for.
MAX_EXPERTS = 100_000
MAX_LABELS = 2_000_000
#: Modules of a model that is built to be planned for.
MAX_MODULES = 200_000

# Tensors --------------------------------------------------------------------------------------------------------------
#: The format's own limit on the header of a safetensors file, in bytes.
MAX_HEADER = 100_000_000
#: Tensors of an adapter: one that has a pair for each of 384 experts in 61 layers has 140,000.
MAX_TENSORS = 250_000
#: Dimensions of a tensor, as torch has it.
MAX_DIMENSIONS = 64
#: Tensors that a method may have on one layer.
MAX_SLOTS = 1_000

# What is told ---------------------------------------------------------------------------------------------------------
#: Problems of one document that are told one by one; of the others only the number.
MOST_TOLD = 50
#: Problems that are shown in a terminal or in the text of an error, of however many documents.
MOST_SHOWN = 100
#: Lines of training data that are told one by one.
MOST_LINES_TOLD = 20


def misshapen(shape: Sequence[int]) -> str:
    """Why no tensor can have this shape, which has no negative numbers; empty if one can.

    >>> misshapen((2, 3)), misshapen((2**40, 2**40))
    ('', 'has 1.2e+24 numbers')
    """
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}"
    if any(size > MAX_INTEGER for size in shape):
        return "has a side beyond 64 bits"
    number = math.prod(shape)
    return f"has {number:.1e} numbers" if number > MAX_INTEGER // 16 else ""
