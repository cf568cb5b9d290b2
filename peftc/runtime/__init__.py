"""Carrying out a plan on a live model: wrappers, their storage, and the session that knows what is applied."""
