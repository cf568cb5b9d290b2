"""Generated JSON Schemas, shipped as the data package `peftc.schemas`: read them with `importlib.resources`."""
