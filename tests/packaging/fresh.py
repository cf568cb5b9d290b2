"""A fresh environment for tests of what is installed: programs run in it, packages put into it, and a small job to do there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unit.chosen import plain_method


def build_wheel(source: Path, out: Path) -> Path:
    """The wheel of a source tree, built with this environment's setuptools; nothing is downloaded."""
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


def install(wheel: Path, environment: Path) -> None:
    """Install a wheel into the environment whose `bin` folder that is."""
    python = str(environment / "python")
    pip(sys.executable, "--python", python, "install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))


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
    return ran(installed / "peftc", *arguments, folder=folder)


def peftc_each(installed: Path, folder: Path, *commands: str) -> list[str]:
    """Output of several commands of the installed program, one after the other in one process: importing torch takes longer
    than what they do. Each is one line of words."""
    program = f"""
import io, json
from contextlib import redirect_stdout
from peftc.cli.main import main
told = []
for words in {[command.split() for command in commands]!r}:
    with redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0, (words, out.getvalue())
    told.append(out.getvalue())
print(json.dumps(told))
"""
    told: list[str] = json.loads(ran(installed / "python", "-c", program, folder=folder).splitlines()[-1])
    return told


def ran(*command: str | Path, folder: Path) -> str:
    """Output of a program of the fresh environment, run in `folder` with nothing of this tree on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def write_small_job(folder: Path, peft_type: str | None = None) -> Path:
    """A spec that trains a tiny random model on two lines of text; everything it needs is in `folder`. Left out, the type
    is that of some method on layers which needs no options."""
    words = {word: number for number, word in enumerate(["<unk>", "<end>", "red", "green", "blue"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder / "base"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=1, **sizes)).save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text('{"text": "red green blue"}\n{"text": "blue green red"}\n', encoding="utf-8")
    adapter = {"peft_type": peft_type or plain_method().peft_type, "target_modules": ["q_proj", "v_proj"]}
    spec = {
        "version": 1,
        "base": {"path": "./base", "task_type": "CAUSAL_LM"},
        "adapters": {"default": adapter},
        "train": {"data": "data.jsonl", "steps": 2, "batch_size": 2},
        "output": "out",
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"
