"""PC3xx: graphs and base models."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import WARNING, ImportRule, SystemRule, UnableRule

LAZY_LAYER = Rule(
    "PC301", "Layer without a shape", "A lazy layer gets its shape from the first input, so it cannot be planned."
)
BASE_MISSING = SystemRule(
    "PC302", "Base model not found", "Planning and training start from the base model or its config."
)
BASE_UNREADABLE = SystemRule(
    "PC303", "Base model cannot be read", "The config or file is not what transformers understands."
)
BASE_UNBUILDABLE = Rule(
    "PC304", "Architecture cannot be built", "transformers itself fails to build the model from its config."
)
DEPENDENCY_MISSING = ImportRule(
    "PC305", "Package not installed", "This kind of base model needs a package that is not installed."
)
REMOTE_CODE = Rule(
    "PC306", "Model brings its own code", "Code from a model repository is never run because a file asks for it."
)
CACHE_UNUSABLE = Rule("PC307", "Cache cannot be used", "Without the cache every plan builds the model anew.", WARNING)
GRAPH_INVALID = Rule("PC308", "Graph file cannot be read", "The file is not a graph that this version wrote.")
BASE_RENAMED = Rule(
    "PC310", "Base model renamed", "What is saved names the base model that it was trained on.", WARNING
)
AUTO_CLASS = Rule(
    "PC311", "Base model cannot be chosen", "Base model and model class follow from the adapter's config."
)
BASE_TOO_LARGE = Rule(
    "PC312", "Model is too large", "A document must be safe to plan: building the model would not end."
)
STORAGE_UNKNOWN = UnableRule(
    "PC313", "No such storage", "How a layer's weight is stored decides how it can be read and changed."
)
PACKED_FOR_GOOD = UnableRule(
    "PC314", "Packed weight takes no other", "What is merged would be lost, or the layer would be another one."
)
GRADIENT_STOPS = Rule(
    "PC315",
    "Gradient stops at a layer",
    "Adapters nearer to the model's input learn from what goes round the layer alone, or the backward pass fails.",
    WARNING,
)
QUANTIZER_UNKNOWN = Rule("PC321", "No such quantisation", "Which library packs the weights decides how they are read.")
QUANTIZER_REFUSES = UnableRule(
    "PC322", "Base cannot be quantised so", "What would be planned could not be loaded, so nothing of it is."
)
