"""An adapter's tensors: what holds them under the ecosystem's names, what they begin with, and how a method sees them.

Filled by `layer` and `around` when an adapter is added; read through views at each use.
"""
