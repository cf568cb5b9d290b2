"""Quantised bases for tests: tiny models whose layers each library stores in its own way, offline and on the CPU."""
