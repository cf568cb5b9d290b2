"""What peftc knows about transformers: building and loading base models, their graphs, training and generation."""

from peftc.installed.requirements import require

require()  # before anything in here imports a library of another release
