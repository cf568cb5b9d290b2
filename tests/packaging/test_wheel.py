"""The wheel has everything that runs: it is built, installed into a fresh environment, and does the main job there."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

from peftc.registry.manager import default_registry
from tests.architecture.tree import ROOT
from tests.packaging.fresh import peftc, write_small_job


def test_wheel_has_plugins_schemas_examples_and_markers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"peftc_plugins/{p.relative_to(ROOT / 'plugins')}" for p in (ROOT / "plugins").rglob("*.py")}
    wanted |= {f"peftc/schemas/{p.name}" for p in (ROOT / "schemas").glob("*.json")}
    quickstart = ROOT / "examples" / "quickstart"
    wanted |= {f"peftc/examples/quickstart/{p.name}" for p in quickstart.iterdir() if p.suffix in {".yaml", ".jsonl"}}
    data = [*(ROOT / "peftc").rglob("*.json"), *(ROOT / "peftc").rglob("*.template")]
    wanted |= {p.relative_to(ROOT).as_posix() for p in data}
    wanted |= {"peftc/py.typed", "peftc_plugins/py.typed", "peftc_plugins/folder_method/parts/__init__.py"}
    assert wanted - names == set()


def test_wheel_has_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"peftc", "peftc_plugins"}


def test_methods_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    plugins = json.loads(peftc(installed, tmp_path, "plugins", "--json"))["plugins"]
    from_wheel = {plugin["peft_type"] for plugin in plugins if plugin["distribution"].startswith("peftc ")}
    assert from_wheel == {claim.peft_type for claim in default_registry().claims if claim.distribution == "peftc"}
    code = "import peftc, peftc_plugins; print(peftc.__file__, peftc_plugins.__file__)"
    run = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(str(installed.parent) in path for path in run.stdout.split())


def test_schemas_of_the_wheel_are_up_to_date(installed: Path, tmp_path: Path) -> None:
    peftc(installed, tmp_path, "schema", "--check")


def test_the_main_job_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    spec = write_small_job(tmp_path)
    peftc(installed, tmp_path, "validate", str(spec))
    plan = json.loads(peftc(installed, tmp_path, "plan", str(spec), "--format", "json"))
    assert plan["adapters"]
    peftc(installed, tmp_path, "train", str(spec), "--device", "cpu")
    assert {"adapter_config.json", "adapter_model.safetensors", "peftc_plan.json"} <= set(os.listdir(tmp_path / "out"))
    answer = peftc(installed, tmp_path, "generate", "--adapter", "out", "--max-tokens", "2", "red", "--json")
    assert json.loads(answer)
