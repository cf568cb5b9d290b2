"""Every kind of diagnostic, declared once; `docs/diagnostics.md` is generated from this file.

Codes are stable: PC1xx documents and configs, PC2xx plugins, PC3xx graphs and base models, PC4xx targets and plans,
PC5xx running models, PC6xx checkpoints, PC7xx commands and training, PC8xx the alias `peft` and the packages beside
peftc. A code is never reused for another meaning.
"""

from __future__ import annotations

from functools import partial

from peftc.diagnostics import Rule, Severity

WARNING = Severity.WARNING

# A rule's exception is a `ValueError`, as most of the reference's are, but where the reference, or the library that it
# leaves the matter to, raises something else.
ImportRule = partial(Rule, builtins=(ImportError,))
KeyRule = partial(Rule, builtins=(KeyError, ValueError))
LooseRule = partial(Rule, builtins=(ValueError, RuntimeWarning))  # an error, or where it is loaded a warning
RuntimeRule = partial(Rule, builtins=(RuntimeError,))
StateRule = partial(Rule, builtins=(ValueError, RuntimeError))
SystemRule = partial(Rule, builtins=(OSError, ValueError))
TypeRule = partial(Rule, builtins=(TypeError, ValueError))
UnableRule = partial(
    Rule, builtins=(ValueError, TypeError, NotImplementedError)
)  # which one differs from method to method

# PC1xx: documents and configs ---------------------------------------------------------------------------------------
UNKNOWN_KEY = TypeRule(
    "PC101", "Unknown key", "A key that nothing reads has no effect; most often it is a misspelling."
)
BAD_VALUE = Rule("PC102", "Wrong value", "The value does not fit the type or the range of the option.")
OPTION_NOT_AVAILABLE = UnableRule("PC103", "Option not available", "Ignoring the option would change the mathematics.")
NOT_IDENTITY = Rule(
    "PC104",
    "Adapter does not start as the identity",
    "Training begins from a changed model, not from the base.",
    WARNING,
)
UNREADABLE = SystemRule("PC110", "File cannot be read", "Nothing can be done without the document.")
TOO_LARGE = Rule("PC111", "Document is too large", "A config is small; a bomb must not fill the memory.")
SYNTAX = Rule("PC112", "Not valid YAML or JSON", "Only what can be parsed in one way is read.")
DUPLICATE_KEY = Rule("PC113", "Key given twice", "Which of the two values counts would depend on the parser.")
YAML_FEATURE = Rule("PC114", "YAML feature not allowed", "Documents are plain data: what stands there is what is read.")
NOT_FINITE = Rule("PC115", "Not a finite number", "JSON has no such number and no option takes one.")
WRONG_DOCUMENT = Rule("PC116", "Not a document of this kind", "The program must know what it reads.")
MISSING_KEY = KeyRule("PC117", "Required key is missing", "There is no sensible default for it.")
CONTRADICTION = Rule("PC118", "Options contradict each other", "Only one of them could be followed.")
UNKNOWN_ADAPTER = Rule("PC119", "No adapter of that name", "Only adapters that the document defines can be named.")
HUB_UNAVAILABLE = SystemRule(
    "PC120", "Not found, here or on the hub", "The name is neither a folder here nor reachable on the hub."
)
DUPLICATE_MEMBER = Rule("PC121", "Entry given twice", "The second one has no effect.", WARNING)
DROPPED_KEY = Rule(
    "PC122", "Key of another version dropped", "The file was written by a library that has more options.", WARNING
)
SCHEMA_DRIFT = RuntimeRule("PC123", "Committed schema is out of date", "Editors and reviewers read the committed file.")
CANNOT_WRITE = Rule("PC124", "File cannot be written", "Nothing was changed.", builtins=(OSError, AssertionError))
NUMBER_BEYOND = Rule(
    "PC125", "Whole number beyond 64 bits", "Nothing is as large, and other programs read such a number as another."
)
MORE_PROBLEMS = Rule("PC126", "Further problems", "Nobody reads thousands; most often they have one cause.")

# PC2xx: plugins -----------------------------------------------------------------------------------------------------
UNKNOWN_TYPE = KeyRule("PC201", "Unknown PEFT type", "No installed plugin registers this type.")
PLUGIN_BROKEN = RuntimeRule(
    "PC202", "Plugin cannot be loaded", "A method is only as good as the plugin that brings it."
)
PLUGIN_CONFLICT = RuntimeRule(
    "PC203", "Two plugins claim one name", "Which one would run must not depend on search order."
)
PLUGIN_INVALID = RuntimeRule(
    "PC204", "Plugin breaks the contract", "The core relies on what a method's record declares."
)
PLUGIN_RAISED = RuntimeRule("PC205", "Plugin function raised", "The method's own code failed; the model is unchanged.")
PLUGIN_BLOCKED = RuntimeRule("PC206", "Plugin is blocked", "The environment variable PEFTC_BLOCK names this plugin.")
NOT_CONFORMANT = RuntimeRule(
    "PC207", "Plugin fails a conformance check", "Those who use a method rely on what every method does."
)
CORE_RAISED = RuntimeRule(
    "PC208",
    "Failure beside a plugin's function",
    "What peftc did for the method failed, not the method's own code; the model is unchanged.",
)
UNKNOWN_VARIANT = KeyRule("PC209", "Unknown variant", "No installed plugin brings this variant of the method.")

# PC3xx: graphs and base models --------------------------------------------------------------------------------------
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
QUANTIZED_BASE = Rule(
    "PC309", "Base is quantised", "How a quantised layer stores its weight is only known once it is loaded.", WARNING
)
BASE_RENAMED = Rule(
    "PC310", "Base model renamed", "What is saved names the base model that it was trained on.", Severity.WARNING
)
AUTO_CLASS = Rule(
    "PC311", "Base model cannot be chosen", "Base model and model class follow from the adapter's config."
)
BASE_TOO_LARGE = Rule(
    "PC312", "Model is too large", "A document must be safe to plan: building the model would not end."
)

# PC4xx: targets and plans -------------------------------------------------------------------------------------------
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

# PC5xx: running models ----------------------------------------------------------------------------------------------
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
    "PC539", "Base is split by tensors", "Each process holds a part of each weight; the adapter would be held whole."
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
START_DATA = StateRule("PC570", "Start without its data", "The factors follow from what the model does with data.")

# PC6xx: checkpoints -------------------------------------------------------------------------------------------------
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

# PC7xx: commands and training ---------------------------------------------------------------------------------------
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

# PC8xx: the alias `peft`, and the packages beside peftc --------------------------------------------------------------
REAL_PEFT_IMPORTED = ImportRule(
    "PC801", "The real `peft` is imported already", "Who has its classes would not recognise those of peftc."
)
ALIAS_TOO_LATE = ImportRule(
    "PC802", "Alias comes too late", "The library looked for `peft` while it was imported and will not look again."
)
ALIAS_TWICE = ImportRule("PC803", "Two versions of the alias", "Classes of one peftc are not recognised by the other.")
ALIAS_OUTDATED = Rule(
    "PC804", "Alias is not what a library asks for", "The library looks at the version of `peft` and refuses."
)
RELEASE_OUTSIDE = ImportRule(
    "PC810",
    "Release outside the bounds",
    "peftc relies on how the package works; in other releases it works otherwise.",
)
REQUIREMENT_MISSING = ImportRule("PC811", "Required package is missing", "What needs it cannot be done without.")
