"""Carrying out a plan on a live model, and the model class that users hold."""
