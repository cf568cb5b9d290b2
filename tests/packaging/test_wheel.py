"""The wheel has everything that runs: it is built, installed into a fresh environment, and does the main job there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftc.registry.manager import default_registry
from tests.architecture.tree import ROOT

SOURCES = ["peftc", "plugins", "schemas", "examples", "pyproject.toml", "setup.py", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources with this environment's setuptools; nothing is downloaded."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "plugins" / "folder_method" / "parts").mkdir(parents=True)
    (copy / "plugins" / "folder_method" / "__init__.py").touch()
    (copy / "plugins" / "folder_method" / "parts" / "__init__.py").touch()
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment with the wheel; other packages come from the running environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A plain folder on the path: its packages are seen, its .pth files (our own editable install) are not.
    (site / "running_environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    pip(sys.executable, "--python", str(python), "install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))
    return folder / "bin"


def pip(*command: str) -> None:
    run = subprocess.run(
        [command[0], "-m", "pip", "--quiet", "--disable-pip-version-check", *command[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def peftc(installed: Path, folder: Path, *arguments: str) -> str:
    """Output of the installed program, run in `folder` with nothing of this tree on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = subprocess.run(
        [installed / "peftc", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_wheel_has_plugins_schemas_examples_and_markers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"peftc_plugins/{p.name}" for p in (ROOT / "plugins").glob("*.py")}
    wanted |= {f"peftc/schemas/{p.name}" for p in (ROOT / "schemas").glob("*.json")}
    quickstart = ROOT / "examples" / "quickstart"
    wanted |= {f"peftc/examples/quickstart/{p.name}" for p in quickstart.iterdir() if p.suffix in {".yaml", ".jsonl"}}
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "peftc").rglob("*.json")}
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


def write_small_job(folder: Path) -> Path:
    """A spec that trains a tiny random model on two lines of text; everything it needs is in `folder`."""
    words = {word: number for number, word in enumerate(["<unk>", "<end>", "red", "green", "blue"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder / "base"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=1, **sizes)).save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text('{"text": "red green blue"}\n{"text": "blue green red"}\n', encoding="utf-8")
    method = next(m for m in map(default_registry().get, default_registry().names) if m.adapts_layers)
    adapter = {"peft_type": method.peft_type, "target_modules": ["q_proj", "v_proj"]}
    spec = {
        "version": 1,
        "base": {"path": "./base", "task_type": "CAUSAL_LM"},
        "adapters": {"default": adapter},
        "train": {"data": "data.jsonl", "steps": 2, "batch_size": 2},
        "output": "out",
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"
