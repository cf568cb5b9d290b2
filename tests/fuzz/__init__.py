"""Seeded damage to everything that peftc reads of others: a diagnostic or a result, never a traceback, never a hang.

`python -m tests.fuzz 100000` runs so many cases over all entries and prints a table; `test_fuzz.py` is its short form.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a damaged name may look like that of a repository
