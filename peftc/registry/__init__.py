"""Which methods are installed, and how one is loaded."""
