"""Example specs and their data, shipped as the data package `peftc.examples`; `peftc demo` runs the quickstart."""
