"""PC7xx: commands and training."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import WARNING, RuntimeRule, SystemRule

SYSTEM_REFUSED = SystemRule(
    "PC701", "The operating system refused", "The command stopped; what it writes is written whole or not at all."
)
OUT_OF_MEMORY = SystemRule(
    "PC702", "Memory ran out", "The command stopped; what it writes is written whole or not at all."
)
DATA_UNREADABLE = Rule("PC710", "Training data cannot be read", "Training needs examples.")
DATA_LINE = Rule("PC711", "Line is not an example", "What a line of another form should teach cannot be guessed.")
DATA_KEYS_UNREAD = Rule("PC712", "Keys of the data that nothing reads", "They have no effect on training.", WARNING)
NO_EXAMPLES = Rule("PC713", "No examples", "There is nothing to learn from.")
TOO_LONG = Rule("PC714", "Examples beyond the maximal length", "What is cut off is not learnt.", WARNING)
NO_CHAT_TEMPLATE = Rule(
    "PC715", "No chat template", "How a conversation looks to the model is said by its chat template."
)
TEMPLATE_REFUSES = Rule(
    "PC716", "Chat template refuses the conversation", "The model was never shown such a conversation."
)
UNFINISHED_TRAINING = Rule("PC717", "Unfinished training in the folder", "Starting anew would throw its progress away.")
CANNOT_RESUME = Rule("PC718", "Training cannot be resumed", "It would not give what the uninterrupted training gives.")
DIVERGED = RuntimeRule("PC719", "Training diverged", "Nothing is learnt any more; the adapter was not saved.")
DEVICE_MISSING = RuntimeRule("PC720", "Device is not there", "The model has to be computed somewhere.")
NO_TOKENIZER = Rule(
    "PC721", "Base model without a tokenizer", "Text becomes numbers, and numbers text, only with the model's own."
)
FOLDER_TAKEN = Rule("PC722", "Folder is not empty", "What is in it would be mixed up with what is saved.")
NOTHING_TO_TRAIN = Rule("PC723", "Spec says too little to train", "Training needs examples and a place for the result.")
NO_PROMPT = Rule("PC724", "No prompt", "There is nothing to answer.")
DEMO_FAILED = RuntimeRule("PC725", "The demo did not hold", "What it shows is what the project promises.")
NOT_A_LANGUAGE_MODEL = Rule(
    "PC726", "Not a causal language model", "`peftc train` and `peftc generate` are for models that write text."
)
PLUGIN_NAME = Rule("PC727", "Not a name for a plugin", "Type, package and classes of the plugin are named after it.")
TYPE_TAKEN = Rule("PC728", "PEFT type is taken", "Of two plugins that claim one type, neither can be used.")
UNKNOWN_CHECK = Rule("PC729", "No such check", "Nothing would be checked, and nothing found.")
SCRIPT_MISSING = Rule("PC730", "No such script", "There is nothing to run.")
OPTIMIZER_UNKNOWN = Rule("PC731", "No such optimiser", "Training with another would come to another adapter.")
OPTIMIZER_MISFIT = Rule(
    "PC732",
    "Optimiser does not fit the adapter",
    "What it does otherwise than others it does to layers that are not there.",
)
MESH_INVALID = Rule("PC733", "Not a mesh of processes", "Each process's share follows from how many there are.")
