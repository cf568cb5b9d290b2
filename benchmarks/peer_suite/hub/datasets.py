"""The data sets that the tests load, as plain files: `load_dataset("org/name")` finds them from the folder they are in."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_iris

_WORDS = (
    "time",
    "light",
    "stone",
    "river",
    "quiet",
    "always",
    "never",
    "open",
    "small",
    "great",
    "mind",
    "heart",
    "road",
)
_GLUE = """\
---
configs:
- config_name: sst2
  data_files:
  - split: train
    path: train.jsonl
  - split: validation
    path: validation.jsonl
---
"""


def write(root: Path) -> None:
    """All of them, below `root`."""
    rng = random.Random(0)
    _quotes(root / "ybelkada" / "english_quotes_copy", rng)
    _glue(root / "nyu-mll" / "glue", rng)
    _iris(root / "scikit-learn" / "iris")
    _image(root / "huggingface" / "cats-image" / "test")


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def _quotes(folder: Path, rng: random.Random) -> None:
    rows = [
        {"quote": _text(rng, rng.randint(5, 30)), "author": rng.choice(_WORDS), "tags": [rng.choice(_WORDS)]}
        for _ in range(200)
    ]
    _lines(folder / "train.jsonl", rows)


def _glue(folder: Path, rng: random.Random) -> None:
    for split in ("train", "validation"):
        rows = [{"sentence": _text(rng, 8), "label": number % 2, "idx": number} for number in range(32)]
        _lines(folder / f"{split}.jsonl", rows)
    (folder / "README.md").write_text(_GLUE, encoding="utf-8")


def _iris(folder: Path) -> None:
    """The data set itself: the test's tolerances are made for it."""
    iris = load_iris()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["Id", "SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm", "Species"])
        for number, (row, kind) in enumerate(zip(iris.data, iris.target, strict=True), start=1):
            out.writerow([number, *row, iris.target_names[kind]])


def _image(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(folder / "0.png")


def _lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
