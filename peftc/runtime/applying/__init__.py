"""A plan put on a live model: facts about the model, what is compiled for it, the classes, and the level with their API.

The way from `peftc.model` down to a session.
"""
