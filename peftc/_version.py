"""The version, in the one place where it is written.

The build reads it from the source without importing anything, and `peftc.__version__` shows it.
"""

from typing import Final

VERSION: Final = "0.1.0"
"""Version of peftc, PEP 440."""

REFERENCE_VERSION: Final = "0.21.2"
"""Version of the reference whose files ours are; readers compare it."""

FILE_VERSION: Final = f"{REFERENCE_VERSION}@peftc-{VERSION}"
"""What files say of the version that wrote them; ours stands behind the sign, which readers cut off."""
