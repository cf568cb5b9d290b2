"""The rows of the table, one script each, in the order of the page; and those that run by name alone."""

NAMES = (
    "startup",
    "plan",
    "injection",
    "second-adapter",
    "loaded-adapters",
    "one-token",
    "row-adapters",
    "training-step",
    "dora-step",
    "training-memory",
    "merging",
    "methods",
)
#: What needs libraries that the ordinary environment has not: run from one that has them.
APART = ("packed-memory",)
