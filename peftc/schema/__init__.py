"""JSON Schemas made from the configs, and validation against them."""
