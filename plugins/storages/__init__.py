"""How libraries of quantisation store the weight of a linear layer: one module for each, imported without the library."""
