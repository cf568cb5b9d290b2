"""What is applied to one model, and every operation on it: adding, activating, merging, steps of training, deleting.

An operation costs what the adapters that it touches cost. Called by `applying` and by the model that users hold.
"""
