"""Documents and configs: what users write, read with positions and validated."""
