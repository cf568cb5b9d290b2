"""One adapted layer: what its forward does with the adapters that act, and what merging makes of its parameters.

Composed when adapters are activated and not per call. The session makes the wrappers; the model calls them.
"""
