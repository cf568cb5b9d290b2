"""Side-by-side measurements against the reference library; the result is a table of ratios, `docs/benchmarks.md`.

`python -m benchmarks` runs every row, `python -m benchmarks ROW …` some. Nothing here is imported by peftc.
"""
