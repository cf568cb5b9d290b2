"""Fast paths for the arithmetic that all methods share."""
