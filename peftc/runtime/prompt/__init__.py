"""Prompts: the module that holds virtual tokens, and the one driver that puts them where they belong in a call."""
