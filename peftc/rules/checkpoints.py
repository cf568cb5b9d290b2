"""PC6xx: checkpoints."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import WARNING, KeyRule, RuntimeRule, StateRule, SystemRule

CHECKPOINT_MISSING = Rule("PC601", "No adapter weights", "An adapter is read from `adapter_model.safetensors`.")
CHECKPOINT_PICKLED = Rule("PC602", "Weights are a pickle", "Unpickling a file can run code that is hidden in it.")
CHECKPOINT_DAMAGED = Rule("PC603", "Damaged safetensors file", "Nothing was loaded from it; the model is unchanged.")
CHECKPOINT_UNREADABLE = SystemRule("PC604", "Checkpoint cannot be read", "The system refused to open or read the file.")
NOTHING_LOADS = RuntimeRule(
    "PC605", "Load without effect", "No tensor of the file has a place in the adapter; it would stay untrained."
)
SHAPES_DIFFER = RuntimeRule(
    "PC606", "Tensors of another shape", "They were trained on a layer of another size, or with other options."
)
KEYS_MISSING = Rule(
    "PC607",
    "Tensors missing from the file",
    "They keep their initial values: that part of the adapter is untrained.",
    WARNING,
)
KEYS_UNEXPECTED = Rule(
    "PC608",
    "Tensors without a place",
    "They are in the file but the adapter has no such parameter; they are left out.",
    WARNING,
)
KEYS_RENAMED = Rule(
    "PC609",
    "Tensors found under other names",
    "The file was saved from a wrapped or an unwrapped model, or is a state dict with the adapter's name in its keys.",
    WARNING,
)
OTHER_BASE = Rule(
    "PC610", "Adapter of another base model", "An adapter only means something on the base it was trained on.", WARNING
)
SAVE_INCOMPLETE = StateRule(
    "PC611", "Tensors without content", "They are shards, or on the meta device; the saved adapter could not be loaded."
)
TENSORS_NOT_FINITE = Rule(
    "PC612", "NaN or infinity in the adapter", "A model with this adapter produces nothing but NaN.", WARNING
)
SAVE_FAILED = SystemRule(
    "PC613", "Folder cannot be written", "Nothing was changed: what the folder held before is still there."
)
UNTRAINED = Rule(
    "PC614", "Adapter looks untrained", "Tensors that are all zero are what a factor starts from.", WARNING
)
SAVE_DTYPE = Rule("PC615", "Tensors that safetensors cannot store", "The format has no name for their dtype.")
PICKLE_CONTENT = Rule(
    "PC616", "Pickle is no plain adapter", "Of a pickle only tensors by name are read; all else could run code."
)
CANNOT_JOIN = Rule(
    "PC617",
    "Former layers cannot be joined",
    "The model has as one tensor what were several layers when the adapter was made.",
)
BASE_STATE = RuntimeRule(
    "PC630", "State dict does not fit the base model", "Part of the base model would keep weights of another."
)
KEYS_COLLIDE = Rule("PC640", "Two tensors of one name", "One of them would be lost.")
VOCABULARY_UNKNOWN = Rule(
    "PC641",
    "Vocabulary cannot be compared",
    "Embeddings are saved with the adapter if the vocabulary was resized, which only the base's config tells.",
    WARNING,
)
EMBEDDINGS_UNKNOWN = Rule(
    "PC642",
    "Embeddings are not saved",
    "Which modules are the embeddings is only known of transformers models.",
    WARNING,
)
CARD_UNREADABLE = Rule("PC644", "Model card left as it is", "Writing over it would lose what a person wrote.", WARNING)
PUSH_FAILED = SystemRule("PC645", "The hub did not take the upload", "Nothing there was changed by this call's commit.")
WITHOUT_EFFECT = Rule("PC646", "Keyword without effect", "What it asks for does not exist here.", WARNING)
TIE_BROKEN = RuntimeRule(
    "PC650",
    "Merge would lose a trained weight",
    "Who loads the merged model goes by its config and ties the two again.",
)
PLUGIN_MISSING = KeyRule(
    "PC651", "Adapter of a plugin that is not installed", "Only the plugin knows what the adapter's tensors mean."
)
PLUGIN_OUTDATED = Rule(
    "PC652",
    "Adapter of another version of its plugin",
    "What the tensors mean, and which options there are, may have changed.",
    WARNING,
)
START_NOT_REPEATED = Rule("PC657", "Start cannot be repeated", "Chance or data decided what the base weights became.")
START_KEPT_UNFIT = Rule("PC658", "Kept start does not fit", "It says which base weights the adapter belongs to.")
OTHER_WEIGHTS = Rule("PC659", "Base of the adapter is another", "It is trained beside weights that its start changed.")
