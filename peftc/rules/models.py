"""PC5xx: running models."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import WARNING, KeyRule, LooseRule, RuntimeRule, StateRule, SystemRule, TypeRule, UnableRule

ADAPTER_EXISTS = Rule("PC501", "Adapter name is taken", "Two adapters of one name cannot be told apart.")
ADAPTER_UNKNOWN = KeyRule(
    "PC502", "No such adapter", "Activating or saving an adapter that is not there would do nothing."
)
MIXED_TYPES = Rule("PC503", "Another method is already applied", "A `PeftModel` holds adapters of one method.")
MODEL_DRIFTED = Rule(
    "PC504", "Model differs from the plan", "A plan says which parameters exist; this model has others."
)
ALREADY_MERGED = Rule(
    "PC505", "Adapter is merged already", "Its effect is in the base weights; a second time would count twice.", WARNING
)
MERGE_NOT_FINITE = Rule("PC506", "Merge gives NaN or infinity", "The merged model would produce nothing but NaN.")
NOT_ADAPTED = Rule("PC507", "Model has no adapter", "There is nothing to act on.")
CANNOT_MERGE = UnableRule("PC508", "Adapter cannot be merged", "Its effect is not a change of the base weights.")
WHILE_MERGED = Rule("PC509", "Not possible while merged", "The base weights contain an adapter; unmerge first.")
ADAPTER_NAME = KeyRule("PC510", "Adapter name is not usable", "The name becomes part of parameter names and folders.")
CALL_NOT_POSSIBLE = Rule(
    "PC511", "Call not possible with a prompt", "The virtual tokens go before embeddings of the input."
)
TOKENIZER_MISSING = SystemRule(
    "PC512", "Tokenizer cannot be loaded", "The virtual tokens are to start as the tokens of a text."
)
POSITIONS_IGNORED = Rule("PC513", "Positions are ignored", "They were made without the virtual tokens.", WARNING)
NOT_MERGED = Rule("PC514", "Nothing is merged", "Taking nothing out of the base weights has no effect.", WARNING)
NOT_A_MODEL = TypeRule("PC515", "Not a model", "Adapters are put on the layers of a `torch.nn.Module`.")
STEPS_MISSED = Rule(
    "PC516",
    "Adapter trains without its steps",
    "Its method changes the adapter after each optimiser step; without that it trains like a plainer one.",
    WARNING,
)
STEP_WITHOUT_GRADIENTS = RuntimeRule(
    "PC517", "Step without gradients", "What a step changes is decided by the gradients of the last backward."
)
NO_STEPS = RuntimeRule("PC518", "Nothing takes steps", "The call would do nothing.")
SCHEDULE = Rule(
    "PC519", "Schedule does not fit the training", "What is due at a step that never comes does not happen.", WARNING
)
ROW_VALUES = Rule(
    "PC520", "Call does not give what an adapter reads", "It computes each row by a value that the call gives for it."
)
CALL_AROUND = Rule(
    "PC521", "Call not possible with this adapter", "The model is run more than once to weigh what it is adapted by."
)
CANNOT_GATE = Rule(
    "PC522", "Adapter cannot be weighed", "Its update is multiplied by a coefficient for each token of the call."
)
NOT_BEGUN = Rule(
    "PC523",
    "Adapter does not begin to act",
    "It acts from certain tokens of a call on, and computes the base until then.",
    WARNING,
)
INPUT_IGNORED = Rule(
    "PC527", "Part of the call is ignored", "It does not fit an input with virtual tokens in front.", WARNING
)
TASKS_NEEDED = Rule("PC528", "Tasks of the rows are not known", "Each task has virtual tokens of its own.")
CHECKPOINTING_DROPS = Rule(
    "PC529", "Gradient checkpointing drops the prompt", "Checkpointed layers compute without the cache that it is in."
)
NO_CACHE = Rule("PC530", "No cache for the prompt", "The virtual tokens are keys and values of attention layers.")
ONE_PROMPT = Rule("PC531", "Several prompts at once", "One prompt goes before an input; the others would do nothing.")
TABLE_REFUSED = Rule("PC532", "Virtual tokens cannot be taken", "They have to be what the adapter stores.")
CACHE_STRANGE = Rule(
    "PC533", "Cache does not hold the prompt", "The tokens that follow would be those of another input, without a word."
)
STEP_UNFIT = Rule(
    "PC534",
    "Lengths do not fit the prompt",
    "Cache, mask, positions and input must agree on where the virtual tokens are; else other tokens come out.",
)
WEIGHT_ELSEWHERE = RuntimeRule(
    "PC536", "Weight is not where it is needed", "What is done without it is lost, or done to something else."
)
SPLIT_BASE = RuntimeRule(
    "PC539",
    "Base is split by tensors",
    "Each process holds a part of each weight; adapters act on whole inputs and outputs.",
)
MERGE_ORDER = Rule(
    "PC540", "Merge would change the order", "Merged into the base weights an adapter acts before all that are not."
)
ROWS_DIFFER = Rule(
    "PC541", "Adapter names do not fit the batch", "Each row is computed with the adapter that is named for it."
)
CANNOT_MIX = UnableRule(
    "PC542", "Method cannot be mixed", "Methods are mixed on one model by nesting wrappers of layers."
)
CANNOT_CONVERT = Rule(
    "PC543", "Adapter cannot be converted", "Thin factors beside the weights must be able to do what the adapter does."
)
CONVERSION_LOSES = Rule(
    "PC544", "Conversion is not exact", "What the rank leaves out of the adapter's changes is lost.", WARNING
)
BESIDE_SHARDS = Rule(
    "PC545",
    "Adapter beside shards",
    "Trained like that, each process comes to an adapter of its own.",
    WARNING,
)
SLOT_CALLED = RuntimeRule(
    "PC546",
    "Part of an adapter is asked for what it does not compute",
    "Alone it holds tensors; the layer knows the rest.",
)
CANNOT_COMBINE = Rule(
    "PC550", "Adapters cannot be combined", "A new adapter has to be able to hold what the others come to."
)
CANNOT_SWAP = StateRule(
    "PC551", "Adapter cannot be swapped in", "Swapping exchanges values in place; modules and options have to stay."
)
GIVEN_TARGETS = LooseRule(
    "PC552",
    "Config and given modules differ",
    "The given ones are adapted; a model that is adapted by the config alone would be another.",
    WARNING,
)
COMPILED_ALREADY = Rule("PC553", "Model is compiled already", "What was compiled holds the old shapes and numbers.")
ACTIVE_DELETED = Rule(
    "PC560",
    "Active adapter is deleted",
    "What the model answers, and what it trains, is another's from now on.",
    WARNING,
)
PARTLY_DISABLED = Rule(
    "PC561",
    "Some layers are disabled already",
    "A model in which only some layers act is most often not meant.",
    WARNING,
)
BIAS_GAINED = Rule(
    "PC565",
    "Merge adds a bias",
    "A layer without one got it for the constant that the adapter adds; a model made anew has no place for it.",
    WARNING,
)
OPTIMIZER_UNFIT = UnableRule(
    "PC566", "Class of optimiser does not fit", "Gradients are scaled once in a step, before the class moves anything."
)
MERGE_ROUNDED = Rule(
    "PC567",
    "Merged weights are rounded",
    "A packed weight has few values: merged, the model is another one than with the adapter beside it.",
    WARNING,
)
WHILE_ADAPTED = Rule(
    "PC568", "Not possible while adapted", "What is known of the layers would be of others than there are."
)
START_DATA = StateRule("PC570", "Start without its data", "The factors follow from what the model does with data.")
