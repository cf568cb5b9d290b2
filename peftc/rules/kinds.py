"""What a rule's exception is beside ours: the builtin class that programs written for the reference catch there."""

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
