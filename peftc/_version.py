"""The version, in the one place where it is written.

The build reads it from the source without importing anything, and `peftc.__version__` shows it.
"""

from typing import Final

VERSION: Final = "0.1.0"
"""Version of peftc, PEP 440."""
