"""What acts around more than a layer: wrappers round modules, copies that are trained whole, and adapters round calls.

The session makes them beside the wrappers of layers.
"""
