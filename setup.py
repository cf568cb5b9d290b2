"""Finds the packages and gives three folders of this tree their import names.

`plugins/` is imported as `peftc_plugins`; `schemas/` and `examples/` travel as data, as `peftc.schemas` and
`peftc.examples`. Everything else about the build is in pyproject.toml.
"""

from setuptools import find_packages, setup

RENAMED = {"peftc_plugins": "plugins", "peftc.schemas": "schemas", "peftc.examples": "examples"}

setup(
    packages=[
        *find_packages(include=["peftc", "peftc.*"]),
        *RENAMED,
        *(f"peftc_plugins.{name}" for name in find_packages("plugins")),
    ],
    package_dir=RENAMED,
    package_data={
        "peftc": ["py.typed", "**/*.json", "**/*.template"],
        "peftc_plugins": ["py.typed", "**/*.json"],
        "peftc.schemas": ["*.json"],
        "peftc.examples": ["**/*.yaml", "**/*.json", "**/*.jsonl", "**/*.py", "**/*.md"],
    },
)
