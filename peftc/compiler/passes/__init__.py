"""The compiler's passes: each takes one adapter's draft and returns it with one more thing decided.

`order` has them in their order; `draft` is what they hand on. Run by `peftc.compiler.compile`.
"""
