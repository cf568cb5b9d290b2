"""Every architecture of transformers adapted by both libraries: what is trained, compared by name and shape."""
