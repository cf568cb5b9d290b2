"""The rows of the table, one script each, in the order of the page."""

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
