"""Base layers: how each kind stores its weight and applies it, and where its tensors are when it is called.

A further kind is one file and one line in `table`. Asked by `layer`, which knows no kind, and by all who read base tensors.
"""
