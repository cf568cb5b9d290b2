"""PC4xx: targets and plans."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import WARNING, KeyRule, LooseRule, TypeRule, UnableRule

BAD_TARGET = UnableRule("PC401", "Layer cannot be adapted", "The method's mathematics does not fit this layer.")
RANK_BEYOND_LAYER = Rule(
    "PC402", "Rank beyond the layer", "Directions beyond the layer's own rank cost memory and cannot be used.", WARNING
)
BAD_PATTERN = Rule("PC403", "Not a regular expression", "A string in place of a list of names is one.")
LONG_PATTERN = Rule("PC404", "Regular expression is too large", "A pattern from a file must not fill the memory.")
SLOW_PATTERN = Rule("PC405", "Regular expression takes too long", "A pattern from a file must not hang the process.")
NO_TARGETS = Rule(
    "PC406", "No targets known", "No table knows this type of model, and names do not tell its layers' roles."
)
NO_MATCH = Rule("PC407", "Nothing is adapted", "An adapter without a layer would train nothing.")
DEAD_TARGET = LooseRule("PC408", "Target without effect", "Part of what was asked for would not be trained.")
DEAD_EXCLUDE = Rule("PC409", "Exclusion without effect", "What should be left alone may be adapted.")
DEAD_PATTERN = LooseRule("PC410", "Pattern key without effect", "The modules it was meant for get the general option.")
DEAD_LAYER = Rule("PC411", "Layer index without effect", "No target is in a layer of that index.")
DEAD_SAVE = Rule("PC412", "Module to save does not exist", "It would be neither trained nor saved.")
TIED_TARGET = Rule(
    "PC413",
    "Target shares its weight",
    "The adapter acts on one use of the weight only; merged, the two would differ.",
    WARNING,
)
ROUTER_ADAPTED = Rule(
    "PC414",
    "Router is adapted",
    "A router that moves changes which experts see which tokens; training gets unstable.",
    WARNING,
)
EXPERTS_MISSED = Rule(
    "PC415",
    "Routed experts are not adapted",
    "Names reach modules; these experts keep their weights as parameters.",
    WARNING,
)
UNEVEN_COVERAGE = Rule(
    "PC416",
    "Layers are adapted unevenly",
    "Blocks of another kind name their layers otherwise, so names miss them.",
    WARNING,
)
TOWER_ADAPTED = Rule("PC417", "Another tower is adapted too", "Names also occur outside the language model.", WARNING)
ORIENTATION = Rule("PC418", "Storage order does not apply", "No adapted layer stores its weight as (in, out).", WARNING)
PROMPT_SIZE = Rule("PC419", "Size of the prompt does not fit", "The virtual tokens' table needs the model's shape.")
NO_EMBEDDINGS = Rule("PC420", "No input embeddings", "Virtual tokens go before embeddings of the input.")
CANNOT_SAVE = TypeRule(
    "PC421", "Module cannot be trained whole", "A container has no call of its own that a copy could answer."
)
LOOSE_SAVE = Rule(
    "PC422",
    "Module to save matched inside a name",
    "The reference compares endings letter by letter, not at a dot.",
    WARNING,
)
NO_HEAD = Rule("PC423", "No head to train", "A new head stays at its random start.", WARNING)
READ_DIRECTLY = Rule(
    "PC424",
    "Weight is also read directly",
    "Fast kernels take the base weight past the adapter, so it has no effect there.",
    WARNING,
)
LAYERS_BYPASSED = Rule(
    "PC425", "Layer filter does not apply", "Full paths are meant exactly; the filter acts on suffixes only.", WARNING
)
PLAN_INVALID = Rule("PC426", "Not a plan", "Only plans that `peftc plan --format json` wrote can be applied.")
PLAN_DRIFTED = Rule(
    "PC427", "Base model differs from the plan's", "The plan says exactly what is adapted in another structure."
)
CHECK_FAILED = Rule("PC428", "Check of the spec failed", "The spec says what the plan must come to.")
UNKNOWN_MODULE = Rule("PC429", "No module of that path", "Only modules of the base model can be explained.")
NO_TYPE = KeyRule("PC430", "Config has no type", "The type decides which method the options belong to.")
ADAPTERS_CONFLICT = Rule(
    "PC431", "Adapters get in each other's way", "What one adapter does would depend on the other."
)
NO_BIAS = Rule("PC432", "No bias to train", "The option asks for parameters that these layers do not have.", WARNING)
TASK_MISFIT = Rule(
    "PC433", "Task does not fit the model", "The virtual tokens would go to inputs that it does not have."
)
TENSOR_TOO_LARGE = Rule("PC434", "Adapter is too large", "No machine could hold such a tensor, nor count its numbers.")
BLOCKS_ADJUSTED = Rule(
    "PC446",
    "Size of blocks adjusted",
    "Blocks have to divide the features of each layer, so the nearest size that does is taken.",
    WARNING,
)
PART_OF_FUSED = Rule(
    "PC447", "Part of a fused weight", "Layers that became one tensor can be adapted together only, at one scale."
)
NO_ROWS = Rule("PC455", "No embedding of that name", "Its rows would be neither trained nor saved.")
NO_TOKENS = Rule("PC456", "No token to train", "The option names embeddings, and none of their rows.", WARNING)
NO_REPLICATION = Rule("PC457", "Layers cannot be replicated", "The model would be another than the option says.")
NOTHING_TIED = Rule("PC458", "Nothing to keep tied", "The option is about weights used in two places.", WARNING)
START_UNKNOWN = UnableRule("PC460", "No such start", "It may be one that changes the base model's weights.")
START_UNFIT = Rule("PC461", "Start does not fit", "A layer would begin as something else than the option says.")
START_SPARED = Rule("PC462", "Layer begins without the start", "It is not defined on layers of this kind.", WARNING)
