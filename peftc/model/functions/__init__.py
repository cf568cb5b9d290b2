"""What the package exports beside the models: state dicts, conversion, hot-swapping, optimisers, precision, small helpers."""
