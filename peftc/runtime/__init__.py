"""Carrying out a plan on a live model: wrappers, their storage, and the session that knows what is applied."""

from peftc.installed.requirements import require

require()  # before anything in here imports a library of another release
