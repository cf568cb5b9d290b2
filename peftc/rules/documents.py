"""PC1xx: documents and configs."""

from __future__ import annotations

from peftc.diagnostics import Rule
from peftc.rules.kinds import WARNING, KeyRule, RuntimeRule, SystemRule, TypeRule, UnableRule

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
