"""From a graph and configs to a frozen plan; no tensors, no torch."""
