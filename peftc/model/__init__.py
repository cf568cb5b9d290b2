"""What users hold: `PeftModel` and its relatives, and the functions that make, load, save and inspect them."""
