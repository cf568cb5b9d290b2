"""What users hold: `PeftModel` and its relatives, and the functions that make, load, save and inspect them."""

from peftc.model import tasks as tasks  # a class of a task is known to `PeftModel` when it is declared
