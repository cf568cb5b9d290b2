"""Side-by-side measurements against the reference library; the result is a table of ratios, `docs/benchmarks.md`.

`python -m benchmarks` runs every row, `python -m benchmarks ROW …` some; `python -m benchmarks sweep` compares what is
trained on every architecture (`docs/sweep.md`). Nothing here is imported by peftc.
"""
