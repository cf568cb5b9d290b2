"""Frozen facts about a model's modules, and the knowledge of model types as data."""
